"""The files of second moments: safetensors whose metadata hold a ``Header``, tensors as the method's class says (``keys``)."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape, row_blocks
from ota_core.compute.stream import Stream
from ota_core.errors import MomentsError
from ota_core.files.byte_source import SourceOf
from ota_core.files.rows import F32, U8
from ota_core.files.safetensors_io import SafetensorsFile
from ota_core.files.writer import SafetensorsWriter, TensorSpec
from ota_core.moments.base import Moments
from ota_core.moments.check import checked
from ota_core.moments.compression.base import CompressedMoments, CompressionReport, FactoredMoments, MappedMoments
from ota_core.moments.compression.header import Facts, Header, read_header
from ota_core.moments.compression.log8 import CODE, Log8Moments
from ota_core.moments.compression.rank1 import RankOneMoments
from ota_core.moments.compression.rank_k import RankKMoments


class StoredMoments(MappedMoments):
    """Moments that ``save_full`` wrote: v under the parameters' names."""

    @staticmethod
    def keys(name: str, shape: tuple[int, ...], rank: int | None = None) -> dict[str, tuple[int, ...]]:
        return {name: shape}

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        """Rows start:stop of v, a view of the file: float32 (stop − start, C)."""
        rows = self._file.read_rows(name, start, stop).to_float32()
        return checked(rows, path=self.path, name=name, shape=self.header.shapes[name], start=start) if check else rows

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._file.prefetch(name, start, stop)


FORMS: dict[str, type[CompressedMoments]] = {
    "none": StoredMoments,
    "rank1": RankOneMoments,
    "log8": Log8Moments,
    "rank_k": RankKMoments,
}


def save_compressed(moments: FactoredMoments, path: Path, facts: Facts = None) -> None:
    """Write factors to ``path``; ``facts`` as for ``write_compressed``."""
    stored = moments.tensors()
    specs = [TensorSpec(name, values.shape, F32) for name, values in stored.items()]
    with SafetensorsWriter(path, specs, moments.header.metadata(facts)) as writer:
        for name, values in stored.items():
            writer.write_rows(name, 0, values.reshape(matrix_shape(values.shape)))


def save_full(moments: Moments, path: Path, *, stream: Stream, facts: Facts = None) -> CompressionReport:
    """Write v uncompressed, float32, under the parameters' names: one format whatever the trainer left."""
    header = Header.of(moments, "none")
    shapes = header.shapes

    def copy(block: tuple[str, int, int]) -> None:
        rows = moments.read(*block)
        stream.count_read(rows.nbytes)
        writer.write_rows(block[0], block[1], rows)

    with SafetensorsWriter(path, [TensorSpec(n, s, F32) for n, s in sorted(shapes.items())], header.metadata(facts)) as writer:
        blocks = [(name, a, b) for name in sorted(shapes) for a, b in row_blocks(shapes[name], stream.block_elements)]
        stream.map(copy, blocks, what="copy moments")
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return CompressionReport(method="none", parameters=parameters, bytes_per_param=4.0, sqrt_error=0.0, sqrt_error_per_tensor={})


def open_compressed(path: Path, source_of: SourceOf | None = None) -> CompressedMoments:
    """Open a file of this format; ``rank1`` and ``rank_k`` are read into memory, the others read as they are asked for.

    Raises MomentsError when the format or the method is not known here, or the tensors are not those that the header announces.
    """
    file = SafetensorsFile(path, source_of(path) if source_of else None)
    header = read_header(path, file.metadata)
    _check_tensors(file, header)
    form = FORMS[header.method]
    if issubclass(form, MappedMoments):
        return form(file, header)
    stored = {}
    for name, info in file.infos.items():
        file.prefetch(name, 0, matrix_shape(info.shape)[0])
    for name, info in file.infos.items():
        values = stored[name] = file.read_rows(name, 0, matrix_shape(info.shape)[0]).to_float32().reshape(info.shape).copy()
        # Factors of rank_k have signs; whatever stands for itself or is a sum has none.
        lowest = -math.inf if header.method == "rank_k" and name not in header.shapes else 0.0
        if values.size and not (values.min() >= lowest and np.abs(values).max() < math.inf):
            raise MomentsError(
                f"{path}: tensor '{name}' holds a negative, NaN or infinite entry; second moments are finite and ≥ 0"
            )
    file.close()
    assert issubclass(form, FactoredMoments)
    return form(path, header, stored)


def _check_tensors(file: SafetensorsFile, header: Header) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in header.shapes.items():
        expected |= FORMS[header.method].keys(name, shape, header.rank or 1)
    found = {name: info.shape for name, info in file.infos.items()}
    odd = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    odd += [name for name, info in file.infos.items() if info.dtype != (U8 if name.endswith(CODE) else F32)]
    if odd or (header.method == "rank_k") != (header.rank is not None):
        raise MomentsError(f"{file.path}: its tensors do not match its header ({odd[:4]}); compress the second moments again")
