"""FFG masks, one bit an element, and their file format.

File: safetensors with metadata ``ota_format`` = ``masks/1``; under each tensor's name the bits of its elements in row-major order,
eight to a uint8, lowest bit first, the last byte padded with zeros. Shapes and thresholds are in the metadata.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import ArtifactError
from ota_core.files.byte_source import SourceOf
from ota_core.files.rows import U8
from ota_core.files.safetensors_io import FORMAT_KEY, SafetensorsFile
from ota_core.files.writer import SafetensorsWriter, TensorSpec

FORMAT = "masks/1"


def pack(mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bits of a mask. mask: bool, any shape, n elements; result: uint8 (⌈n/8⌉,)."""
    return np.packbits(mask.reshape(-1), bitorder="little")


def unpack(packed: NDArray[np.uint8], start: int, count: int) -> NDArray[np.bool_]:
    """Bits start … start + count − 1 as bool (count,). packed: uint8 (n,)."""
    first = start // 8
    part = packed[first : (start + count + 7) // 8]
    return np.unpackbits(part, bitorder="little")[start - 8 * first :][:count].view(np.bool_)


class MaskWriter(SafetensorsWriter):
    """Writes a mask file block by block; every block but a tensor's last holds a multiple of eight elements."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], header: Mapping[str, Any]) -> None:
        """``header``: JSON-able facts kept with the masks (threshold, density, expert)."""
        facts = {**header, "shapes": {name: list(shape) for name, shape in sorted(shapes.items())}}
        specs = [TensorSpec(name, ((math.prod(shape) + 7) // 8,), U8) for name, shape in sorted(shapes.items())]
        self._cols = {name: matrix_shape(shape)[1] for name, shape in shapes.items()}
        super().__init__(path, specs, {FORMAT_KEY: FORMAT, "header": json.dumps(facts, sort_keys=True)})

    def write(self, name: str, start: int, mask: NDArray[np.bool_]) -> None:
        """Mask of the rows from ``start`` on. mask: bool (n, C)."""
        first = start * self._cols[name]
        assert first % 8 == 0, f"{name}: block begins at element {first}, within a byte"
        self.write_rows(name, first // 8, pack(mask)[:, None])


class MaskFile:
    """Reads a mask file. Raises ArtifactError when it is of another format."""

    def __init__(self, path: Path, source_of: SourceOf | None = None) -> None:
        self.path = path
        self._file = SafetensorsFile(path, source_of(path) if source_of else None)
        if self._file.metadata.get(FORMAT_KEY) != FORMAT:
            raise ArtifactError(
                f"{path}: format {self._file.metadata.get(FORMAT_KEY)!r}, expected {FORMAT}; make the masks again with this version"
            )
        self.header: dict[str, Any] = json.loads(self._file.metadata["header"])
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in self.header.pop("shapes").items()}

    def read(self, name: str, start: int, stop: int) -> NDArray[np.bool_]:
        """Rows start:stop of a mask, bool (stop − start, C)."""
        cols = matrix_shape(self.shapes[name])[1]
        first, count = start * cols, (stop - start) * cols
        packed = self._file.read_rows(name, first // 8, (first + count + 7) // 8).held[:, 0]
        return unpack(packed, first % 8, count).reshape(stop - start, cols)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """The same rows are read soon: a hint that costs little and may be repeated."""
        cols = matrix_shape(self.shapes[name])[1]
        self._file.prefetch(name, start * cols // 8, (stop * cols + 7) // 8)

    def density(self, name: str) -> float:
        """Share of a tensor's elements that the mask keeps."""
        packed = self._file.read_rows(name, 0, self._file.infos[name].shape[0]).held
        kept = int(np.bitwise_count(packed).sum())
        return kept / max(1, math.prod(self.shapes[name]))

    def drop_pages(self) -> None:
        self._file.drop_pages()

    def close(self) -> None:
        self._file.close()
