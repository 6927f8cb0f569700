"""The benchmark's models are real checkpoints of the promised size and the same for the same seed."""

import hashlib
import math
from pathlib import Path

import pytest
import torch

from ota_core.errors import OtaError
from tasks.local.speed.models import MOMENTS, Models, Shape, build, bytes_on_disk, shape_of
from tests.checkpoints import read_tensors

TINY = Shape(hidden=64, layers=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build(tmp_path_factory.mktemp("bench") / "models", TINY, 2, seed=3)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".safetensors", ".json"})
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("billions", [0.0006, 0.001, 0.003, 0.01, 0.1, 0.45, 1.8, 8.0])
def test_sizes_are_what_they_are_called(billions: float) -> None:
    assert shape_of(billions).parameters == pytest.approx(billions * 1e9, rel=0.05)


def test_the_reference_size() -> None:
    shape = shape_of(0.45)
    assert (shape.hidden, shape.layers, shape.config().vocab_size) == (1024, 20, 65_536)


@pytest.mark.parametrize("billions", [0.0001, 0.0, -1.0, math.nan, math.inf])
def test_no_model_is_that_small(billions: float) -> None:
    with pytest.raises(OtaError, match=r"size: got .*0\.0006"):
        shape_of(billions)


def test_transformers_loads_it_whole(models: Models) -> None:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(models.expert(1), output_loading_info=True)
    assert {key: found for key, found in report.items() if found} == {}
    assert sum(p.numel() for p in model.parameters()) == TINY.parameters
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == TINY.tensors()
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_bytes_follow_from_seed_and_shape(models: Models, tmp_path: Path) -> None:
    again = build(tmp_path / "again", TINY, 3, seed=3)
    first = {name: digest for name, digest in digests(models.folder).items() if not name.startswith("bench-models")}
    assert first.items() <= digests(again.folder).items()  # a third expert leaves the others as they are
    other = digests(build(tmp_path / "other", TINY, 2, seed=4).folder)
    assert all(other[name] != digest for name, digest in first.items() if name.endswith(".safetensors"))


def test_what_is_there_is_kept_and_what_is_not_whole_is_replaced(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    build(folder, TINY, 2, seed=1)
    before = (folder / "base" / "model.safetensors").stat().st_mtime_ns
    assert build(folder, TINY, 2, seed=1).experts == 2
    assert (folder / "base" / "model.safetensors").stat().st_mtime_ns == before
    (folder / "bench-models.json").unlink()  # as after a kill
    build(folder, TINY, 2, seed=1)
    assert (folder / "base" / "model.safetensors").stat().st_mtime_ns != before


def test_edits_and_moments_look_like_training(models: Models) -> None:
    base, expert = read_tensors(models.base), read_tensors(models.expert(0))
    name = "model.layers.1.mlp.up_proj.weight"
    unmoved = float((base[name] == expert[name]).mean())
    assert 0.1 < unmoved < 0.6  # rounding to bfloat16 loses some edits
    from safetensors.torch import load_file

    v = load_file(models.expert(0) / MOMENTS)
    assert {key: tuple(tensor.shape) for key, tensor in v.items()} == TINY.tensors()
    assert all(tensor.dtype == torch.float32 and bool((tensor >= 0).all()) for tensor in v.values())
    zeros = sum(int((tensor == 0).sum()) for tensor in v.values()) / TINY.parameters
    assert zeros == pytest.approx(0.05, abs=0.005)
    rows = v[name].double().mean(dim=1)
    assert rows.max() > 5 * rows.min()  # a structure that rank1 has to find


def test_the_threshold_keeps_about_the_density(models: Models) -> None:
    from safetensors.torch import load_file

    base, expert, v = read_tensors(models.base), read_tensors(models.expert(0)), load_file(models.expert(0) / MOMENTS)
    scores = [v[n].double().numpy() * (expert[n].astype("f8") - base[n].astype("f8")) ** 2 for n in base]
    kept = sum(int((s >= models.threshold).sum()) for s in scores) / TINY.parameters
    assert kept == pytest.approx(0.4, abs=0.05)


def test_bytes_on_disk(models: Models) -> None:
    written = sum(path.stat().st_size for path in models.folder.rglob("*.safetensors"))
    assert written == pytest.approx(bytes_on_disk(TINY, 2), rel=0.02)
