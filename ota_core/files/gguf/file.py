"""A GGUF file, in one part or several, as named tensors. Only the rows that are asked for are dequantised, by the ``gguf`` package, to float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import CheckpointError
from ota_core.files.byte_source import SourceOf, numbers, open_source
from ota_core.files.gguf.names import Part, config_of, parts_of, scales_rotation
from ota_core.files.rows import BF16, F16, F32, F64, Dtype, Rows
from ota_core.files.safetensors_io import TensorInfo, other_format

_PLAIN = {"F32": F32, "F16": F16, "BF16": BF16, "F64": F64}
# Metadata of a model's form; the tokenizer's tables are not read here.
_FORM = ("general.", "split.")


@dataclass(frozen=True)
class _Stored:
    file: int
    """Which of the model's files."""
    offset: int
    kind: Any
    """Its type, of ``gguf.GGMLQuantizationType``."""
    shape: tuple[int, ...]
    row_bytes: int


class GgufFile:
    """A GGUF file, opened for reading, with the names of Hugging Face's class. Raises CheckpointError for what cannot be read."""

    def __init__(self, paths: Sequence[Path], source_of: SourceOf | None = None) -> None:
        """``paths``: the parts of one model in their order; the first holds its configuration."""
        self.path = paths[0]
        try:
            import gguf
        except ModuleNotFoundError:
            raise CheckpointError(f"{self.path}: GGUF is read with the package gguf: pip install gguf") from None
        self._stored: dict[str, _Stored] = {}
        metadata = self._opened(gguf, paths)
        if metadata.get("split.count", 0) not in (0, len(paths)):
            raise CheckpointError(
                f"{self.path} is one of {metadata['split.count']} parts, which are found by their names, NAME-00001-of-{metadata['split.count']:05}.gguf; "
                "give them these, or join them with llama-gguf-split --merge"
            )
        if metadata.get("split.tensors.count", len(self._stored)) != len(self._stored):
            raise CheckpointError(
                f"{self.path} and its parts hold {len(self._stored)} tensors, its metadata says {metadata['split.tensors.count']}; fetch them again"
            )
        self._parts = parts_of(self.path, metadata, {name: one.shape for name, one in self._stored.items()})
        self.config = config_of(metadata, self._parts)
        self.scales_rotation = scales_rotation(metadata, self._stored)
        self.infos = {name: self._info(name, part) for name, part in self._parts.items()}
        self.kept = self._usual_type()
        self._sources = [open_source(path, source_of) for path in paths]
        for i, (path, source) in enumerate(zip(paths, self._sources, strict=True)):
            ends = [one.offset + matrix_shape(one.shape)[0] * one.row_bytes for one in self._stored.values() if one.file == i]
            if max(ends, default=0) > source.size:
                self.close()
                raise CheckpointError(
                    f"{path} is truncated: its tensors need {max(ends)} bytes, {source.size} are there; fetch it again"
                )

    def _opened(self, gguf: Any, paths: Sequence[Path]) -> dict[str, Any]:
        """The first file's metadata; the tensors of all files are noted."""
        metadata: dict[str, Any] = {}
        for i, path in enumerate(paths):
            try:
                reader = gguf.GGUFReader(path)
                metadata = _metadata(reader) if i == 0 else metadata
                held = {one.name: _stored(gguf, one, i) for one in reader.tensors}
            except (ValueError, KeyError, IndexError, OSError, UnicodeDecodeError) as error:
                with open(path, "rb") as file:
                    seen = other_format(file.read(16))
                raise CheckpointError(
                    f"{path} cannot be read as GGUF ({type(error).__name__}: {error}).{seen} Fetch the file again"
                ) from None
            if twice := sorted(held.keys() & self._stored.keys()):
                raise CheckpointError(f"{path}: tensor '{twice[0]}' is in an earlier part, too; fetch the parts again")
            self._stored |= held
        return metadata

    def read_rows(self, name: str, start: int, stop: int) -> Rows:
        """As ``SafetensorsFile.read_rows``; what is quantised comes as float32."""
        part, info = self._parts[name], self.infos[name]
        rows = matrix_shape(part.shape)[0]
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {name!r} asked, which has rows 0:{rows}")
        if not part.heads:
            held = self._rows(part, start, stop)
        else:
            # Rows of whole heads: in the file the two halves of a head alternate.
            width = rows // part.heads
            first, last = start // width * width, -(-stop // width) * width
            held = self._rows(part, first, last)
            held = held.reshape(-1, width // 2, 2, held.shape[1]).swapaxes(1, 2).reshape(held.shape)[start - first : stop - first]
        if part.plus_one:
            held = held.astype(np.float32) - np.float32(1)
        return Rows(info.dtype, np.ascontiguousarray(held))

    def prefetch(self, name: str, start: int, stop: int) -> None:
        part = self._parts[name]
        one = self._stored[part.stored]
        rows = matrix_shape(part.shape)[0]
        start, stop = part.first + min(start, rows), part.first + min(stop, rows)
        self._sources[one.file].prefetch(one.offset + start * one.row_bytes, one.offset + stop * one.row_bytes)

    def drop_pages(self) -> None:
        for source in self._sources:
            source.drop()

    def close(self) -> None:
        for source in self._sources:
            source.close()

    def _rows(self, part: Part, start: int, stop: int) -> NDArray[Any]:
        import gguf

        one, (_, cols) = self._stored[part.stored], matrix_shape(part.shape)
        start, stop = start + part.first, stop + part.first
        offset, size = one.offset + start * one.row_bytes, (stop - start) * one.row_bytes
        plain = _PLAIN.get(one.kind.name)
        if plain is not None:
            return numbers(self._sources[one.file], offset, (stop - start) * cols, plain.held).reshape(stop - start, cols)
        if start == stop:
            return np.empty((0, cols), np.float32)
        raw = numbers(self._sources[one.file], offset, size, np.uint8).reshape(stop - start, one.row_bytes)
        return gguf.dequantize(raw, one.kind).reshape(stop - start, cols)

    def _info(self, name: str, part: Part) -> TensorInfo:
        kind = self._stored[part.stored].kind.name
        dtype = F32 if part.plus_one else _PLAIN.get(kind, F32)
        return TensorInfo(name, dtype, part.shape, 0, prod(part.shape) * dtype.itemsize)

    def _usual_type(self) -> Dtype:
        """The type that most numbers are stored in, float32 where that is a quantised one: converters keep vectors as float32."""
        sizes: dict[Dtype, int] = {}
        for part in self._parts.values():
            dtype = _PLAIN.get(self._stored[part.stored].kind.name, F32)
            sizes[dtype] = sizes.get(dtype, 0) + prod(part.shape)
        return max(sizes, key=lambda dtype: sizes[dtype], default=F32)


def _metadata(reader: Any) -> dict[str, Any]:
    named = str(reader.fields["general.architecture"].contents())
    return {name: field.contents() for name, field in reader.fields.items() if name.startswith((*_FORM, f"{named}."))}


def _stored(gguf: Any, tensor: Any, file: int) -> _Stored:
    kind, shape = tensor.tensor_type, tuple(int(size) for size in reversed(tensor.shape.tolist()))
    block, size = gguf.GGML_QUANT_SIZES[kind]
    cols = matrix_shape(shape)[1]
    if cols % block:
        raise ValueError(f"rows of {tensor.name} have {cols} numbers, which is no multiple of {kind.name}'s {block}")
    plain = kind.name in _PLAIN
    if not plain:
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            raise ValueError(f"{tensor.name} is of the type {kind.name}, which the package gguf cannot dequantise") from None
    return _Stored(file, int(tensor.data_offset), kind, shape, cols // block * size)
