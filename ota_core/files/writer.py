"""Writes safetensors files as a stream: the header first, then rows at their final place, in any order and from any thread."""

import ctypes
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ota_core.artifact import write_text_atomic
from ota_core.compute.blocks import matrix_shape
from ota_core.compute.descriptors import Written
from ota_core.files.checkpoint import SAFETENSORS_INDEX
from ota_core.files.rows import Dtype

MAX_SHARD_BYTES = 5 * 10**9
WRITEBACK_BYTES = 1 << 20
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None) if os.name == "posix" else None


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """One safetensors file whose tensors are known beforehand. The bytes depend on names and values alone, not on the order of writing.

    The file has its full size from the start and takes rows through ``write_rows``; ``close``, which the end of a ``with`` calls, checks that every row came once.
    """

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None, *, holes: bool = False
    ) -> None:
        """``holes``: rows that never come stay holes, which are zeros; without it they are an error."""
        self.path, self._holes = path, holes
        self._specs = {spec.name: spec for spec in specs}
        self._missing = {spec.name: matrix_shape(spec.shape)[0] if spec.bytes else 0 for spec in specs}
        self._lock = threading.Lock()
        header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
        offset = 0
        self._offsets: dict[str, int] = {}
        # Wider types first, as safetensors itself does, so that every tensor starts at a multiple of its element size.
        for spec in sorted(specs, key=lambda s: (-s.dtype.itemsize, s.name)):
            header[spec.name] = {
                "dtype": spec.dtype.code,
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.bytes],
            }
            self._offsets[spec.name] = offset
            offset += spec.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self.size = self._data_start + offset
        self._file = Written(path, self.size)
        with self._file.descriptor() as fd:
            _pwrite_all(fd, len(text).to_bytes(8, "little") + text, 0)

    def write_rows(self, name: str, start: int, rows: NDArray[Any]) -> None:
        """Write rows from ``start`` on: the shape (n, C) of ``blocks.matrix_shape``, the type that holds the tensor's (``Dtype.held``)."""
        spec = self._specs[name]
        assert rows.dtype == spec.dtype.held and rows.ndim == 2, (name, rows.dtype, rows.shape)
        if rows.size == 0:
            return
        row_bytes = rows.shape[1] * rows.itemsize
        data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
        offset = self._data_start + self._offsets[name] + start * row_bytes
        with self._file.descriptor() as fd:
            _pwrite_all(fd, data, offset)
            start_writeback(fd, offset, data.nbytes)
        with self._lock:
            self._missing[name] -= rows.shape[0]

    def close(self) -> None:
        """Flush to the disk. Every row of every tensor must have been written."""
        self._file.sync()
        missing = [name for name, rows in self._missing.items() if rows]
        assert self._holes or not missing, f"{self.path}: rows never written: {missing[:5]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close; after an error let go of the unfinished file and remove it."""
        if kind is None:
            self.close()
        else:
            self._file.close()
            self.path.unlink(missing_ok=True)


def start_writeback(fd: int, offset: int, size: int) -> None:
    """Have the kernel begin to write these bytes to the disk, so that the final flush finds little left to wait for. Only a hint."""
    if _sync_file_range is not None and size >= WRITEBACK_BYTES:
        _sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE)


def _pwrite_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def plan_shards(specs: Sequence[TensorSpec], max_bytes: int = MAX_SHARD_BYTES) -> list[tuple[str, list[TensorSpec]]]:
    """Cut tensors, in their order, into named shards of at most ``max_bytes`` each (a larger tensor gets one of its own)."""
    shards: list[list[TensorSpec]] = [[]]
    room = max_bytes
    for spec in specs:
        if shards[-1] and spec.bytes > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(spec)
        room -= spec.bytes
    if len(shards) == 1:
        return [("model.safetensors", shards[0])]
    return [(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]


def write_index(folder: Path, shards: Sequence[tuple[str, Sequence[TensorSpec]]]) -> None:
    """The index that Hugging Face loaders need when there is more than one shard; nothing for a single one."""
    if len(shards) == 1:
        return
    weight_map = {spec.name: file for file, specs in shards for spec in specs}
    total = sum(spec.bytes for _, specs in shards for spec in specs)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text_atomic(folder / SAFETENSORS_INDEX, json.dumps(index, indent=2) + "\n")
