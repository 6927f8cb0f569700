"""Names of second moments as the commands meet them: errors are alike in ``compress``, ``inspect`` and ``plan``, and notes are said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ota_core.moments import open_moments
from tests.flows.cli.typed import refused, said
from tests.tasks.merging.test_conversion import train
from tests.tasks.merging.tiny_architectures import MODELS


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A base and an expert of which the last layer's gate alone was trained: up beside it has the same shape."""
    model = MODELS["llama"]()
    model.save_pretrained(tmp_path / "base")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp.gate_proj" in name)
    train(model, tmp_path / "expert")
    return tmp_path


def recipe(folder: Path, **more: Any) -> Path:
    path = folder / "recipe.yaml"
    text = {
        "merge_method": "ota",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "expert")}],
        "parameters": {"density": 0.5},
        "dtype": "float32",
    } | more
    path.write_text(yaml.safe_dump(text))
    return path


def test_frozen_parameters_are_told_by_the_base(folders: Path):
    text = refused("compress", folders / "expert", folders / "out.safetensors", "--home", folders / "home")
    assert "some parameters were frozen" in text and "--base" in text
    assert not (folders / "out.safetensors").exists()
    said(
        "compress",
        folders / "expert",
        folders / "out.safetensors",
        "--base",
        folders / "base",
        "--method",
        "none",
        "--home",
        folders / "home",
    )
    assert list(open_moments(folders / "out.safetensors").shapes()) == ["model.layers.1.mlp.gate_proj.weight"]
    assert "no problems found" in said("plan", recipe(folders), "--home", folders / "home")
    said("merge", recipe(folders), folders / "merged", "--home", folders / "home")
    merged, base = load_file(folders / "merged" / "model.safetensors"), load_file(folders / "base" / "model.safetensors")
    assert [name for name in merged if not torch.equal(merged[name], base[name])] == ["model.layers.1.mlp.gate_proj.weight"]


def test_names_that_match_nothing_are_refused_by_every_command(folders: Path):
    expert = folders / "expert"
    (expert / "optimizer.pt").unlink()
    save_file({"transformer.h.0.weight": torch.ones(8, 8)}, expert / "exp_avg_sq.safetensors")
    for command in (
        ("compress", expert, folders / "out.safetensors"), ("compress", expert / "exp_avg_sq.safetensors", folders / "out.safetensors"),
        ("inspect", expert), ("inspect", expert / "exp_avg_sq.safetensors"), ("plan", recipe(folders)), ("merge", recipe(folders), folders / "merged"),
    ):  # fmt: skip
        text = refused(*command, "--home", folders / "home")
        assert "1 of its 1 names are no tensors of the weights (transformer.h.0.weight)" in " ".join(text.split()), command
    assert not (folders / "out.safetensors").exists() and not (folders / "merged").exists()


def test_an_expert_with_the_prefixes_of_a_wrapper_merges(folders: Path):
    expert = folders / "expert"
    (expert / "optimizer.pt").unlink()
    weights = load_file(expert / "model.safetensors")
    save_file({f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, expert / "model.safetensors")
    save_file(
        {f"module._orig_mod.{name}": torch.ones_like(tensor) for name, tensor in weights.items()},
        expert / "exp_avg_sq.safetensors",
    )
    said("merge", recipe(folders), folders / "merged", "--home", folders / "home")
    assert load_file(folders / "merged" / "model.safetensors").keys() == weights.keys()


def test_the_checkpoint_that_was_taken_is_said(folders: Path):
    expert = folders / "expert"
    train(MODELS["llama"](), expert)
    for step, scale in ((10, 2.0), (20, 1.0), (30, 3.0)):
        place = expert / f"checkpoint-{step}"
        place.mkdir()
        weights = load_file(expert / "model.safetensors")
        save_file({name: tensor * scale for name, tensor in weights.items()}, place / "model.safetensors")
        shutil.copy(expert / "optimizer.pt", place)
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (expert / "optimizer.pt").unlink()
    note = "second moments of checkpoint-20, which holds the same weights (2 other checkpoints left aside)"
    assert f"note: {note}" in said("compress", expert, folders / "out.safetensors", "--home", folders / "home")
    assert note in said("inspect", expert, "--home", folders / "home")
    assert f"note: expert: {note}" in said("plan", recipe(folders), "--home", folders / "home")
