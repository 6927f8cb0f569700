"""Slices, gradients and filters in the engine: the same bits on every layout, and what a density means where it differs between tensors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ota_core.engine import engine
from ota_core.engine.shards import (
    MergeInParts,
    finish,
    merge_shard,
    needs_survey,
    opened_bins,
    shard_files,
    shard_scales,
    survey,
    whole_facts,
    with_scales,
)
from ota_core.engine.survey import Survey
from ota_core.methods.numbers import kept_count
from ota_core.plan.inputs import resolve_local
from ota_core.plan.prepare import WholeFacts
from ota_core.plan.sliced.layers import numbered, positions, with_layers
from ota_core.recipe.recipe import MergeRecipe, parse_recipe
from tests.checkpoints import random_base, random_experts, read_tensors, write_checkpoint
from tests.reference import Tensors
from tests.tiny_models import perturb, write_tiny_llama

BASE = random_base()
EXPERTS = random_experts(BASE, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("varied")
    write_checkpoint(root / "base", BASE)
    for i, expert in enumerate(EXPERTS):
        write_checkpoint(root / f"e{i}", expert.weights)
        save_file({name: torch.tensor(v) for name, v in expert.v.items()}, root / f"e{i}" / "exp_avg_sq.safetensors")
    return root


def recipe(folder: Path, parameters: dict[str, Any], *own: dict[str, Any], method: str = "ota") -> MergeRecipe:
    models = [{"model": str(folder / f"e{i}"), "parameters": p} for i, p in enumerate(own)]
    return parse_recipe({"merge_method": method, "base_model": str(folder / "base"), "models": models, "parameters": parameters})


def in_parts(asked: MergeRecipe, tmp: Path) -> Tensors:
    """Shard by shard, with surveys that travel through files."""
    job = MergeInParts(recipe=asked, inputs=resolve_local(asked), shard_size=300)
    files, whole = shard_files(job), None
    assert len(files) > 2
    if needs_survey(asked, job.inputs):
        for i, file in enumerate(files):
            survey(job, file).save(tmp / f"{i}")
        first = Survey.sum([Survey.load(tmp / f"{i}") for i in range(len(files))])
        bins = opened_bins(job, first)
        second = Survey.sum([survey(job, file, opened=bins) for file in files]) if bins else None
        whole = WholeFacts.model_validate_json(whole_facts(job, first, second).model_dump_json())
    if asked.auto:
        whole = with_scales(whole, [shard_scales(job, file, whole) for file in files])
    out = tmp / "parts"
    out.mkdir()
    finish(job, out, [merge_shard(job, file, out, whole) for file in files])
    return read_tensors(out)


CASES: list[tuple[dict[str, Any], tuple[dict[str, Any], dict[str, Any]]]] = [
    ({"density": [{"filter": "mlp", "value": 0.3}, {"value": 0.5}]}, ({}, {"density": 0.2})),
    ({"density": [0.1, 0.9]}, ({"scaling_factor": [1, 2]}, {"density": 1})),
    ({"density": 0.4, "normalise": "global", "power": [0.3, 0.5]}, ({}, {})),
    ({"precond_threshold": [{"filter": "mlp", "value": 1e-14}], "rescale": True}, ({}, {})),
    ({"density": [0.1, 0.9], "lambda": "auto"}, ({}, {"weight": 2})),
    ({"density": [0.1, 0.9], "masked_merge": "ties", "ties_density": 0.5, "denominator": "all"}, ({}, {})),
]


@pytest.mark.parametrize("parameters, own", CASES)
def test_the_same_bits_on_every_layout(folder: Path, tmp_path: Path, parameters: dict[str, Any], own: Any) -> None:
    asked = recipe(folder, parameters, *own)
    small = engine.merge(asked, tmp_path / "small", threads=1, block_elements=20)
    large = engine.merge(asked, tmp_path / "large", threads=3)
    assert small.results == large.results
    one, other, spread = read_tensors(tmp_path / "small"), read_tensors(tmp_path / "large"), in_parts(asked, tmp_path)
    for name in BASE:
        assert (one[name] == other[name]).all() and (one[name] == spread[name]).all(), name
    assert any((one[name] != BASE[name]).any() for name in BASE)


def test_a_density_is_a_rank_among_the_tensors_that_share_it(folder: Path, tmp_path: Path) -> None:
    asked = recipe(folder, {"density": [{"filter": "mlp", "value": 0.3}, {"value": 0.5}]}, {})
    report = engine.merge(asked, tmp_path / "out").densities["e0"]
    for inside, density in ((True, 0.3), (False, 0.5)):
        names = [name for name in BASE if ("mlp" in name) is inside]
        kept = sum(round(report["per_tensor"][name] * BASE[name].size) for name in names)
        assert kept == kept_count(density, sum(BASE[name].size for name in names))
    merged = read_tensors(tmp_path / "out")
    scores = {name: np.sqrt(EXPERTS[0].v[name]) * np.abs(EXPERTS[0].weights[name] - BASE[name]) for name in BASE}
    for name in BASE:
        kept_here = merged[name] != BASE[name]
        if kept_here.any() and not kept_here.all():
            assert scores[name][kept_here].min() >= scores[name][~kept_here].max()


def test_equal_values_in_lists_are_the_single_value(folder: Path, tmp_path: Path) -> None:
    engine.merge(recipe(folder, {"density": 0.4}, {}, {}), tmp_path / "single")
    engine.merge(recipe(folder, {"density": [0.4, 0.4]}, {}, {}), tmp_path / "listed")
    one, other = read_tensors(tmp_path / "single"), read_tensors(tmp_path / "listed")
    assert all((one[name] == other[name]).all() for name in BASE)


@pytest.mark.parametrize("metric", ["magnitude", "fisher"])
def test_a_graft_is_the_expert_where_its_mask_keeps_it(folder: Path, tmp_path: Path, metric: str) -> None:
    raw = {
        "merge_method": "ffg", "base_model": str(folder / "base"), "parameters": {"density": 0.3, "metric": metric},
        "models": [{"model": str(folder / "base")}, {"model": str(folder / "e0")}],
    }  # fmt: skip
    report = engine.merge(parse_recipe(raw), tmp_path / "graft")
    merged, total = read_tensors(tmp_path / "graft"), sum(x.size for x in BASE.values())
    assert report.densities["e0"]["kept"] == kept_count(0.3, total)
    taken = {name: merged[name] == EXPERTS[0].weights[name] for name in BASE}
    assert all((taken[name] | (merged[name] == BASE[name])).all() for name in BASE)
    edits = {name: np.abs(EXPERTS[0].weights[name].astype(float) - BASE[name]) for name in BASE}
    if metric == "magnitude":
        changed = np.concatenate([(merged[name] != BASE[name]).ravel() for name in BASE])
        sizes = np.concatenate([edits[name].ravel() for name in BASE])
        assert sizes[changed].min() >= sizes[~changed].max()


def test_where_layers_stand() -> None:
    assert numbered("model.layers.3.mlp.up_proj.weight") == ("model.layers", 3, "mlp.up_proj.weight")
    assert numbered("encoder.block.1.layer.0.SelfAttention.q.weight") == ("encoder.block", 1, "layer.0.SelfAttention.q.weight")
    assert numbered("transformer.h.11.ln_1.weight") == ("transformer.h", 11, "ln_1.weight")
    assert numbered("model.norm.weight") is None
    found = positions(["a.layers.0.x", "a.layers.1.x", "a.layers.2.x", "b.layers.0.x", "head"])
    assert found == {"a.layers.0.x": 0.0, "a.layers.1.x": 0.5, "a.layers.2.x": 1.0, "b.layers.0.x": 1.0, "head": 0.0}


@pytest.mark.parametrize(
    "config, stack, key",
    [
        ({"num_hidden_layers": 3, "layer_types": ["a", "b", "c"], "mlp_only_layers": [1]}, "model.layers", "num_hidden_layers"),
        ({"n_layer": 3}, "transformer.h", "n_layer"),
        ({"num_layers": 3, "num_decoder_layers": 9}, "encoder.block", "num_layers"),
        ({"num_layers": 9, "num_decoder_layers": 3}, "decoder.block", "num_decoder_layers"),
    ],
)
def test_a_configuration_follows_the_layers(config: dict[str, Any], stack: str, key: str) -> None:
    changed = with_layers(config, {stack: [0, 1, 1, 2]})
    assert changed[key] == 4
    if "layer_types" in config:
        assert changed["layer_types"] == ["a", "b", "b", "c"] and changed["mlp_only_layers"] == [1, 2]
    nested = with_layers({"text_config": {"num_hidden_layers": 3}}, {"language_model.model.layers": [2]})
    assert nested == {"text_config": {"num_hidden_layers": 1}}


def test_an_encoder_keeps_its_layers_where_the_decoder_is_cut(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    names = ["shared.weight", *(f"{part}.block.{i}.layer.0.q.weight" for part in ("encoder", "decoder") for i in range(3))]
    for one in ("a", "b"):
        write_checkpoint(tmp_path / one, {name: rng.normal(0, 1, (4, 4)).astype(np.float32) for name in names})
        config = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "num_layers": 3, "num_decoder_layers": 3}
        (tmp_path / one / "config.json").write_text(json.dumps(config))
    raw = {
        "merge_method": "linear",
        "modules": {
            "encoder": {"models": [{"model": str(tmp_path / "a")}]},
            "decoder": {"slices": [{"sources": [{"model": str(tmp_path / "b"), "layer_range": [1, 3]}]}]},
        },
    }
    engine.merge(parse_recipe(raw), tmp_path / "out")
    merged, a, b = (read_tensors(tmp_path / one) for one in ("out", "a", "b"))
    assert (merged["decoder.block.0.layer.0.q.weight"] == b["decoder.block.1.layer.0.q.weight"]).all()
    assert "decoder.block.2.layer.0.q.weight" not in merged
    assert (merged["encoder.block.2.layer.0.q.weight"] == a["encoder.block.2.layer.0.q.weight"]).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == (3, 2)


@pytest.mark.parametrize("more", [{}, {"compression": "rank1"}, {"lambda": "auto"}, {"rescale": True}])
def test_slices_that_give_every_layer_are_the_whole_merge(tmp_path: Path, more: dict[str, Any]) -> None:
    base = write_tiny_llama(tmp_path / "base", layers=4, vocab=104)
    sources = []
    for seed in (1, 2):
        folder = perturb(base, tmp_path / f"e{seed}", seed=seed)
        generator = torch.Generator().manual_seed(seed)
        v = {name: 1e-20 * torch.rand(x.shape, generator=generator) for name, x in read_tensors(folder).items()}
        save_file(v, folder / "exp_avg_sq.safetensors")
        sources.append({"model": str(folder), "parameters": {"density": 0.3 * seed}})
    common = {"merge_method": "ota", "base_model": str(base), "parameters": {"scope": "per_tensor"} | more}
    slices = [{"sources": [{**one, "layer_range": [a, a + 2]} for one in sources]} for a in (0, 2)]
    reports = [
        engine.merge(parse_recipe(common | {"models": sources}), tmp_path / "whole"),
        engine.merge(parse_recipe(common | {"slices": slices}), tmp_path / "sliced"),
    ]
    whole, sliced = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "sliced")
    assert all((whole[name] == sliced[name]).all() for name in whole)
    assert reports[0].densities == reports[1].densities
