"""Second moments in one byte an element: the code of ``log8_codec`` over blocks of 256 elements in row-major order.

1 byte for the code and 8 / 256 for the block's range: 1.03 bytes a parameter. Every tensor is coded, vectors too: one rule for all
shapes, and the code keeps what matters of any of them (zeros and the two ends of every block exactly, the rest to a percent or two).
Blocks run on over the ends of rows, so that narrow tensors pay no more; rows read are cut out of their blocks.

A coded expert is a quarter of its v, too much to hold: it is written to a file as it is made, mapped, and decoded as it is read.
"""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.compute.stream import Stream
from ota_core.errors import MomentsError
from ota_core.files.rows import F32, U8
from ota_core.files.safetensors_io import SafetensorsFile
from ota_core.files.writer import SafetensorsWriter, TensorSpec
from ota_core.moments.base import Moments
from ota_core.moments.compression.base import CompressionReport, MappedMoments
from ota_core.moments.compression.cuts import BLOCK, CHUNK, refuse
from ota_core.moments.compression.header import Facts, Header

CODE, RANGE = "#code", "#range"


class Log8Moments(MappedMoments):
    """Second moments of a file that ``write_log8`` made: N#code uint8 (elements,), N#range float32 (blocks, 2)."""

    @staticmethod
    def keys(name: str, shape: tuple[int, ...], rank: int | None = None) -> dict[str, tuple[int, ...]]:
        return {name + CODE: (math.prod(shape),), name + RANGE: (-(-math.prod(shape) // BLOCK), 2)}

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        """Rows start:stop of ṽ, float32 (stop − start, C), decoded anew. Raises MomentsError where the file is damaged.

        Every range is looked at, and a code between two finite values can only be finite: ``check`` changes nothing.
        """
        from ota_core.moments.compression.log8_codec import decode

        width = matrix_shape(self.header.shapes[name])[1]
        first, last = start * width, stop * width
        codes = self._file.read_rows(name + CODE, first, last).held.reshape(-1)
        ranges = self._file.read_rows(name + RANGE, first // BLOCK, -(-last // BLOCK)).held.view(np.int32)
        values = np.empty((stop - start, width), np.float32)
        if not decode(codes, ranges, first % BLOCK, values.view(np.int32).reshape(-1)):
            raise MomentsError(
                f"{self.path}: '{name}' holds a block whose range is no range of second moments; compress the second moments again"
            )
        return values

    def prefetch(self, name: str, start: int, stop: int) -> None:
        width = matrix_shape(self.header.shapes[name])[1]
        self._file.prefetch(name + CODE, start * width, stop * width)
        self._file.prefetch(name + RANGE, start * width // BLOCK, -(-stop * width // BLOCK))


def write_log8(moments: Moments, path: Path, *, stream: Stream, what: str, facts: Facts = None) -> CompressionReport:
    """Code one expert's second moments into the file ``path``, in one pass. Raises MomentsError on bad values; no file is left then."""
    from ota_core.moments.compression.log8_codec import encode

    header = Header.of(moments, "log8")
    shapes = header.shapes
    forms = {name: Log8Moments.keys(name, shape) for name, shape in shapes.items()}
    specs = [TensorSpec(key, form, U8 if key.endswith(CODE) else F32) for keys in forms.values() for key, form in keys.items()]

    def work(part: tuple[str, int, int]) -> tuple[float, float]:
        name, start, stop = part
        v = moments.read(name, start, stop, check=False)
        stream.count_read(v.nbytes)
        values = v.reshape(-1)
        codes, ranges = np.empty(values.size, np.uint8), np.empty((-(-values.size // BLOCK), 2), np.int32)
        sums = np.zeros(2)
        if not encode(values, codes, ranges, sums):
            refuse(moments, name, start, stop)
        first = start * v.shape[1]
        writer.write_rows(name + CODE, first, codes[:, None])
        writer.write_rows(name + RANGE, first // BLOCK, ranges.view(np.float32))
        return float(sums[0]), float(sums[1])

    parts = [(name, a, b) for name, shape in sorted(shapes.items()) for a, b in _whole_blocks(shape)]
    with SafetensorsWriter(path, specs, header.metadata(facts)) as writer:
        found = stream.map(work, parts, what=what, size=lambda part: part[2] - part[1])
    sums: dict[str, list[tuple[float, float]]] = {name: [] for name in shapes}
    for part, both in zip(parts, found, strict=True):
        sums[part[0]].append(both)
    errors = {name: (math.fsum(b[0] for b in mine), math.fsum(b[1] for b in mine)) for name, mine in sums.items()}
    with SafetensorsFile(path) as file:
        return CompressionReport.of(Log8Moments(file, header), sum(spec.bytes for spec in specs), errors)


def _whole_blocks(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Ranges of rows about a quarter of a chunk long that begin where a block begins."""
    rows, width = matrix_shape(shape)
    unit = BLOCK // math.gcd(width, BLOCK)
    step = max(1, CHUNK // 4 // max(width, 1) // unit) * unit
    return [(a, min(a + step, rows)) for a in range(0, rows, step)] if width else []
