"""The baselines in the engine against their float64 references, for every option."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ota_core.errors import OtaError
from tests import reference_baselines as baselines
from tests.checkpoints import assert_merged, exact_v, ota_recipe, random_base, random_experts, read_tensors, run_merge
from tests.reference import Tensors

BASE = random_base(21)
EXPERTS = exact_v(random_experts(BASE, 3))
WEIGHTS = [e.weights for e in EXPERTS]


def merged(
    tmp: Path, method: str, parameters: dict[str, Any], own: Sequence[dict[str, Any]] = ({}, {}, {}), base: Tensors | None = BASE
) -> Tensors:
    """Merge with the engine; ``own`` holds each expert's parameters."""
    recipe = ota_recipe(tmp, base, EXPERTS[: len(own)], parameters, method=method)
    for entry, parameters_of_one in zip(recipe["models"], own, strict=True):
        entry["parameters"] = parameters_of_one
    return run_merge(recipe, tmp / "out")[0]


def weights(*values: float) -> list[dict[str, float]]:
    return [{"weight": w} for w in values]


def named(parameters: dict[str, Any]) -> dict[str, Any]:
    """A recipe's parameters as the reference calls them."""
    return {"lambda_" if key == "lambda" else key: value for key, value in parameters.items()}


@pytest.mark.parametrize("normalize", [True, False])
def test_linear(tmp_path: Path, normalize: bool) -> None:
    got = merged(tmp_path, "linear", {"normalize": normalize}, weights(1, 0.5, 2))
    assert_merged(got, baselines.linear(WEIGHTS, [1, 0.5, 2], normalize))


def test_linear_defaults_and_no_base(tmp_path: Path) -> None:
    assert_merged(merged(tmp_path, "linear", {}, base=None), baselines.linear(WEIGHTS, [1, 1, 1]))


