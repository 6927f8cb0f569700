"""Methods that came from mergekit, against mergekit 0.1.5 itself: tensors of one, two and three axes, computed there in float64.

Only its public entry point ``merge_tensors`` is called.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import ota_recipe, random_base, random_experts, rounded, run_merge
from tests.reference import Expert, Tensors

pytest.importorskip("mergekit", reason="the oracle is a development dependency")

STORED = [torch.float32, torch.bfloat16]


def by_mergekit(
    method: str, base: Tensors | None, experts: Sequence[Tensors], own: dict[str, list[float]], parameters: dict[str, Any]
) -> dict[str, Any]:
    from mergekit.merge_methods import merge_tensors

    first = 0 if base is None else 1
    asked = parameters | {key: {first + i: value for i, value in enumerate(values)} for key, values in own.items()}
    found = {}
    for name in experts[0]:
        models = [*([base] if base else []), *experts]
        tensors = [torch.tensor(model[name], dtype=torch.float64) for model in models]
        ids = list(range(len(tensors)))
        merged = merge_tensors(tensors, method, parameters=asked, ids=ids, base_index=None if base is None else 0)
        found[name] = merged.numpy()
    return found


def models_of(seed: int, count: int, stored: torch.dtype, *, apart: bool = False) -> tuple[Tensors, list[Expert]]:
    """Base and experts, of values that the type holds; ``apart``: experts that are no relatives, at angles of all sizes."""
    base = random_base(seed)
    experts = random_experts(base, count)
    if apart:
        experts = [Expert(weights=random_base(seed + 10 + i)) for i in range(count)]
    return rounded(base, stored), [Expert(weights=rounded(one.weights, stored)) for one in experts]


def compare(
    tmp: Path, method: str, base: Tensors | None, experts: list[Expert], own: dict[str, list[float]] | None = None,
    parameters: dict[str, Any] | None = None, *, ours: dict[str, Any] | None = None, stored: torch.dtype = torch.float32, steps: float = 1.0,
) -> Tensors:  # fmt: skip
    """Both on the same tensors; ours is theirs, rounded once to float32. ``ours``: parameters that are spelled or placed otherwise here."""
    own, parameters = own or {}, parameters or {}
    want = by_mergekit(method, base, [one.weights for one in experts], own, parameters)
    asked = ota_recipe(tmp, base, experts, parameters if ours is None else ours, method=method, dtype=stored)
    for i, model in enumerate(asked["models"]):
        model["parameters"] |= {key: values[i] for key, values in own.items()}
    got = run_merge({**asked, "dtype": "float32"}, tmp / "out")[0]
    assert sorted(got) == sorted(want)
    for name, value in want.items():
        scale = np.abs(value) + (np.abs(base[name]) if base is not None else 0)
        wrong = np.abs(got[name] - value) > steps * 2.0**-23 * scale + 1e-37
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.size} differ, by up to {np.abs(got[name] - value).max():.3g}"
        )
    # An oracle that returned one of its inputs for every method would prove nothing; a sum of one expert alone is that expert.
    assert len(experts) == 1 or any((got[name] != experts[0].weights[name]).any() for name in got)
    return got


WEIGHTS = [[1.0, 1.0, 1.0], [1.0, 0.5, 2.0], [1.0, -0.5, 0.3]]


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("parameters", [{}, {"normalize_weights": False}, {"eps": 0.01}])
@pytest.mark.parametrize("with_base", [True, False])
def test_multislerp(
    tmp_path: Path, stored: torch.dtype, weights: list[float], parameters: dict[str, Any], with_base: bool
) -> None:
    base, experts = models_of(1, 3, stored)
    compare(tmp_path, "multislerp", base if with_base else None, experts, {"weight": weights}, parameters, stored=stored)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [1.0, 3.0], [2.0, -1.0], [1.0, -1.0]])
@pytest.mark.parametrize("row_wise", [True, False])
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("with_base", [True, False])
def test_nuslerp(tmp_path: Path, weights: list[float], row_wise: bool, flatten: bool, with_base: bool) -> None:
    base, experts = models_of(2, 2, torch.float32, apart=not with_base)
    parameters = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    compare(tmp_path, "nuslerp", base if with_base else None, experts, {"weight": weights}, parameters, steps=4)


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("parameters", [{}, {"max_iter": 1}, {"max_iter": 0}, {"max_iter": 40, "tol": 1e-9}])
@pytest.mark.parametrize("apart", [True, False])
def test_karcher(tmp_path: Path, count: int, parameters: dict[str, Any], apart: bool) -> None:
    _, experts = models_of(3, count, torch.float32, apart=apart)
    compare(tmp_path, "karcher", None, experts, parameters=parameters)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("filter_wise", [True, False])
def test_model_stock(tmp_path: Path, stored: torch.dtype, count: int, filter_wise: bool) -> None:
    base, experts = models_of(4, count, stored)
    # What all experts share: without it, their edits are at right angles and the ratio is about 0.
    shared = random_experts(base, 1, still=0.0)[0].weights
    moved = [{name: value + shared[name] - base[name] for name, value in one.weights.items()} for one in experts]
    experts = [Expert(weights=rounded(one, stored)) for one in moved]
    compare(tmp_path, "model_stock", base, experts, parameters={"filter_wise": filter_wise}, stored=stored, steps=4)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("t", [0.0, 1e-4, 0.01, 5.0])
def test_nearswap(tmp_path: Path, stored: torch.dtype, t: float) -> None:
    base, experts = models_of(5, 1, stored)
    if t in {0.0, 5.0}:  # the base, and the other model, to the bit
        got = run_merge(
            {**ota_recipe(tmp_path, base, experts, {"t": t}, method="nearswap"), "dtype": "float32"}, tmp_path / "out"
        )[0]
        assert all((got[n] == (base if t == 0 else experts[0].weights)[n]).all() for n in base)
        return
    compare(tmp_path, "nearswap", base, experts, parameters={"t": t}, stored=stored)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("apart", [True, False])
def test_arcee_fusion(tmp_path: Path, stored: torch.dtype, apart: bool) -> None:
    base, experts = models_of(6, 1, stored, apart=apart)
    compare(tmp_path, "arcee_fusion", base, experts, stored=stored)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("parameters", [{}, {"epsilon": 0.02}])
def test_ram(tmp_path: Path, stored: torch.dtype, parameters: dict[str, Any]) -> None:
    base, experts = models_of(7, 3, stored)
    compare(tmp_path, "ram", base, experts, parameters=parameters, stored=stored)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("parameters", [{}, {"epsilon": 0.02, "r": 0.5}, {"epsilon": 0.03, "r": 1.0, "alpha": 5.0}])
def test_ramplus(tmp_path: Path, stored: torch.dtype, parameters: dict[str, Any]) -> None:
    base, experts = models_of(8, 3, stored)
    compare(tmp_path, "ramplus_tl", base, experts, parameters=parameters, stored=stored)


@pytest.mark.parametrize("topk", [1.0, 0.77, 0.5, 0.1, 0.02])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_sce(tmp_path: Path, topk: float, count: int) -> None:
    base, experts = models_of(9, count, torch.float32)
    compare(tmp_path, "sce", base, experts, parameters={"select_topk": topk})
