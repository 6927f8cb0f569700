"""Files of torch.save as people have them: without sums of their bytes, in the old format, around other things than a model's weights."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save

from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import Checkpoint
from ota_core.moments import open_moments

STATE = {"a.weight": torch.arange(12.0).reshape(4, 3).bfloat16(), "b.weight": torch.arange(20.0).reshape(4, 5).t()}


@pytest.fixture
def without_sums() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


def read(folder: Path) -> dict[str, torch.Tensor]:
    with closing(Checkpoint(folder)) as checkpoint:
        shapes = {name: checkpoint.info(name).shape for name in checkpoint.names()}
        return {name: checkpoint.read_rows(name, 0, shape[0]).tensor().reshape(shape).clone() for name, shape in shapes.items()}


@pytest.mark.usefixtures("without_sums")
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_without_sums_of_their_bytes(tmp_path: Path, zipped: bool) -> None:
    """pytorch/pytorch#137735, tracel-ai/burn#5712: set_crc32_options(False) makes saving faster, and unzip calls such files damaged."""
    torch.save(STATE, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    found = read(tmp_path)
    assert found.keys() == STATE.keys() and all(torch.equal(found[name], x) for name, x in STATE.items())


@pytest.mark.usefixtures("without_sums")
def test_shards_of_fsdp_without_sums_of_their_bytes(tmp_path: Path) -> None:
    dcp.save({"model": STATE, "extra": {"seed": [1, 2]}}, checkpoint_id=tmp_path / "pytorch_model_fsdp_0", no_dist=True)
    found = read(tmp_path)
    assert found.keys() == STATE.keys() and all(torch.equal(found[name], x) for name, x in STATE.items())


@pytest.mark.usefixtures("without_sums")
def test_second_moments_without_sums_of_their_bytes(tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = torch.optim.AdamW([("w", parameter)], betas=(0.9, 0.95))
    parameter.grad = torch.arange(12.0).reshape(4, 3)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    moments = open_moments(tmp_path / "optimizer.pt", tensors=frozenset({"w"}))
    assert torch.equal(torch.from_numpy(moments.read("w", 0, 4).copy()), optimizer.state[parameter]["exp_avg_sq"])


def script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


@pytest.mark.parametrize(
    ("name", "held", "says"),
    [
        ("pytorch_model.bin", {"state_dict": STATE, "epoch": 3}, r"training state: the weights are under 'state_dict', beside 'epoch'.*\['state_dict'\]"),
        ("pytorch_model.bin", {"model": STATE}, r"weights are under 'model', beside nothing.*weights_only=True\)\['model'\]"),
        ("pytorch_model.bin", STATE | {"step": 3}, r"1 values that are no tensors: 'step' \(int\).*torch.is_tensor"),
        ("pytorch_model.bin", torch.nn.Linear(2, 2), r"could run code.*where it is trusted.*\.state_dict\(\)"),
        ("pytorch_model.bin", script, r"is compressed, torch.save stores.*torch.load\("),
        ("pytorch_model.bin", b"", "it is empty; fetch the file again"),
        ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n", "Git LFS pointer.*git lfs pull"),
        ("model.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n", "Git LFS pointer.*git lfs pull"),
        ("model.safetensors", b"<!DOCTYPE html><html><body>Sign in</body></html>", "looks like a web page"),
        ("pytorch_model.bin", save({"a": torch.ones(2)}), "looks like a safetensors file"),
        ("model.safetensors", b"GGUF\x03\x00\x00\x00" + bytes(64), "looks like a GGUF file"),
    ],
    ids=["state_dict", "model", "mixed", "module", "script", "empty", "lfs", "lfs gguf", "page", "safetensors", "gguf"],
)  # fmt: skip
def test_what_a_file_is_instead(tmp_path: Path, name: str, held: Any, says: str) -> None:
    """microsoft/OmniParser#34, huggingface/transformers#27923: training states and modules under the name of weights; pointers and pages as downloads."""
    if callable(held) and not isinstance(held, torch.nn.Module):
        held(tmp_path / name)
    elif isinstance(held, bytes):
        (tmp_path / name).write_bytes(held)
    else:
        torch.save(held, tmp_path / name)
    with pytest.raises(CheckpointError, match=says):
        Checkpoint(tmp_path)
