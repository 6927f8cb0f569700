"""mergekit 0.1.5 as an oracle: the same tiny Llama folders through its entry point and through the engine, to float32 rounding.

Only this file imports mergekit, and only its public entry points are called.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import read_tensors, run_merge
from tests.reference import Tensors
from tests.tiny_models import perturb, write_tiny_llama

pytest.importorskip("mergekit", reason="the oracle is a development dependency")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("parity")
    made = {"base": write_tiny_llama(root / "base", seed=0, vocab=128)}
    for m, scale in enumerate((0.02, 0.05, 0.01), 1):
        made[f"e{m}"] = perturb(made["base"], root / f"e{m}", seed=m, scale=scale)
    made["far"] = write_tiny_llama(root / "far", seed=9, vocab=128)
    made["sharded"] = write_tiny_llama(root / "sharded", seed=0, vocab=128, max_shard_size="20KB")
    yield made


def by_mergekit(recipe: dict[str, Any], out: Path) -> Tensors:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions
    from mergekit.merge import run_merge as mergekit_run

    mergekit_run(
        MergeConfiguration.model_validate(recipe),
        str(out),
        MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True),
    )
    return read_tensors(out)


def compare(recipe: dict[str, Any], folders: dict[str, Path], tmp: Path, steps: float = 4) -> None:
    """Both on the same recipe. mergekit computes in float32, so a few steps of the largest weight may differ."""
    theirs, ours = by_mergekit(recipe, tmp / "theirs"), run_merge(recipe, tmp / "ours")[0]
    assert sorted(ours) == sorted(theirs)
    base = read_tensors(folders["base"])
    for name, want in theirs.items():
        scale = np.maximum(np.abs(want), np.abs(base[name]))
        allowed = steps * 1.2e-7 * (scale + np.abs(want - base[name]).max())
        wrong = np.abs(ours[name] - want) > allowed
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.size} differ, by up to {np.abs(ours[name] - want).max():.3g}"
        )
    # An oracle that returned the base, or the same thing for every method, would prove nothing.
    assert any((theirs[n] != base[n]).any() for n in base)


def recipe(
    folders: dict[str, Path], method: str, own: list[dict[str, Any]], parameters: dict[str, Any] | None = None
) -> dict[str, Any]:
    models = [{"model": str(folders[f"e{m}"]), "parameters": p} for m, p in enumerate(own, 1)]
    return {
        "merge_method": method,
        "base_model": str(folders["base"]),
        "models": models,
        "parameters": parameters or {},
        "dtype": "float32",
    }


WEIGHTS = [{"weight": 1.0}, {"weight": 0.5}, {"weight": 1.7}]
SIGNED = [{"weight": 1.0}, {"weight": -0.5}, {"weight": 0.3}]
DENSITIES = [0.001, 0.1, 0.35, 0.57, 0.9, 1.0]


def with_each(own: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    return [{**p, **more} for p in own]


@pytest.mark.parametrize("parameters", [{}, {"normalize": False}, {"normalize": True}])
@pytest.mark.parametrize("own", [WEIGHTS, SIGNED])
def test_linear(folders: dict[str, Path], tmp_path: Path, own: list[dict[str, Any]], parameters: dict[str, Any]) -> None:
    asked = recipe(folders, "linear", own, parameters)
    del asked["base_model"]
    compare(asked, folders, tmp_path)


@pytest.mark.parametrize("parameters", [{}, {"lambda": 0.6}, {"normalize": True}, {"normalize": True, "lambda": 2.0}])
@pytest.mark.parametrize("own", [WEIGHTS, SIGNED])
def test_task_arithmetic(folders: dict[str, Path], tmp_path: Path, own: list[dict[str, Any]], parameters: dict[str, Any]) -> None:
    compare(recipe(folders, "task_arithmetic", own, parameters), folders, tmp_path)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("parameters", [{}, {"normalize": False, "lambda": 0.8}])
@pytest.mark.parametrize("own", [WEIGHTS, SIGNED])
def test_ties(
    folders: dict[str, Path], tmp_path: Path, own: list[dict[str, Any]], parameters: dict[str, Any], density: float
) -> None:
    compare(recipe(folders, "ties", with_each(own, density=density), parameters), folders, tmp_path)


@pytest.mark.parametrize("density, gamma", [(0.1, 0.05), (0.5, 0.1), (0.57, 0.29), (0.9, 0.01), (0.9, 0.1), (1.0, 0.1)])
@pytest.mark.parametrize("parameters", [{}, {"normalize": True, "lambda": 1.3}])
@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs(
    folders: dict[str, Path], tmp_path: Path, method: str, parameters: dict[str, Any], density: float, gamma: float
) -> None:
    compare(recipe(folders, method, with_each(WEIGHTS, density=density, gamma=gamma), parameters), folders, tmp_path)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("own", [WEIGHTS, SIGNED])
def test_rescale(folders: dict[str, Path], tmp_path: Path, own: list[dict[str, Any]], method: str) -> None:
    densities = [{**one, "density": density} for one, density in zip(own, (0.3, 0.6, 1.0), strict=True)]
    parameters = {"rescale": True, "normalize": method == "ties"} | ({} if method == "ties" else {"gamma": 0.1})
    compare(recipe(folders, method, densities, parameters), folders, tmp_path, steps=16)


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_default_gamma(folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    compare(recipe(folders, method, with_each(SIGNED, density=0.4)), folders, tmp_path)


@pytest.mark.parametrize("parameters", [{}, {"normalize": True, "lambda": 0.7}, {"rescale": False}])
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_at_density_one(folders: dict[str, Path], tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    """Below 1 the random masks are each program's own."""
    compare(recipe(folders, method, with_each(WEIGHTS, density=1.0), parameters), folders, tmp_path)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("other, base_first", [("far", True), ("far", False), ("e1", True)])
def test_slerp(folders: dict[str, Path], tmp_path: Path, t: float, other: str, base_first: bool) -> None:
    pair = [{"model": str(folders["base"])}, {"model": str(folders[other])}]
    asked = {
        "merge_method": "slerp", "base_model": str(folders["base"]), "models": pair if base_first else pair[::-1],
        "parameters": {"t": t}, "dtype": "float32",
    }  # fmt: skip
    if t == 0.0:
        ours, base = run_merge(asked, tmp_path / "ours")[0], read_tensors(folders["base"])
        assert all(np.allclose(ours[n], base[n], rtol=1e-6) for n in base)
        return
    compare(asked, folders, tmp_path)


def test_sharded_inputs_and_bfloat16_output(folders: dict[str, Path], tmp_path: Path) -> None:
    """mergekit casts its inputs to dtype and the result to out_dtype; we only ever cast the result."""
    asked = recipe(folders, "ties", with_each(WEIGHTS, density=0.3))
    asked["base_model"] = str(folders["sharded"])
    compare(asked, folders, tmp_path / "float32")
    asked = {**asked, "out_dtype": "bfloat16"}
    theirs, ours = by_mergekit(asked, tmp_path / "theirs"), run_merge(asked, tmp_path / "ours")[0]
    for name in theirs:
        assert (ours[name] == theirs[name]).mean() > 0.99, name
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2**-7, atol=1e-6)
