"""The lazy reader against the safetensors package, and its refusal of damaged files."""

import json
import struct
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from ota_core.compute.blocks import matrix_shape, row_blocks
from ota_core.errors import CheckpointError
from ota_core.files.rows import DTYPES, dtype_of
from ota_core.files.safetensors_io import SafetensorsFile


def write(path: Path, header: object, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


NAMES = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        NAMES, st.tuples(st.sampled_from([getattr(torch, dtype.name) for dtype in DTYPES.values()]), SHAPES), max_size=6
    ),
    st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=5), max_size=3),
    st.integers(1, 20),
    st.randoms(use_true_random=False),
)
def test_every_tensor_equals_what_the_safetensors_package_wrote(specs, metadata, block, random):
    tensors = {}
    for name, (dtype, shape) in specs.items():
        count = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.tensor([random.randrange(2 if dtype == torch.bool else 256) for _ in range(count)], dtype=torch.uint8)
        tensors[name] = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        save_file(tensors, path, metadata=metadata or None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns of read-only memory
            with SafetensorsFile(path) as file, safe_open(path, "pt") as reference:
                assert file.metadata == (reference.metadata() or {})
                assert set(file.infos) == set(reference.keys())
                for name, info in file.infos.items():
                    assert (info.dtype, info.shape) == (dtype_of(tensors[name]), tuple(tensors[name].shape))
                    blocks = [file.read_rows(name, a, b).tensor() for a, b in row_blocks(info.shape, block)]
                    assert all(part.shape[1] == matrix_shape(info.shape)[1] for part in blocks)
                    file.drop_pages()
                    assert b"".join(map(bits, blocks)) == bits(tensors[name])


def test_blocks_are_views_that_outlive_drop_and_close(tmp_path):
    values = torch.arange(12.0).reshape(4, 3)
    save_file({"w": values}, tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    file = SafetensorsFile(tmp_path / "x.safetensors")
    first, again = file.read_rows("w", 1, 3).held, file.read_rows("w", 2, 3)
    assert again.address == first[1].ctypes.data
    file.drop_pages()
    file.close()
    assert np.array_equal(first, values[1:3])
    first[:] = 0
    assert (tmp_path / "x.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="is closed"):
        file.read_rows("w", 0, 1)


def test_rows_outside_the_tensor_and_unknown_names_are_refused(tmp_path):
    save_file({"w": torch.zeros(4, 3)}, tmp_path / "x.safetensors")
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        with pytest.raises(IndexError, match=r"rows 2:5 of 'w' asked, which has rows 0:4"):
            file.read_rows("w", 2, 5)
        with pytest.raises(CheckpointError, match=r"x\.safetensors holds no tensor 'v'"):
            file.read_rows("v", 0, 1)


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    values = torch.tensor([1.5, -2.25])
    byte = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
    header = {"a": byte, "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}}
    write(tmp_path / "x", header, b"\x07" + values.numpy().tobytes())
    with SafetensorsFile(tmp_path / "x") as file:
        assert torch.equal(file.read_rows("w", 0, 2).tensor(), values[:, None])


@pytest.mark.parametrize("cut", [0, 5, 8, 20, -1, -13])
def test_a_truncated_file_says_how_many_bytes_are_there_and_needed(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(50, 3), "b": torch.zeros(3)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is truncated") as caught:
        SafetensorsFile(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    present = len(whole[:cut])
    needed = "at least 8" if present < 8 else str(header) if present < header else str(len(whole))
    assert f"{present} bytes are there" in str(caught.value) or f"{present} are there" in str(caught.value)
    assert needed in str(caught.value)


def entry(**changes):
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


OVERLAP = entry() | {"v": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}
GAP = entry() | {"v": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{not json", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"w": 1, "w": 2}', "'w' appears twice"),
        ([1], "JSON list as its header"),
        ({"__metadata__": {"a": 1}}, "__metadata__"),
        ({"w": [1]}, "an object with dtype, shape and data_offsets"),
        (entry(dtype="F31"), "dtype 'F31', one of F64"),
        (entry(dtype=["F32"]), "dtype"),
        (entry(shape=[-2]), "shape \\[-2\\]"),
        (entry(shape=[True]), "shape \\[True\\]"),
        (entry(shape=[3]), "8 bytes by its data_offsets, its shape \\[3\\] in F32 needs 12"),
        (entry(shape=[2**62, 2**62]), "needs 85070591730234615865843651857942052864"),
        (entry(data_offsets=[8, 0]), "data_offsets"),
        (entry(data_offsets=[0, 8.0]), "data_offsets"),
        (OVERLAP, "overlaps"),
        (GAP, "gap"),
        ({}, "8 bytes too many"),
    ],
)
def test_a_bad_header_names_file_and_fault(tmp_path, header, message):
    path = write(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors.*{message}"):
        SafetensorsFile(path)


def test_all_bad_entries_are_listed_at_once(tmp_path):
    header = {name: {"dtype": "Q", "shape": [2], "data_offsets": [0, 8]} for name in ("first", "second")}
    with pytest.raises(CheckpointError, match=r"(?s)2 problems.*first.*second"):
        SafetensorsFile(write(tmp_path / "x", header, bytes(8)))


@pytest.mark.parametrize(
    ("start", "hint"),
    [
        (b"PK\x03\x04\x00\x00\x08\x08", "torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\xff" * 8, "at most 100000000"),
    ],
)
def test_other_formats_are_recognised_without_allocating(tmp_path, start, hint):
    (tmp_path / "x").write_bytes(start + bytes(50))
    with pytest.raises(CheckpointError, match=f"not a safetensors file.*{hint}"):
        SafetensorsFile(tmp_path / "x")


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no_such does not exist"):
        SafetensorsFile(tmp_path / "no_such")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        SafetensorsFile(tmp_path)


STREAMING = """
import sys
from ota_core.files.safetensors_io import SafetensorsFile
def peak():  # the high-water mark, KiB; ru_maxrss would begin with that of the parent
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
file = SafetensorsFile(sys.argv[1])
file.read_rows("w", 0, 1).held.max()
before = peak()
for start in range(0, 64, 4):
    file.read_rows("w", start, start + 4).held.max()
    file.drop_pages()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_does_not_follow_the_file(tmp_path):
    save_file({"w": torch.ones(64, 1 << 20, dtype=torch.int8)}, tmp_path / "x")  # 64 MiB, read in blocks of 4 MiB
    run = subprocess.run([sys.executable, "-c", STREAMING, str(tmp_path / "x")], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 24 * 1024
