"""FFG and OTA in the engine against the float64 reference, for every option of the method."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_core.errors import OtaError
from tests import reference
from tests.checkpoints import (
    assert_merged,
    exact_v,
    ota_recipe,
    random_base,
    random_expert,
    random_experts,
    rounded,
    run_merge,
)
from tests.reference import Expert, Tensors

BASE = random_base()
EXPERTS = exact_v(random_experts(BASE))
# In units of v·Δ²; keeps about half of the elements of EXPERTS.
MIDDLE = 3e-19


def check(tmp: Path, base: Tensors, experts: Sequence[Expert], parameters: Mapping[str, Any], **options: Any) -> Tensors:
    """Merge with the engine, compare with the reference under the same options, return the merged tensors."""
    got, _ = run_merge(ota_recipe(tmp, base, experts, parameters), tmp / "out", **options)
    asked = {"lambda_" if key == "lambda" else key: value for key, value in parameters.items()}
    assert_merged(got, reference.ota(base, experts, **asked), base)
    return got


def masked(density: float | None = 0.4, experts: Sequence[Expert] = EXPERTS) -> list[Expert]:
    return [replace(e, density=density) for e in experts]


@pytest.mark.parametrize("density", [None, 0.4, 1.0])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"power": 0.0},
        {"power": 1.0},
        {"power": 0.25},
        {"lambda": 1.7},
        {"lambda": -0.5},
        {"compression": "rank1"},
        {"compression": "rank1", "mask_curvature": "full"},
        {"scope": "per_tensor"},
        {"scope": "per_tensor", "compression": "rank1"},
        {"metric": "magnitude"},
        {"metric": "magnitude", "scope": "per_tensor"},
        {"denominator": "all"},
        {"epsilon": 1e-7},
        {"epsilon": 1e-7, "denominator": "all"},
        {"normalise": "global"},
        {"normalise": "global", "power": 1.0, "epsilon": 0.1},
        {"fallback": "mean"},
        {"fallback": "mean", "denominator": "all", "lambda": 2.0},
        {"masked_merge": "linear"},
        {"masked_merge": "linear", "denominator": "all"},
        {"masked_merge": "ties"},
        {"masked_merge": "ties", "denominator": "all"},
        {"masked_merge": "ties", "denominator": "all", "rescale": True, "fallback": "mean"},
        {"masked_merge": "ties", "fallback": "mean", "lambda": 1.5},
        {"rescale": True},
        {"rescale": True, "masked_merge": "linear"},
        {"rescale": True, "masked_merge": "ties"},
    ],
    ids=lambda p: "-".join(f"{k}={v}" for k, v in p.items()) or "defaults",
)
def test_every_option(tmp_path: Path, parameters: dict[str, Any], density: float | None) -> None:
    check(tmp_path, BASE, masked(density), parameters)


@settings(max_examples=40, deadline=None)
@given(
    parameters=st.fixed_dictionaries(
        {},
        optional={
            "power": st.sampled_from([0.0, 0.3, 0.5, 1.0]),
            "lambda": st.sampled_from([0.5, 1.0, 2.0]),
            "scope": st.sampled_from(["global", "per_tensor"]),
            "compression": st.sampled_from(["none", "rank1"]),
            "mask_curvature": st.sampled_from(["merge", "full"]),
            "bias_correction": st.booleans(),
            "normalise": st.sampled_from(["none", "global"]),
            "epsilon": st.sampled_from([0.0, 1e-6]),
            "denominator": st.sampled_from(["kept", "all"]),
            "fallback": st.sampled_from(["base", "mean"]),
            "masked_merge": st.sampled_from(["precond", "ties"]),
            "rescale": st.booleans(),
        },
    ),
    own=st.lists(
        st.tuples(
            st.one_of(
                st.fixed_dictionaries({"density": st.sampled_from([0.01, 0.2, 0.7, 1.0])}),
                st.fixed_dictionaries({"precond_threshold": st.sampled_from([1e-21, MIDDLE, 1e-17])}),
                st.just({}),
            ),
            st.sampled_from([0.5, 1.0, 3.0]),
        ),
        min_size=2,
        max_size=3,
    ),
    block=st.sampled_from([None, 1, 20]),
)
def test_any_combination(parameters: dict[str, Any], own: list[tuple[dict[str, float], float]], block: int | None) -> None:
    experts = [
        replace(e, scaling_factor=factor, step=100 * (m + 1), beta2=0.99, **threshold)  # type: ignore[arg-type]
        for m, (e, (threshold, factor)) in enumerate(zip(EXPERTS, own, strict=False))
    ]
    with TemporaryDirectory() as folder:
        check(Path(folder), BASE, experts, parameters, block_elements=block)


def test_moments_of_real_spread(tmp_path: Path) -> None:
    """v from 1e-20 to 1e-8 with exact zeros, not cut to few bits."""
    experts = random_experts(BASE, 4)
    check(tmp_path / "full", BASE, masked(0.3, experts), {})
    check(tmp_path / "rank1", BASE, experts, {"compression": "rank1"})
    check(
        tmp_path / "corrected",
        BASE,
        [replace(e, step=m * 300 + 1, beta2=0.999) for m, e in enumerate(experts)],
        {"bias_correction": True},
    )


def test_bias_correction_without_step_and_beta2(tmp_path: Path) -> None:
    """A correction that is asked for and cannot be made is an error: some experts corrected and others not would weigh wrongly."""
    with pytest.raises(OtaError, match="bias_correction needs"):
        check(tmp_path, BASE, masked(0.4), {"bias_correction": True})


def test_an_expert_that_takes_no_part_keeps_nothing(tmp_path: Path) -> None:
    """It has no mask and no curvature in a tensor it did not move: the elements that the others mask still fall back."""
    name = "model.norm.weight"
    still = _forget(replace(EXPERTS[0], weights={**EXPERTS[0].weights, name: BASE[name]}), name)
    check(tmp_path, BASE, [still, *masked(0.4, EXPERTS[1:])], {"fallback": "mean"})


@pytest.mark.parametrize("factor", [1e-3, 1e-9, 1e-12])
@pytest.mark.parametrize("masked_merge", ["precond", "linear", "ties"])
def test_small_factors_still_weigh(tmp_path: Path, masked_merge: str, factor: float) -> None:
    """Only the ratio of the factors matters, however small they are."""
    experts = [replace(e, scaling_factor=factor * (m + 1)) for m, e in enumerate(masked(0.4))]
    check(tmp_path, BASE, experts, {"masked_merge": masked_merge})


def test_ties_where_the_elected_sum_is_zero(tmp_path: Path) -> None:
    """Nobody is elected: the base stays."""
    name = "model.norm.weight"
    ends = ([2.0, 1.0, 5.0], [0.0, 1.0, -2.0])
    v = np.full(3, 1e-10, np.float32)
    experts = [Expert(weights={name: np.array(x, np.float32)}, v={name: v}, precond_threshold=0.0) for x in ends]
    got = check(tmp_path, {name: np.ones(3, np.float32)}, experts, {"masked_merge": "ties"})
    assert got[name].tolist() == [1.0, 1.0, 5.0]


def test_each_expert_has_its_own_threshold_and_factor(tmp_path: Path) -> None:
    a, b, c = EXPERTS
    experts = [replace(a, density=0.1, scaling_factor=2.0), replace(b, precond_threshold=MIDDLE), c]
    check(tmp_path, BASE, experts, {})
    kept = reference.masks(BASE, experts[1], b.v)
    assert kept is not None and 0.2 < np.mean(np.concatenate([m.ravel() for m in kept.values()])) < 0.8


@pytest.mark.parametrize("parameters", [{}, {"power": 1.0}, {"compression": "rank1"}, {"normalise": "global"}, {"epsilon": 1e-7}])
def test_without_a_base(tmp_path: Path, parameters: dict[str, Any]) -> None:
    got, _ = run_merge(ota_recipe(tmp_path, None, EXPERTS, parameters), tmp_path / "out")
    assert_merged(got, reference.ota_without_base(EXPERTS, **parameters))


def _forget(expert: Expert, *names: str) -> Expert:
    return replace(expert, v={n: x for n, x in expert.v.items() if n not in names})


def test_missing_curvature_lists_every_tensor_at_once(tmp_path: Path) -> None:
    experts = [
        _forget(EXPERTS[0], "model.norm.weight", "model.embed_tokens.weight"),
        EXPERTS[1],
        _forget(EXPERTS[2], "model.norm.weight"),
    ]
    with pytest.raises(OtaError) as caught:
        run_merge(ota_recipe(tmp_path, BASE, experts), tmp_path / "out")
    for part in ("model.norm.weight", "model.embed_tokens.weight", "expert0", "expert2"):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()
    check(tmp_path / "mean", BASE, experts, {"missing_curvature": "mean", "lambda": 1.5})
    check(tmp_path / "masked", BASE, masked(0.4, experts), {"missing_curvature": "mean", "fallback": "mean"})


@pytest.mark.parametrize(
    "parameters", [{}, {"denominator": "all"}, {"fallback": "mean"}, {"masked_merge": "linear"}, {"masked_merge": "ties"}]
)
@pytest.mark.parametrize("density", [None, 0.4])
def test_no_curvature_and_no_movement_takes_no_part(tmp_path: Path, parameters: dict[str, Any], density: float | None) -> None:
    name = "model.norm.weight"
    still = _forget(replace(EXPERTS[0], weights={**EXPERTS[0].weights, name: BASE[name]}), name)
    check(tmp_path, BASE, masked(density, [still, *EXPERTS[1:]]), parameters)


@pytest.mark.parametrize(
    "parameters", [{}, {"compression": "rank1", "scope": "per_tensor"}, {"normalise": "global", "fallback": "mean"}]
)
@pytest.mark.parametrize("density", [None, 0.3])
def test_a_tied_tensor_uses_the_others_curvature_and_mask(
    tmp_path: Path, parameters: dict[str, Any], density: float | None
) -> None:
    """lm_head.weight is in the files although config.json ties it to the embedding."""
    alias, canonical = "lm_head.weight", "model.embed_tokens.weight"
    base = {**BASE, alias: BASE[canonical]}
    experts = [replace(e, weights={**e.weights, alias: e.weights[canonical]}, density=density) for e in EXPERTS]
    recipe = ota_recipe(tmp_path, base, experts, parameters, config={"tie_word_embeddings": True})
    got, report = run_merge(recipe, tmp_path / "out")
    got.setdefault(alias, got[canonical])  # the writer may leave the alias to the loader
    assert_merged(got, reference.ota(base, experts, tied={alias: canonical}, **parameters), base)
    if density is not None:
        assert {d["total"] for d in report.densities.values()} == {sum(x.size for x in BASE.values())}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_or_wider_whatever_the_storage(tmp_path: Path, dtype: torch.dtype) -> None:
    base = rounded(BASE, dtype)
    experts = [replace(e, weights=rounded(e.weights, dtype), density=0.5) for e in EXPERTS]
    recipe = ota_recipe(tmp_path, base, experts, dtype=dtype, top={"out_dtype": "float32"})
    got, _ = run_merge(recipe, tmp_path / "out")
    assert_merged(got, reference.ota(base, experts), base)


@pytest.mark.parametrize("parameters", [{}, {"compression": "rank1"}, {"metric": "magnitude"}, {"scope": "per_tensor"}])
@pytest.mark.parametrize("seed", range(3))
def test_the_mask_is_exactly_the_references(tmp_path: Path, parameters: dict[str, Any], seed: int) -> None:
    """One expert: kept elements are the expert's, the others the base's, so that the output shows the mask."""
    [expert] = exact_v([random_expert(BASE, seed, density=0.35)])
    got, _ = run_merge(ota_recipe(tmp_path, BASE, [expert], parameters), tmp_path / "out")
    kept = reference.masks(
        BASE, expert, reference.curvature(expert, parameters.get("compression", "none")),
        parameters.get("scope", "global"), parameters.get("metric", "curvature"),
    )  # fmt: skip
    assert kept is not None
    for name, mask in kept.items():
        # Without curvature a kept element has no weight: P = 0, and the base stays.
        weighs = reference.curvature(expert, parameters.get("compression", "none"))[name] > 0
        np.testing.assert_array_equal(got[name], np.where(mask & weighs, expert.weights[name], BASE[name]), err_msg=name)


def test_a_single_weight_and_an_empty_tensor(tmp_path: Path) -> None:
    base: Tensors = {**BASE, "model.scale": np.array(1.5, np.float32), "model.nothing": np.zeros((0, 4), np.float32)}
    experts = exact_v(random_experts(base, 2, density=0.5))
    check(tmp_path, base, experts, {})
