"""mergekit 0.1.5 as an oracle for its dialect: slices, gradients, filters, the base among the models; the same recipe through both."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import read_tensors, run_merge
from tests.ota_core.methods.test_mergekit_parity import by_mergekit
from tests.tiny_models import perturb, write_tiny_llama

pytest.importorskip("mergekit", reason="the oracle is a development dependency")
LAYERS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("dialect")
    made = {"base": write_tiny_llama(root / "base", seed=0, vocab=128, layers=LAYERS)}
    for m, scale in enumerate((0.02, 0.05), 1):
        made[f"e{m}"] = perturb(made["base"], root / f"e{m}", seed=m, scale=scale)
    yield made


def compare(recipe: dict[str, Any], tmp: Path) -> dict[str, Any]:
    """Both on the same recipe; mergekit computes in float32, so a few steps of the largest weight may differ. Returns the two configurations."""
    recipe = {**recipe, "dtype": "float32"}
    theirs, ours = by_mergekit(recipe, tmp / "theirs"), run_merge(recipe, tmp / "ours")[0]
    assert sorted(ours) == sorted(theirs)
    for name, want in theirs.items():
        allowed = 1e-6 * max(1.0, float(np.abs(want).max()))
        assert np.abs(ours[name] - want).max() <= allowed, f"{name}: by up to {np.abs(ours[name] - want).max():.3g}"
    configs = [json.loads((tmp / one / "config.json").read_text()) for one in ("theirs", "ours")]
    assert configs[0]["num_hidden_layers"] == configs[1]["num_hidden_layers"]
    return configs[1]


def models(folders: dict[str, Path], *own: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"model": str(folders[f"e{m}"]), "parameters": p} for m, p in enumerate(own, 1)]


MIXED = [{"filter": "self_attn", "value": [0.1, 0.5, 0.3, 0.9]}, {"filter": "mlp", "value": [1, 0.2]}, {"value": 0.5}]
ALL_FOUR = [
    (MIXED, 1),
    ([0.2, 0.9, 0.4], [{"filter": "mlp", "value": 0.3}, {"value": 0.7}]),
    ([{"filter": "*", "value": 0.3}], [0.1, 1]),
]


@pytest.mark.parametrize("one, other", ALL_FOUR)
def test_weights_by_layer_and_filter(folders: dict[str, Path], tmp_path: Path, one: Any, other: Any) -> None:
    compare({"merge_method": "linear", "models": models(folders, {"weight": one}, {"weight": other})}, tmp_path)


@pytest.mark.parametrize(
    "method, parameters",
    [
        ("task_arithmetic", {"normalize": True}),
        ("task_arithmetic", {"lambda": 0.7}),
        ("ties", {"normalize": False}),
        ("breadcrumbs", {"gamma": 0.05}),
        ("breadcrumbs_ties", {"gamma": 0.05, "density": 0.6}),
    ],
)
def test_densities_by_layer_and_filter(folders: dict[str, Path], tmp_path: Path, method: str, parameters: dict[str, Any]) -> None:
    own: list[dict[str, Any]] = [{"weight": MIXED}, {"weight": [0.2, 1]}]
    if method != "task_arithmetic":
        own = [{"weight": MIXED, "density": [1, 0.7, 0.1]}, {"weight": [0.2, 1], "density": [{"filter": "mlp", "value": 0.4}]}]
        parameters = {"density": 0.8} | parameters
    compare(
        {"merge_method": method, "base_model": str(folders["base"]), "models": models(folders, *own), "parameters": parameters},
        tmp_path,
    )


def test_a_filter_that_fits_nothing_leaves_the_next_level(folders: dict[str, Path], tmp_path: Path) -> None:
    own = ({"weight": [{"filter": "mlp", "value": 1}]}, {"weight": [{"filter": "self_attn", "value": [0, 1]}, {"value": 1}]})
    compare({"merge_method": "linear", "models": models(folders, *own), "parameters": {"weight": 3}}, tmp_path)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear", "breadcrumbs"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_base_among_the_models_has_no_edit(folders: dict[str, Path], tmp_path: Path, method: str, normalize: bool) -> None:
    listed = [{"model": str(folders["base"]), "parameters": {"weight": 5}}, *models(folders, {"weight": 1}, {"weight": 0.5})]
    density = {} if method == "task_arithmetic" else {"density": 1.0 if method == "dare_linear" else 0.5}
    recipe = {
        "merge_method": method,
        "base_model": str(folders["base"]),
        "models": listed,
        "parameters": {"normalize": normalize} | density,
    }
    compare(recipe, tmp_path)


def source(folder: Path, layers: list[int], **parameters: Any) -> dict[str, Any]:
    return {"model": str(folder), "layer_range": layers} | ({"parameters": parameters} if parameters else {})


def test_slerp_by_filters_on_slices(folders: dict[str, Path], tmp_path: Path) -> None:
    """mergekit's gradient-slerp example."""
    slices = [{"sources": [source(folders["e1"], [0, LAYERS]), source(folders["e2"], [0, LAYERS])]}]
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    compare(
        {"merge_method": "slerp", "base_model": str(folders["e1"]), "slices": slices, "parameters": {"t": t}},
        tmp_path,
    )


def test_more_layers_than_any_model_has(folders: dict[str, Path], tmp_path: Path) -> None:
    """mergekit's orcamini-platy-44layer example; what comes before the layers is the first slice's, what comes behind them the last one's."""
    slices = [{"sources": [source(folders["e1"], [0, 3])]}, {"sources": [source(folders["e2"], [1, 4])]}]
    compare({"merge_method": "linear", "slices": slices, "parameters": {"weight": 1.0}}, tmp_path)
    assert "model.layers.5.mlp.up_proj.weight" in read_tensors(tmp_path / "ours")


def test_slices_with_parameters_at_every_level(folders: dict[str, Path], tmp_path: Path) -> None:
    slices = [
        {
            "sources": [source(folders["e1"], [0, 3], weight=[1, 0]), source(folders["e2"], [1, 4])],
            "parameters": {"weight": [0.2, 0.7]},
        },
        {"sources": [source(folders["e1"], [3, 4]), source(folders["e2"], [0, 1], weight=[{"filter": "mlp", "value": 0.3}])]},
        {"sources": [source(folders["e1"], [2, 4], weight=MIXED), source(folders["e2"], [2, 4], weight=2)]},
    ]
    compare({"merge_method": "linear", "slices": slices, "parameters": {"weight": [0.4, 0.9]}}, tmp_path)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_slices_of_edits_with_the_base_among_the_sources(folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    def one(base: list[int], first: list[int], second: list[int]) -> list[dict[str, Any]]:
        return [
            source(folders["base"], base),
            source(folders["e1"], first, weight=1),
            source(folders["e2"], second, weight=[0.1, 0.8]),
        ]

    slices = [
        {"sources": one([0, 2], [0, 2], [0, 2])},
        {"sources": one([1, 4], [1, 4], [1, 4]), "parameters": {"normalize": True}},
    ]
    density = {} if method == "task_arithmetic" else {"density": 0.6}
    compare({"merge_method": method, "base_model": str(folders["base"]), "slices": slices, "parameters": density}, tmp_path)


def test_the_same_model_above_itself(folders: dict[str, Path], tmp_path: Path) -> None:
    slices = [{"sources": [source(folders["e1"], [0, 2])]}, {"sources": [source(folders["e1"], [1, 4])]}]
    compare({"merge_method": "linear", "slices": slices, "parameters": {"weight": 1.0}}, tmp_path)
