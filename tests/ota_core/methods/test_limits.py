"""What must hold whatever the numbers: limits of the formulas, symmetries, and independence of how the files are cut."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ota_core.files.checkpoint import Checkpoint
from ota_core.files.rows import I64, NAMED
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

BASE = random_base(11)
EXPERTS = exact_v(random_experts(BASE, 3))
METHODS: dict[str, dict[str, Any]] = {
    "ota": {"density": 0.4, "compression": "rank1"},
    "linear": {},
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.5},
    "dare_linear": {"density": 0.5, "seed": 3},
    "dare_ties": {"density": 0.5, "seed": 3},
    "breadcrumbs": {"density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.5, "gamma": 0.1},
    "fisher": {},
    "slerp": {"t": 0.3},
}


def same_bits(a: Tensors, b: Tensors) -> None:
    assert sorted(a) == sorted(b)
    for name in a:
        np.testing.assert_array_equal(a[name].view(np.uint32), b[name].view(np.uint32), err_msg=name)


def merged(tmp: Path, experts: list[Expert], parameters: dict[str, Any] | None = None, **options: Any) -> Tensors:
    return run_merge(ota_recipe(tmp, BASE, experts, parameters, **options), tmp / "out")[0]


def recipe_of(tmp: Path, method: str, **options: Any) -> dict[str, Any]:
    experts = EXPERTS[:1] if method == "slerp" else EXPERTS
    return ota_recipe(tmp, BASE, experts, METHODS[method], method=method, **options)


@pytest.mark.parametrize("density", [None, 0.4])
def test_equal_curvature_gives_the_mean_of_the_kept(tmp_path: Path, density: float | None) -> None:
    v = {n: np.full(x.shape, 1e-15, np.float32) for n, x in BASE.items()}
    experts = [replace(e, v=v, density=density) for e in EXPERTS]
    got = merged(tmp_path, experts)
    kept = [reference.masks(BASE, e, v) or {n: np.ones(x.shape, bool) for n, x in BASE.items()} for e in experts]
    for name, start in BASE.items():
        count = sum(k[name].astype(int) for k in kept)
        total = sum(np.where(k[name], e.weights[name].astype(np.float64), 0) for k, e in zip(kept, experts, strict=True))
        want = np.where(count > 0, total / np.maximum(count, 1), start)
        np.testing.assert_allclose(got[name], want, rtol=2e-7, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("parameters", [{}, {"density": 1.0}, {"power": 1.0}, {"normalise": "global"}, {"compression": "rank1"}])
def test_one_expert_at_density_one_is_that_expert_bit_for_bit(tmp_path: Path, parameters: dict[str, Any]) -> None:
    [expert] = random_experts(BASE, 1)
    expert = replace(expert, v={n: np.maximum(x, np.float32(1e-30)) for n, x in expert.v.items()})
    same_bits(merged(tmp_path, [expert], parameters), expert.weights)


def test_one_expert_bit_for_bit_also_where_the_difference_is_inexact(tmp_path: Path) -> None:
    """θ₀ + (θ − θ₀) is θ again although θ − θ₀ has no float32 of its own."""
    base = {"model.norm.weight": np.array([1e8, -3.0, 1e-12, 0.1, 65504.0], np.float32)}
    weights = {"model.norm.weight": np.array([1e-3, 1e-7, 5.0, -0.3, 1e-5], np.float32)}
    expert = Expert(weights=weights, v={"model.norm.weight": np.full(5, 1e-12, np.float32)})
    same_bits(run_merge(ota_recipe(tmp_path, base, [expert]), tmp_path / "out")[0], weights)


@pytest.mark.parametrize("density, fallback", [(None, "base"), (None, "mean"), (0.5, "base")])
def test_no_curvature_is_the_base_bit_for_bit(tmp_path: Path, density: float | None, fallback: str) -> None:
    experts = [replace(e, v={n: np.zeros_like(x) for n, x in e.v.items()}, density=density) for e in EXPERTS]
    same_bits(merged(tmp_path, experts, {"fallback": fallback}), BASE)


def test_nothing_kept_is_the_base_bit_for_bit(tmp_path: Path) -> None:
    same_bits(merged(tmp_path, [replace(e, precond_threshold=1e6) for e in EXPERTS]), BASE)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in {"slerp", "dare_linear", "dare_ties"}])
def test_the_order_of_the_experts_does_not_matter(tmp_path: Path, method: str) -> None:
    """DARE is left out: its random masks belong to the place in the recipe."""
    forward, _ = run_merge(ota_recipe(tmp_path / "a", BASE, EXPERTS, METHODS[method], method=method), tmp_path / "a" / "out")
    backward, _ = run_merge(
        ota_recipe(tmp_path / "b", BASE, EXPERTS[::-1], METHODS[method], method=method), tmp_path / "b" / "out"
    )
    for name in BASE:
        np.testing.assert_allclose(backward[name], forward[name], rtol=1.2e-7, atol=1e-12, err_msg=name)


def test_the_same_expert_twice_is_the_expert_once(tmp_path: Path) -> None:
    once, twice = (replace(EXPERTS[0], density=0.3) for _ in range(2))
    assert_merged(merged(tmp_path, [once, twice]), reference.ota(BASE, [once]), BASE)


@pytest.mark.parametrize("method", METHODS)
def test_block_size_changes_no_bit(tmp_path: Path, method: str) -> None:
    recipe = recipe_of(tmp_path, method)
    whole, _ = run_merge(recipe, tmp_path / "whole")
    for block in (1, 8, 17, 64, 10**6):
        same_bits(run_merge(recipe, tmp_path / f"b{block}", block_elements=block)[0], whole)


@pytest.mark.parametrize("parameters", [{"rescale": True}, {"normalise": "global"}, {"compression": "rank1"}, {"lambda": 1.7}])
def test_block_size_changes_no_bit_of_sums(tmp_path: Path, parameters: dict[str, Any]) -> None:
    """v and Δ whose float64 sums depend on the order of adding, merged onto zeros so that the last bits show."""
    rng = np.random.default_rng(8)
    base = {"model.layers.0.self_attn.q_proj.weight": np.zeros((61, 33), np.float32)}
    experts = [random_expert(base, seed, density=0.5) for seed in (1, 2)]
    for expert in experts:
        # 1, half a float32 step, and pieces of half a float64 step: grouping them decides which way the float32 sum rounds.
        v = rng.choice([0.0, 2.0**-53], (61, 33))
        v[0], v[1] = 1.0, 2.0**-24
        expert.v["model.layers.0.self_attn.q_proj.weight"][:] = v
    recipe = ota_recipe(tmp_path, base, experts, parameters)
    whole, _ = run_merge(recipe, tmp_path / "whole")
    for block in (1, 66, 100, 700):
        same_bits(run_merge(recipe, tmp_path / f"b{block}", block_elements=block)[0], whole)


@pytest.mark.parametrize("method", METHODS)
def test_shard_layout_of_the_inputs_changes_no_bit(tmp_path: Path, method: str) -> None:
    whole, _ = run_merge(recipe_of(tmp_path / "one", method), tmp_path / "out1")
    same_bits(run_merge(recipe_of(tmp_path / "three", method, shards=3), tmp_path / "out3")[0], whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_output_dtype_is_cast_last(tmp_path: Path, method: str, dtype: str) -> None:
    recipe = recipe_of(tmp_path, method)
    wide, _ = run_merge({**recipe, "out_dtype": "float32"}, tmp_path / "wide")
    narrow, _ = run_merge({**recipe, "dtype": dtype}, tmp_path / "narrow")
    written = Checkpoint(tmp_path / "narrow")
    assert {written.info(n).dtype for n in written.names()} == {NAMED[dtype]}
    want = rounded(wide, getattr(torch, dtype))
    for name in BASE:
        # The engine rounds once, from float64; from float32 a tie may fall the other way.
        step = np.abs(want[name]) * (2**-7 if dtype == "bfloat16" else 2**-10)
        different = narrow[name] != want[name]
        assert different.mean() <= 0.02 and (np.abs(narrow[name] - want[name]) <= step + 1e-7).all(), name


def test_a_bool_or_integer_tensor_is_copied(tmp_path: Path) -> None:
    base: dict[str, Any] = {**BASE, "model.position_ids": np.arange(6)}
    expert = random_expert(BASE, 1)
    experts = [replace(expert, weights={**expert.weights, "model.position_ids": np.arange(6)})]
    run_merge(ota_recipe(tmp_path, base, experts), tmp_path / "out")
    copied = Checkpoint(tmp_path / "out").read_rows("model.position_ids", 0, 6)
    assert copied.dtype == I64 and copied.held[:, 0].tolist() == list(range(6))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["ota", "linear", "ties"])
def test_types_that_no_compiled_pass_loads_are_merged_all_the_same(tmp_path: Path, method: str, dtype: torch.dtype) -> None:
    """float8 and float64 go through tensors: the same numbers as checkpoints that hold the same values in float32."""
    base = rounded(BASE, dtype)
    experts = [replace(expert, weights=rounded(expert.weights, dtype)) for expert in EXPERTS]
    found = []
    for name, stored in (("stored", dtype), ("single", torch.float32)):
        recipe = ota_recipe(
            tmp_path / name, base, experts, METHODS[method], method=method, top={"dtype": "float32"}, dtype=stored
        )
        found.append(run_merge(recipe, tmp_path / f"{name}-out")[0])
    assert all(np.array_equal(found[0][name], found[1][name]) for name in BASE)
