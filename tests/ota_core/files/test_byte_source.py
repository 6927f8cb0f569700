"""Every reader takes its numbers from the byte source that it is given, by range, and from nowhere else."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ota_core.compute.blocks import matrix_shape
from ota_core.compute.stream import Stream
from ota_core.errors import CheckpointError, MomentsError
from ota_core.files.byte_source import ByteSource, MappedFile
from ota_core.files.checkpoint import Checkpoint
from ota_core.moments import open_moments
from ota_core.moments.compression import compress as compress_moments
from ota_core.moments.compression import save_compressed
from ota_core.plan.masks import MaskFile, MaskWriter
from tests.checkpoints import random_base, random_expert, write_checkpoint, write_moments

BASE = random_base(3)
EXPERT = random_expert(BASE, 4)


class Recording:
    """A source in memory that notes what is asked of it."""

    def __init__(self, content: bytes) -> None:
        self.content, self.size = bytearray(content), len(content)
        self.reads: list[tuple[int, int]] = []
        self.hints: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> memoryview:
        assert 0 <= start <= stop <= self.size
        self.reads.append((start, stop))
        return memoryview(self.content)[start:stop]

    def prefetch(self, start: int, stop: int) -> None:
        assert 0 <= start <= stop <= self.size
        self.hints.append((start, stop))

    def drop(self) -> None: ...
    def close(self) -> None: ...


def elsewhere(path: Path) -> dict[Path, Recording]:
    """Move a file's content into a source; of the file itself remain its size and, of a zip, all but the storages' bytes."""
    content = path.read_bytes()
    hollow = bytearray(len(content))
    if content.startswith(b"PK"):
        hollow[:] = content
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if "/data/" in info.filename:
                    header = content[info.header_offset : info.header_offset + 30]
                    skip = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                    first = info.header_offset + skip
                    hollow[first : first + info.file_size] = bytes(info.file_size)
    path.write_bytes(hollow)
    return {path: Recording(content)}


def weights_file(folder: Path, kind: str) -> Path:
    write_checkpoint(folder, EXPERT.weights, dtype=torch.bfloat16)
    if kind == "safetensors":
        return folder / "model.safetensors"
    (folder / "model.safetensors").unlink()
    torch.save({name: torch.tensor(x).bfloat16() for name, x in EXPERT.weights.items()}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def state_dict() -> dict[str, Any]:
    state = {
        name: {"step": torch.tensor(float(i + 1)), "exp_avg": torch.ones(x.shape), "exp_avg_sq": torch.tensor(x)}
        for i, (name, x) in enumerate(EXPERT.v.items())
    }
    return {"state": state, "param_groups": [{"params": list(state), "betas": (0.9, 0.999)}]}


def optimizer_file(folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.save(state_dict(), folder / "optimizer.pt")
    return folder / "optimizer.pt"


def compressed_file(folder: Path) -> Path:
    folder.mkdir(parents=True)
    save_compressed(compress_moments(open_moments(write_moments(folder, EXPERT.v)), stream=Stream())[0], folder / "v.safetensors")
    (folder / "exp_avg_sq.safetensors").unlink()
    return folder / "v.safetensors"


def rows_of(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return checkpoint.read_rows(name, 0, matrix_shape(checkpoint.info(name).shape)[0]).held


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_come_from_the_source_in_the_ranges_that_are_asked(tmp_path: Path, kind: str) -> None:
    path = weights_file(tmp_path / "model", kind)
    whole = Checkpoint(path.parent)
    want = {name: rows_of(whole, name).copy() for name in whole.names()}
    sources = elsewhere(path)
    checkpoint = Checkpoint(path.parent, sources.get)
    sources[path].reads.clear()
    checkpoint.prefetch("model.embed_tokens.weight", 3, 7)
    rows = checkpoint.read_rows("model.embed_tokens.weight", 3, 7).held
    assert np.array_equal(rows, want["model.embed_tokens.weight"][3:7])
    assert sources[path].hints == sources[path].reads
    assert [stop - start for start, stop in sources[path].reads] == [4 * 8 * 2]
    assert all(np.array_equal(rows_of(checkpoint, name), want[name]) for name in want)
    checkpoint.prefetch("model.embed_tokens.weight", 12, 20)  # the next block may not exist


@pytest.mark.parametrize("make", [optimizer_file, compressed_file, lambda folder: _plain(folder)])
def test_second_moments_come_from_the_source(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "expert")
    with_file = open_moments(path)
    names = sorted(with_file.shapes())
    rows = {name: matrix_shape(shape)[0] for name, shape in with_file.shapes().items()}
    want = {name: with_file.read(name, 0, rows[name]).copy() for name in names}
    steps = {name: with_file.step(name) for name in names}
    sources = elsewhere(path)
    moments = open_moments(path, source_of=sources.get)
    for name in names:
        moments.prefetch(name, 0, rows[name])
        moments.prefetch(name, rows[name], rows[name] + 5)
        assert np.array_equal(moments.read(name, 0, rows[name]), want[name]), name
    assert {name: moments.step(name) for name in names} == steps
    assert any(float(v.max()) > 0 for v in want.values())


def _plain(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return write_moments(folder, EXPERT.v, step=7, beta2=0.99)


def test_strided_and_shared_storages_come_from_the_source(tmp_path: Path) -> None:
    v = torch.rand(6, 4)
    state = {
        "a": {"exp_avg_sq": v.T},
        "b": {"exp_avg_sq": v[2:4]},
        "c": {"exp_avg_sq": v[:, ::2]},
        "d": {"exp_avg_sq": torch.rand(0, 3)},
    }
    torch.save({"state": state, "param_groups": [{"params": list(state)}]}, tmp_path / "optimizer.pt")
    moments = open_moments(tmp_path / "optimizer.pt", source_of=elsewhere(tmp_path / "optimizer.pt").get)
    for name, entry in state.items():
        tensor = entry["exp_avg_sq"]
        assert np.array_equal(moments.read(name, 0, tensor.shape[0]), tensor), name
    assert np.array_equal(moments.read("a", 1, 3), v.T[1:3])


def test_masks_come_from_the_source(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).random((9, 5)) < 0.5
    writer = MaskWriter(tmp_path / "m.safetensors", {"w": (9, 5)}, {})
    writer.write("w", 0, bits)
    writer.close()
    masks = MaskFile(tmp_path / "m.safetensors", elsewhere(tmp_path / "m.safetensors").get)
    masks.prefetch("w", 2, 7)
    assert np.array_equal(masks.read("w", 2, 7), bits[2:7])


def test_zip_files_that_torch_did_not_write_are_refused(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "optimizer.pt")
    with zipfile.ZipFile(tmp_path / "optimizer.pt") as old, zipfile.ZipFile(tmp_path / "packed.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED)
    with pytest.raises(MomentsError, match="is compressed"):
        open_moments(tmp_path / "packed.pt")
    with zipfile.ZipFile(tmp_path / "optimizer.pt") as old, zipfile.ZipFile(tmp_path / "moved.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))  # without torch's alignment: storages are found by their names
    moments = open_moments(tmp_path / "moved.pt")
    for name, v in EXPERT.v.items():
        assert np.array_equal(moments.read(name, 0, matrix_shape(v.shape)[0]).reshape(v.shape), v)
    with zipfile.ZipFile(tmp_path / "optimizer.pt") as old, zipfile.ZipFile(tmp_path / "lost.pt", "w") as new:
        for info in old.infolist():
            if "/data/" not in info.filename:
                new.writestr(info.filename, old.read(info))
    with pytest.raises(MomentsError, match="the file has no such storage: it was not written by torch"):
        open_moments(tmp_path / "lost.pt")


def test_a_mapped_file_gives_views_of_one_mapping(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    source: ByteSource = MappedFile(tmp_path / "file")
    first, again = (np.frombuffer(source.read(10, 20), np.uint8) for _ in range(2))
    assert first.ctypes.data == again.ctypes.data
    for start, stop in ((0, source.size), (5000, 5001), (source.size, source.size), (0, 10 * source.size)):
        source.prefetch(start, stop)
    source.drop()
    source.close()
    source.close()
    assert first.tolist() == list(range(10, 20))
    with pytest.raises(ValueError, match="is closed"):
        source.read(0, 1)


def test_an_empty_file_is_a_truncated_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, BASE)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated: 0 bytes"):
        Checkpoint(tmp_path)
