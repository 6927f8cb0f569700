"""Safetensors files read lazily: a validated header, and ranges of the file as views, never a copy of the file.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps
(https://huggingface.co/docs/safetensors, "Format").
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

from ota_core.compute.blocks import matrix_shape
from ota_core.compute.descriptors import check_limit
from ota_core.errors import CheckpointError, raise_all
from ota_core.files.byte_source import ByteSource, MappedFile, numbers
from ota_core.files.rows import DTYPES, Dtype, Rows
from ota_core.reading import MAX_AXES, quoted

FORMAT_KEY = "ota_format"
"""In the metadata of the files that this project writes: which format of its own one has."""
MAX_HEADER = 100_000_000  # the reference implementation's limit, in bytes
AGAIN = "fetch or save the file again"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``start`` and ``stop`` are byte offsets from the beginning of the file."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One safetensors file, opened for reading. Raises CheckpointError for anything but a complete, well-formed file."""

    path: Path
    infos: dict[str, TensorInfo]
    """Name to place, in the order of the bytes."""
    metadata: dict[str, str]

    def __init__(self, path: str | os.PathLike[str], source: ByteSource | None = None) -> None:
        """``source``: where the bytes come from, if not from the file at ``path`` (see ``byte_source.SourceOf``)."""
        self.path = Path(path)
        try:
            self._source = source or MappedFile(self.path)
        except FileNotFoundError:
            raise CheckpointError(f"{self.path} does not exist; a safetensors file was expected there: check the path") from None
        except OSError as error:
            check_limit(error)
            raise CheckpointError(f"{self.path} cannot be opened ({error}); a readable safetensors file was expected") from None
        size = self._source.size
        length = _header_length(self.path, bytes(self._source.read(0, min(8, size))), size)
        self.infos, self.metadata = _parse_header(self.path, bytes(self._source.read(8, 8 + length)), size)

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies. Raises CheckpointError when the file does not hold it."""
        try:
            return self.infos[name]
        except KeyError:
            raise CheckpointError(f"{self.path} holds no tensor {name!r} ({len(self.infos)} others); check the name") from None

    def read_rows(self, name: str, start: int, stop: int) -> Rows:
        """Rows start:stop of a tensor seen as the matrix (R, C) of ``blocks.matrix_shape``, in its storage dtype.

        The result, shape (stop − start, C), is a view of what the source holds, of the memory map where the file is local: treat
        it as read-only. It stays valid after ``close`` and ``drop_pages``.
        """
        info = self.info(name)
        rows, cols = matrix_shape(info.shape)
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {name!r} asked, which has rows 0:{rows}")
        offset = info.start + start * cols * info.dtype.itemsize
        held = numbers(self._source, offset, (stop - start) * cols, info.dtype.held)
        return Rows(info.dtype, held.reshape(stop - start, cols))

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """The same rows are read soon: a hint, see ``ByteSource.prefetch``. Rows beyond the tensor's are ignored."""
        info = self.info(name)
        width = matrix_shape(info.shape)[1] * info.dtype.itemsize
        self._source.prefetch(min(info.start + start * width, info.stop), min(info.start + stop * width, info.stop))

    def drop_pages(self) -> None:
        """Give memory that holds bytes already read back. Views stay valid: a later access reads again."""
        self._source.drop()

    def close(self) -> None:
        """Let go of the file; closing twice is fine."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    """The header's length in bytes, checked against the file before anything is allocated for it."""
    if size < 8:
        raise CheckpointError(f"{path} is truncated: {size} bytes are there, a safetensors file needs at least 8; {AGAIN}")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path} is not a safetensors file: it begins with {prefix!r}, which would announce a header of {length} bytes "
            f"(at most {MAX_HEADER} are allowed).{other_format(prefix)} Save it as safetensors, or {AGAIN}"
        )
    if length > size - 8:
        raise CheckpointError(f"{path} is truncated: its header needs {8 + length} bytes, {size} are there; {AGAIN}")
    return length


def other_format(prefix: bytes) -> str:
    """What a file seems to be by its first bytes (16 suffice), where that is not what its name says; a sentence, or nothing."""
    if prefix.startswith((b"PK\x03\x04", b"\x80")):
        return " It looks like a file of torch.save."
    if prefix.startswith(b"version "):
        return " It looks like a Git LFS pointer: fetch the real file with `git lfs pull`."
    if prefix.lstrip()[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        return " It looks like a web page: the download was answered by a page, such as one that asks to log in."
    if prefix.startswith(b"GGUF"):
        return " It looks like a GGUF file: give it the ending .gguf."
    if prefix[8:9] == b"{" and int.from_bytes(prefix[:8], "little") <= MAX_HEADER:
        return " It looks like a safetensors file: give it the ending .safetensors."
    return ""


def _parse_header(path: Path, raw: bytes, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Infos in the order of the bytes, and the metadata. Raises one CheckpointError that lists every bad entry."""
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} has a header that is not JSON with unique keys ({error}); {AGAIN}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} has a JSON {type(header).__name__} as its header, an object was expected; {AGAIN}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} has a __metadata__ that does not map names to strings; {AGAIN}")
    base = 8 + len(raw)
    infos, problems = [], []
    for name, entry in header.items():
        parsed = _parse_entry(name, entry, base)
        if isinstance(parsed, TensorInfo):
            infos.append(parsed)
        else:
            problems.append(f"{path}: tensor {quoted(name)} {parsed}; {AGAIN}")
    raise_all(problems, CheckpointError)
    infos.sort(key=lambda info: (info.start, info.stop))
    _check_cover(path, infos, base, size)
    return {info.name: info for info in infos}, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        raise ValueError(f"key {quoted(twice[0])} appears twice")
    return result


def _parse_entry(name: str, entry: Any, base: int) -> TensorInfo | str:
    """One header entry with absolute offsets, or what is wrong with it."""
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return f"has the entry {entry!r:.200}, an object with dtype, shape and data_offsets was expected"
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        return f"has the dtype {entry['dtype']!r:.200}, one of {', '.join(DTYPES)} was expected"
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape):
        return f"has the shape {shape!r:.200}, a list of integers of at least 0 was expected"
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has the data_offsets {offsets!r:.200}, two rising integers were expected"
    if len(shape) > MAX_AXES:
        return f"has {len(shape)} axes, at most {MAX_AXES} are read"
    needed = prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != needed:
        return f"has {quoted(offsets[1] - offsets[0])} bytes by its data_offsets, its shape {quoted(shape)} in {entry['dtype']} needs {quoted(needed)}"
    return TensorInfo(name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_cover(path: Path, infos: list[TensorInfo], base: int, size: int) -> None:
    """The tensors must cover the file from the header's end to the last byte, each byte once."""
    end = base
    for info in infos:
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {quoted(info.name)} {what}: starts at byte {quoted(info.start)}, not {end}; {AGAIN}"
            )
        end = info.stop
    if end > size:
        raise CheckpointError(f"{path} is truncated: its tensors need {end} bytes, {size} are there; {AGAIN}")
    if end < size:
        raise CheckpointError(f"{path} has {size - end} bytes too many: its tensors need {end} bytes, {size} are there; {AGAIN}")
