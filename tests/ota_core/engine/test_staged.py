"""A merge in one process and the same merge through files of moments and masks give the same bytes; so do other cuts of the same inputs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ota_core.artifact import read_record
from ota_core.engine import engine
from ota_core.errors import OtaError
from ota_core.files.checkpoint import SAFETENSORS_INDEX
from ota_core.plan.inputs import MergeInputs, resolve_local
from ota_core.recipe.recipe import MergeRecipe
from tests.checkpoints import with_compressed
from tests.ota_core.engine.test_output import add_moments, llama_experts, loaded
from tests.tiny_models import perturb, write_tiny_llama


def weights(folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert files
    return files


def staged(recipe: MergeRecipe, root: Path, *, expert_at_a_time: bool = False, **options: Any) -> tuple[Path, engine.MergeReport]:
    """Compress, mask and merge as separate stages, each from the files of the one before."""
    root.mkdir()
    inputs = with_compressed(resolve_local(recipe), root, recipe.setting("compression"), recipe.setting("rank"))
    experts = [*inputs.experts]
    if any(recipe.ffg(i) for i in range(len(experts))):
        (root / "masks").mkdir()
        for i, expert in enumerate(inputs.experts):
            if not recipe.ffg(i):
                continue
            if expert_at_a_time:
                part = recipe.model_copy(update={"models": (recipe.models[i],)})
                engine.mask(part, root / "masks", inputs=MergeInputs(base=inputs.base, experts=(expert,)), **options)
            else:
                engine.mask(recipe, root / "masks", inputs=inputs, only=expert.name, **options)
            experts[i] = replace(expert, masks=root / "masks" / f"{expert.name}.safetensors")
        inputs = replace(inputs, experts=tuple(experts))
    out = root / "out"
    out.mkdir()
    return out, engine.merge_into(out, recipe, inputs, **options)


OPTIONS: list[dict[str, Any]] = [
    {"density": 0.3},
    {"density": 0.3, "compression": "rank1"},
    {"density": 0.3, "scope": "per_tensor"},
    {"density": 0.3, "scope": "per_tensor", "compression": "rank1"},
    {"density": 0.3, "compression": "rank1", "mask_curvature": "full"},
    {"density": 0.3, "compression": "log8"},
    {"density": 0.3, "compression": "log8", "mask_curvature": "full", "normalise": "global"},
    {"density": 0.3, "compression": "rank_k", "rank": 2},
    {"density": 0.3, "compression": "rank_k", "scope": "per_tensor", "mask_curvature": "full"},
    {"density": 0.3, "mask_curvature": "full", "rescale": True},
    {"density": 0.3, "metric": "magnitude", "masked_merge": "ties"},
    {"density": 0.3, "normalise": "global", "compression": "rank1", "fallback": "mean"},
    {"precond_threshold": 1e-15, "bias_correction": True},
    {"compression": "rank1"},
    {"power": 0.31, "epsilon": 1e-9},
]


@pytest.mark.parametrize("parameters", OPTIONS, ids=str)
@pytest.mark.parametrize("tie", [False, True])
def test_staged_equals_fused(tmp_path: Path, parameters: dict[str, Any], tie: bool) -> None:
    raw = llama_experts(tmp_path, tie=tie)
    if tie:  # as some trainers save it: the alias is in the file too
        for folder in ("base", "expert0", "expert1"):
            file = tmp_path / folder / "model.safetensors"
            state = load_file(file)
            save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"})
    recipe = MergeRecipe.model_validate(raw | {"parameters": parameters, "dtype": "bfloat16"})
    report = engine.merge(recipe, tmp_path / "fused", threads=1)
    want = weights(tmp_path / "fused")
    assert want != weights(tmp_path / "base")
    for threads in (1, 2):
        out, other = staged(
            recipe, tmp_path / f"staged{threads}", threads=threads, expert_at_a_time=threads == 2, block_elements=threads * 96
        )
        assert weights(out) == want
        assert other.fingerprint == report.fingerprint and other.densities == report.densities
    if tie:
        state = load_file(tmp_path / "fused" / "model.safetensors")
        assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
        loaded(tmp_path / "fused")


def test_mixed_experts_with_and_without_a_mask(tmp_path: Path) -> None:
    raw = llama_experts(tmp_path, count=3)
    raw["parameters"] = {"compression": "rank1"}
    raw["models"][1]["parameters"] = {"density": 0.2}
    raw["models"][2]["parameters"] = {"density": 1.0}
    recipe = MergeRecipe.model_validate(raw)
    report = engine.merge(recipe, tmp_path / "fused")
    assert list(report.densities) == ["expert1"]
    out, _ = staged(recipe, tmp_path / "staged")
    assert sorted(p.name for p in (tmp_path / "staged" / "masks").iterdir()) == ["expert1.safetensors"]
    assert weights(out) == weights(tmp_path / "fused")


def test_compressed_moments_of_another_kind_are_refused(tmp_path: Path) -> None:
    raw, path = llama_experts(tmp_path), tmp_path / "v.safetensors"
    inputs = resolve_local(MergeRecipe.model_validate(raw))
    first, second = inputs.experts
    assert first.moments is not None
    given = replace(inputs, experts=(replace(first, moments=path), second))
    cases: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
        ({"method": "rank1"}, {}, "rank1", "none"),
        ({"method": "rank_k", "rank": 2}, {"compression": "rank_k", "rank": 3}, "rank_k with rank 2", "rank_k with rank 3"),
    ]
    for held, asked, label, wanted in cases:
        engine.compress_moments(first.moments, path, **held)
        message = f"v.safetensors holds second moments compressed with {label}; the recipe asks for compression: {wanted}"
        with pytest.raises(OtaError, match=message):
            engine.merge(MergeRecipe.model_validate(raw | {"parameters": asked}), tmp_path / "out", inputs=given)
        with pytest.raises(OtaError, match=f"is compressed with {label} already"):
            engine.compress_moments(path, tmp_path / "again", method="rank1")


@pytest.mark.parametrize("tie", [False, True])
def test_sharded_output_loads_and_holds_the_same_numbers(tmp_path: Path, tie: bool) -> None:
    recipe = MergeRecipe.model_validate(llama_experts(tmp_path, tie=tie))
    engine.merge(recipe, tmp_path / "one")
    many = tmp_path / "many"
    engine.merge(recipe, many, shard_size=8_000)
    shards = sorted(many.glob("model-*.safetensors"))
    assert len(shards) > 3 and (many / SAFETENSORS_INDEX).exists() and f"of-{len(shards):05d}" in shards[0].name
    single = load_file(tmp_path / "one" / "model.safetensors")
    together = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert sorted(single) == sorted(together) and all(torch.equal(single[name], together[name]) for name in single)
    assert all(sum(t.nbytes for t in load_file(shard).values()) <= 8_000 or len(load_file(shard)) == 1 for shard in shards)
    model = loaded(many)
    assert all(torch.equal(parameter, single[name]) for name, parameter in model.named_parameters())


def test_experts_of_another_storage_type_and_sharded_bases(tmp_path: Path) -> None:
    """bfloat16 files in shards, as models are published: the output has the base's type and one file."""
    base = write_tiny_llama(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="8KB")
    assert len(list(base.glob("model-*.safetensors"))) > 1
    expert = perturb(base, tmp_path / "expert", seed=1)
    add_moments(expert)
    raw = {"merge_method": "ota", "base_model": str(base), "models": [{"model": str(expert)}], "parameters": {"density": 1.0}}
    engine.merge(MergeRecipe.model_validate(raw), tmp_path / "out")
    want = {name: tensor for file in expert.glob("model-*.safetensors") for name, tensor in load_file(file).items()}
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[name], want[name]) for name in want) and got.keys() == want.keys()
    assert "model.safetensors.index.json" not in read_record(tmp_path / "out").files
    loaded(tmp_path / "out")
