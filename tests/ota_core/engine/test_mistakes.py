"""Mistakes seen in other implementations: each test holds the mistaken version in a few lines, shows that it gives something else, and
then that the engine is right.

Others have their tests where they belong: a mistyped option that means the default and numbers that YAML 1.1 reads as text
(``recipe/test_recipe.py``), rows of v that stay where θ moved (``plan/test_vocabulary.py``), numbers of an optimizer in the model's order
(``tasks/merging/test_architecture.py``), bad entries that are repaired (``test_bad_input.py``), files of an older output that survive
(``test_output.py``).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ota_core.errors import OtaError
from tests import reference
from tests.checkpoints import (
    assert_merged,
    exact_v,
    ota_recipe,
    random_base,
    random_experts,
    rounded,
    run_merge,
    write_checkpoint,
)
from tests.reference import Expert, Tensors

NAME = "model.norm.weight"
BASE = random_base(31)
EXPERTS = [replace(e, density=0.4) for e in exact_v(random_experts(BASE, 3))]


def one(values: list[float], v: list[float] | None = None, **options: Any) -> Expert:
    """An expert of a single vector."""
    return Expert(weights={NAME: np.array(values, np.float32)}, v={} if v is None else {NAME: np.array(v, np.float32)}, **options)


def merged(tmp: Path, base: Tensors, experts: list[Expert], parameters: dict[str, Any] | None = None, **options: Any) -> Tensors:
    return run_merge(ota_recipe(tmp, base, experts, parameters, **options), tmp / "out")[0]


def differ(a: Tensors, b: Tensors) -> bool:
    return any((np.abs(a[n] - b[n]) > 1e-5).any() for n in a)


def test_fully_masked_is_read_from_the_masks(tmp_path: Path) -> None:
    base = {NAME: np.array([1.0, 1.0], np.float32)}
    expert = one([2.0, 3.0], v=[1e-34, 1e-38])
    p = np.sqrt(expert.v[NAME].astype(np.float64))
    mistaken = np.where(p < 1e-12, base[NAME], expert.weights[NAME])
    assert mistaken.tolist() == [1.0, 1.0]
    assert merged(tmp_path / "whole", base, [expert])[NAME].tolist() == [2.0, 3.0]
    assert merged(tmp_path / "kept", base, [replace(expert, precond_threshold=0.0)])[NAME].tolist() == [2.0, 3.0]
    # With fallback mean, an element that is kept with a tiny weight is not taken for one that nobody keeps.
    pair = [replace(expert, density=0.5), replace(one([5.0, 1.0], v=[1e-34, 1e-34]), density=0.5)]
    got = merged(tmp_path / "mean", base, pair, {"fallback": "mean"})
    assert_merged(got, reference.ota(base, pair, fallback="mean"), base)


def test_no_epsilon_of_our_own(tmp_path: Path) -> None:
    experts = [replace(e, v={n: x * np.float32(1e-6) for n, x in e.v.items()}, density=None) for e in EXPERTS]
    mistaken, right = reference.ota(BASE, experts, epsilon=1e-8), reference.ota(BASE, experts)
    mean = {n: np.mean([e.weights[n].astype(np.float64) for e in experts], axis=0) for n in BASE}
    # √v is at most 1e-9 here, so that 1e-8 makes a plain mean of everything.
    spread = max(np.abs(right[n] - mean[n]).max() for n in BASE)
    assert max(np.abs(mistaken[n] - mean[n]).max() for n in BASE) < 0.2 * spread
    assert differ(mistaken, right)
    assert_merged(merged(tmp_path, BASE, experts), right, BASE)


def test_nobody_kept_and_no_curvature_give_no_nan(tmp_path: Path) -> None:
    base = {NAME: np.array([1.0, 2.0, 3.0], np.float32)}
    a, b = one([2.0, 2.0, 4.0], v=[0.0, 0.0, 0.0]), one([3.0, 5.0, 3.0], v=[0.0, 0.0, 1e-10])
    with np.errstate(invalid="ignore"):
        p = [np.sqrt(e.v[NAME]) for e in (a, b)]
        mistaken = base[NAME] + sum(x * (e.weights[NAME] - base[NAME]) for x, e in zip(p, (a, b), strict=True)) / sum(p)
    assert np.isnan(mistaken).any()
    for density in (None, 0.3):
        for fallback in ("base", "mean"):
            experts = [replace(e, density=density) for e in (a, b)]
            got = merged(tmp_path / f"{density}{fallback}", base, experts, {"fallback": fallback})
            assert np.isfinite(got[NAME]).all()
            assert_merged(got, reference.ota(base, experts, fallback=fallback), base)


def test_the_difference_is_taken_before_any_cast(tmp_path: Path) -> None:
    base, end = {NAME: np.array([1.0, -2.0], np.float32)}, one([1.0 + 2**-9, -2.0 + 2**-9], v=[1e-10, 1e-10])
    cast = rounded({"b": base[NAME], "e": end.weights[NAME]}, torch.bfloat16)
    mistaken = cast["b"] + 8 * (cast["e"] - cast["b"])
    assert mistaken.tolist() == [1.0, -2.0]
    got = merged(tmp_path, base, [end], {"lambda": 8.0}, top={"dtype": "bfloat16"})
    assert got[NAME].tolist() == [1.0 + 2**-6, -2.0 + 2**-6]
    # bfloat16 experts of a float32 base: the base is not rounded to match them.
    recipe = ota_recipe(tmp_path / "mixed", base, [end], {"lambda": 8.0}, top={"dtype": "bfloat16"})
    fine = {NAME: np.array([1.0 + 2**-9, -2.0 - 2**-9], np.float32)}
    recipe["base_model"] = str(write_checkpoint(tmp_path / "fine", fine))
    write_checkpoint(tmp_path / "mixed" / "expert0", {NAME: np.array([1.0, -2.0], np.float32)}, dtype=torch.bfloat16)
    want = rounded({NAME: fine[NAME] + np.array([-1, 1], np.float32) * 8 * 2**-9}, torch.bfloat16)[NAME]
    assert run_merge(recipe, tmp_path / "mixed" / "out")[0][NAME].tolist() == want.tolist()


def test_rank1_divides_first(tmp_path: Path) -> None:
    """r and c near 1e-22: their product is below float32's smallest number."""
    name = "model.layers.0.self_attn.q_proj.weight"
    rng = np.random.default_rng(0)
    base = {name: rng.normal(0, 1, (6, 8)).astype(np.float32)}
    experts = [
        Expert(
            weights={name: base[name] + rng.normal(0, 0.1, (6, 8)).astype(np.float32)},
            v={name: (rng.random((6, 8)) * 1e-25).astype(np.float32)},
        )
        for _ in range(2)
    ]
    v = experts[0].v[name]
    mistaken = v.sum(1, keepdims=True) * v.sum(0, keepdims=True) / v.sum()
    assert not mistaken.any(), "the product underflows to zero"
    right = reference.ota(base, experts, compression="rank1")
    assert differ(right, base)
    assert_merged(merged(tmp_path, base, experts, {"compression": "rank1"}), right, base)


def test_compressed_moments_alone_are_enough(tmp_path: Path) -> None:
    """The full v is gone; the merge is the same to the last bit. Scoring with the full v then is an error, not something else."""
    from ota_core.compute.stream import Stream
    from ota_core.moments import open_moments
    from ota_core.moments.compression import compress, save_compressed

    recipe = ota_recipe(tmp_path, BASE, EXPERTS, {"compression": "rank1"})
    fused, _ = run_merge(recipe, tmp_path / "fused")
    for m, entry in enumerate(recipe["models"]):
        moments, _ = compress(open_moments(tmp_path / f"expert{m}" / "exp_avg_sq.safetensors"), stream=Stream())
        save_compressed(moments, tmp_path / f"small{m}.safetensors")
        (tmp_path / f"expert{m}" / "exp_avg_sq.safetensors").unlink()
        entry["parameters"]["preconditioner_path"] = str(tmp_path / f"small{m}.safetensors")
    staged, _ = run_merge(recipe, tmp_path / "staged")
    for name in fused:
        np.testing.assert_array_equal(staged[name], fused[name], err_msg=name)
    recipe["parameters"]["mask_curvature"] = "full"
    with pytest.raises(OtaError, match=r"full"):
        run_merge(recipe, tmp_path / "full")