def test_linear_weights_that_add_up_to_zero(tmp_path: Path) -> None:
    """Normalising would divide by zero and fill the checkpoint with infinities."""
    with pytest.raises(OtaError, match="weight"):
        merged(tmp_path, "linear", {}, weights(1, -1, 0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parameters", [{}, {"lambda": 0.4}, {"normalize": True}, {"normalize": True, "lambda": 2.0}])
@pytest.mark.parametrize("w", [(1.0, 1.0, 1.0), (0.5, 2.0, -0.3)])
def test_task_arithmetic(tmp_path: Path, parameters: dict[str, Any], w: tuple[float, ...]) -> None:
    got = merged(tmp_path, "task_arithmetic", parameters, weights(*w))
    assert_merged(got, baselines.add_up(BASE, WEIGHTS, w, **named(parameters)), BASE)


@pytest.mark.parametrize("density", [0.001, 0.2, 0.35, 0.57, 0.9, 1.0])
@pytest.mark.parametrize("parameters", [{}, {"lambda": 1.5}, {"normalize": False}])
def test_ties(tmp_path: Path, parameters: dict[str, Any], density: float) -> None:
    got = merged(tmp_path, "ties", {"density": density, **parameters}, weights(1, 0.5, 2))
    options = {"elect": True, "normalize": True} | named(parameters)
    assert_merged(
        got, baselines.add_up(BASE, WEIGHTS, [1, 0.5, 2], lambda m, name, x: baselines.trim(x, density), **options), BASE
    )


def test_ties_with_a_density_for_each_expert(tmp_path: Path) -> None:
    own = [{"density": d, "weight": w} for d, w in [(0.1, 1.0), (0.6, -0.5), (1.0, 0.7)]]
    want = baselines.add_up(
        BASE, WEIGHTS, [1.0, -0.5, 0.7], lambda m, name, x: baselines.trim(x, own[m]["density"]), elect=True, normalize=True
    )
    assert_merged(merged(tmp_path, "ties", {}, own), want, BASE)


def test_ties_elects_plus_when_the_sum_is_zero(tmp_path: Path) -> None:
    base = {"model.norm.weight": np.full(4, 10, np.float32)}
    ends = [np.array([11, 9, 10, 10], np.float32), np.array([9, 9, 10, 13], np.float32), np.array([10, 12, 10, 9], np.float32)]
    experts = [replace(e, weights={"model.norm.weight": x}, v={}) for e, x in zip(EXPERTS, ends, strict=True)]
    got, _ = run_merge(ota_recipe(tmp_path, base, experts, method="ties"), tmp_path / "out")
    assert got["model.norm.weight"].tolist() == [11, 12, 10, 13]


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize(
    "density, gamma", [(0.5, 0.1), (0.9, 0.1), (0.3, 0.4), (0.57, 0.07), (1.0, 0.2), (0.85, 0.15), (0.1, 0.05)]
)
@pytest.mark.parametrize("parameters", [{}, {"lambda": 0.7, "normalize": True}])
def test_breadcrumbs(tmp_path: Path, parameters: dict[str, Any], density: float, gamma: float, elect: bool) -> None:
    method = "breadcrumbs_ties" if elect else "breadcrumbs"
    got = merged(tmp_path, method, {"density": density, "gamma": gamma, **parameters}, weights(1, 0.5, 2))
    options = {"elect": elect} | named(parameters)
    want = baselines.add_up(BASE, WEIGHTS, [1, 0.5, 2], lambda m, name, x: baselines.breadcrumb(x, density, gamma), **options)
    assert_merged(got, want, BASE)


def uniform(seed: int, expert: int, name: str, count: int) -> np.ndarray[Any, Any]:
    """The engine's random numbers; what DARE does with them is the reference's business."""
    from ota_core.methods import dare

    return dare.uniform(seed, expert, name, 0, count).numpy()


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("parameters", [{}, {"rescale": False}, {"normalize": True, "lambda": 0.6}, {"seed": 12345}])
def test_dare(tmp_path: Path, parameters: dict[str, Any], method: str) -> None:
    densities, w = [0.2, 0.5, 1.0], [1.0, 0.5, -2.0]
    own = [{"density": d, "weight": x} for d, x in zip(densities, w, strict=True)]
    got = merged(tmp_path, method, {"seed": 7, **parameters}, own)
    options = {"elect": method == "dare_ties"} | named(parameters)
    seed, rescale = options.pop("seed", 7), options.pop("rescale", True)

    def left(m: int, name: str, task: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        keep = (uniform(seed, m, name, task.size) < densities[m]).reshape(task.shape)
        return baselines.dare(task, keep, densities[m], rescale)

    assert_merged(got, baselines.add_up(BASE, WEIGHTS, w, left, **options), BASE)


def test_dares_random_numbers() -> None:
    """Uniform, fixed by seed, expert and name, different between them, and the same in whatever pieces they are drawn."""
    from ota_core.methods import dare

    whole = uniform(1, 0, "a", 40000)
    assert whole.dtype == np.float64 and whole.min() >= 0 and whole.max() < 1
    counts = np.histogram(whole, bins=20, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 45  # χ² with 19 degrees of freedom: p = 0.001 is 43.8
    assert abs(np.corrcoef(whole[:-1], whole[1:])[0, 1]) < 0.02
    pieces = [dare.uniform(1, 0, "a", start, min(777, 40000 - start)).numpy() for start in range(0, 40000, 777)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    for other in (uniform(2, 0, "a", 40000), uniform(1, 1, "a", 40000), uniform(1, 0, "b", 40000)):
        assert abs(np.corrcoef(whole, other)[0, 1]) < 0.02


def test_dare_keeps_the_asked_share_and_records_its_seed(tmp_path: Path) -> None:
    base = {"model.norm.weight": np.zeros((200, 200), np.float32)}
    expert = replace(EXPERTS[0], weights={"model.norm.weight": np.ones((200, 200), np.float32)}, v={})
    recipe = ota_recipe(tmp_path, base, [expert], {"density": 0.1}, method="dare_linear")
    got, _ = run_merge(recipe, tmp_path / "out")
    values, counts = np.unique(got["model.norm.weight"], return_counts=True)
    np.testing.assert_allclose(values, [0, 10], rtol=1e-6)
    assert abs(counts[1] / 40000 - 0.1) < 0.006
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert '"seed": 0' in json.dumps(record), "also the default seed is recorded"


@pytest.mark.parametrize("base", [BASE, None])
@pytest.mark.parametrize("w", [(1.0, 1.0, 1.0), (0.2, 1.0, 3.0)])
def test_fisher(tmp_path: Path, base: Tensors | None, w: tuple[float, ...]) -> None:
    got = merged(tmp_path, "fisher", {}, weights(*w), base)
    assert_merged(got, baselines.fisher(base, WEIGHTS, [e.v for e in EXPERTS], w), rtol=3e-7)


def test_fisher_with_compressed_moments(tmp_path: Path) -> None:
    from tests.reference import rank1

    got = merged(tmp_path, "fisher", {"compression": "rank1"})
    vs = [{n: rank1(x) for n, x in e.v.items()} for e in EXPERTS]
    assert_merged(got, baselines.fisher(BASE, WEIGHTS, vs, [1, 1, 1]), rtol=3e-7)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp(tmp_path: Path, t: float) -> None:
    """These experts are almost parallel to their base, as real ones are: mostly the straight line."""
    assert_merged(merged(tmp_path, "slerp", {"t": t}, [{}]), baselines.slerp(BASE, WEIGHTS[0], t))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_slerp_far_apart_and_two_models(tmp_path: Path, t: float) -> None:
    other = {n: (0.3 * x + np.random.default_rng(1).normal(0, 0.4, x.shape)).astype(np.float32) for n, x in BASE.items()}
    recipe = ota_recipe(tmp_path, BASE, [replace(EXPERTS[0], weights=other, v={})], {"t": t}, method="slerp")
    want = baselines.slerp(BASE, other, t)
    assert_merged(run_merge(recipe, tmp_path / "out")[0], want)
    # mergekit's form: base_model is one of the two models, wherever it stands in the list.
    both = {**recipe, "models": [recipe["models"][0], {"model": recipe["base_model"]}]}
    assert_merged(run_merge(both, tmp_path / "both")[0], want)


def test_slerp_of_opposite_and_of_zero_tensors(tmp_path: Path) -> None:
    name = "model.norm.weight"
    a, zero = np.array([1.0, -2, 3], np.float32), np.zeros(3, np.float32)
    for label, (x, y) in {"opposite": (a, -a), "zero": (zero, a), "zeros": (zero, zero)}.items():
        recipe = ota_recipe(
            tmp_path / label, {name: x}, [replace(EXPERTS[0], weights={name: y}, v={})], {"t": 0.25}, method="slerp"
        )
        got, _ = run_merge(recipe, tmp_path / label / "out")
        np.testing.assert_allclose(got[name], baselines.slerp({name: x}, {name: y}, 0.25)[name], rtol=1e-6, atol=1e-9)


def test_baselines_need_no_second_moments(tmp_path: Path) -> None:
    recipe = ota_recipe(tmp_path, BASE, [replace(e, v={}) for e in EXPERTS], {"density": 0.5}, method="ties")
    run_merge(recipe, tmp_path / "out")
    assert sorted(read_tensors(tmp_path / "out")) == sorted(BASE)
