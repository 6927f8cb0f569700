"""The tensors of a DCP folder, read by ranges of rows from the files in which their boxes lie."""

import pickle
import zipfile
import zlib
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import CheckpointError, raise_all
from ota_core.files.byte_source import ByteSource, SourceFile, SourceOf, numbers, open_source
from ota_core.files.dcp.metadata import AGAIN, RECORDS, Chunk, DcpTensor, Place, read_metadata
from ota_core.files.pickled.unpickle import SavedTensor, unpickle
from ota_core.files.rows import Dtype, Rows

_LOCAL_HEADER = 30  # bytes before a record's name (APPNOTE.TXT 4.3.7); the lengths of name and extra field are its last four


class DcpFolder:
    """One folder: ``tensors`` by name. Raises CheckpointError for missing, truncated or damaged files."""

    def __init__(self, path: Path, source_of: SourceOf | None = None) -> None:
        """Every file that the metadata names must be there and be long enough; what lies in it is looked at when it is read."""
        self.path = path
        listing = read_metadata(path)
        self.tensors: dict[str, DcpTensor] = listing.tensors
        self.paths = listing.paths
        self._objects = listing.objects
        places = [chunk.place for tensor in self.tensors.values() for chunk in tensor.chunks] + list(self._objects.values())
        self._sources: dict[str, ByteSource] = {}
        self._starts: dict[Place, tuple[int, SavedTensor]] = {}
        problems = []
        for file in sorted({place.file for place in places}):
            end = max(place.offset + place.length for place in places if place.file == file)
            try:
                self._sources[file] = open_source(path / file, source_of)
            except OSError:
                problems.append(f"{path / file} is missing; it holds one rank's part of the checkpoint: fetch it")
                continue
            if self._sources[file].size < end:
                size = self._sources[file].size
                problems.append(f"{path / file} is truncated: {size} bytes are there, the metadata says {end}; {AGAIN}")
        raise_all(problems, CheckpointError)

    def objects(self) -> list[str]:
        """Names of what is no tensor."""
        return list(self._objects)

    def read_object(self, name: str) -> Any:
        """A pickled object of plain values; its tensors are notes of where they lie."""
        place = self._objects[name]
        try:
            window = SourceFile(self._sources[place.file], place.offset, place.length)
            with zipfile.ZipFile(window) as archive:
                return self._unpickled(place, window, archive)
        except zipfile.BadZipFile as error:
            raise CheckpointError(
                f"{self.path / place.file}: no object as torch.save writes it at byte {place.offset} ({error}); {AGAIN}"
            ) from None

    def read_rows(self, name: str, start: int, stop: int) -> Rows:
        """Rows start:stop of the matrix of ``blocks.matrix_shape``, in the stored dtype: a view where one box holds them, else joined."""
        tensor = self.tensors[name]
        rows, cols = matrix_shape(tensor.shape)
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {name!r} asked, which has rows 0:{rows}")
        if all(
            chunk.offsets[1:] == (0,) * len(chunk.offsets[1:]) and chunk.sizes[1:] == tensor.shape[1:] for chunk in tensor.chunks
        ):
            held = self._whole_rows(tensor, start, stop)
        else:
            held = self._boxes(tensor, start, stop)
        return Rows(tensor.dtype, held.reshape(stop - start, cols))

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """The same rows are read soon: a hint. Rows are guessed to lie evenly over a box, which is so where it is not cut by columns."""
        tensor = self.tensors[name]
        rows, _ = matrix_shape(tensor.shape)
        inner = prod(tensor.shape[1:]) * tensor.dtype.itemsize
        per = max(1, rows // max(tensor.shape[0], 1)) if tensor.shape else 1
        for chunk in tensor.chunks:
            first = chunk.offsets[0] if chunk.offsets else 0
            low, high = max(start // per - first, 0), min(-(-stop // per) - first, chunk.sizes[0] if chunk.sizes else 1)
            if low < high:
                share = inner * prod(chunk.sizes[1:]) // max(prod(tensor.shape[1:]), 1)
                source, place = self._sources[chunk.place.file], chunk.place
                source.prefetch(place.offset + low * share, min(place.offset + high * share + 4096, place.offset + place.length))

    def drop_pages(self) -> None:
        """Give memory that holds bytes already read back."""
        for source in self._sources.values():
            source.drop()

    def close(self) -> None:
        """Let go of the files; closing twice is fine."""
        for source in self._sources.values():
            source.close()

    def _whole_rows(self, tensor: DcpTensor, start: int, stop: int) -> NDArray[Any]:
        """Elements of boxes that are cut along the first axis alone: those follow one another as the elements do."""
        _, cols = matrix_shape(tensor.shape)
        inner = prod(tensor.shape[1:])
        parts = []
        for chunk in tensor.chunks:
            first = chunk.offsets[0] * inner if chunk.offsets else 0
            low, high = max(start * cols - first, 0), min(stop * cols - first, prod(chunk.sizes))
            if low < high:
                parts.append((chunk, low, high))
        if len(parts) == 1:
            return np.require(self._elements(tensor.dtype, *parts[0]), requirements="A")
        whole, at = np.empty((stop - start) * cols, tensor.dtype.held), 0
        for chunk, low, high in parts:
            whole[at : at + high - low] = self._elements(tensor.dtype, chunk, low, high)
            at += high - low
        return whole

    def _boxes(self, tensor: DcpTensor, start: int, stop: int) -> NDArray[Any]:
        """Rows put together from boxes that hold some of their columns."""
        _, cols = matrix_shape(tensor.shape)
        result = np.empty((stop - start, cols), tensor.dtype.held)
        for chunk in tensor.chunks:
            axes = [np.arange(low, low + size) for low, size in zip(chunk.offsets[:-1], chunk.sizes[:-1], strict=True)]
            grid = np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), tensor.shape[:-1]).reshape(-1)
            low, high = np.searchsorted(grid, (start, stop))
            if low < high:
                width, left = chunk.sizes[-1], chunk.offsets[-1]
                part = self._elements(tensor.dtype, chunk, int(low) * width, int(high) * width).reshape(-1, width)
                result[grid[low:high] - start, left : left + width] = part
        return result

    def _elements(self, dtype: Dtype, chunk: Chunk, start: int, stop: int) -> NDArray[Any]:
        """Elements start:stop of a box, in the order of its own rows. They may lie unaligned: a box begins anywhere in its file."""
        source = self._sources[chunk.place.file]
        offset, saved = self._start(dtype, chunk)
        if saved.contiguous:
            first = offset + start * dtype.itemsize
            return np.frombuffer(source.read(first, first + (stop - start) * dtype.itemsize), dtype.held)
        held = numbers(source, offset, saved.span, dtype.held)
        strides = [stride * dtype.itemsize for stride in saved.stride]
        return np.lib.stride_tricks.as_strided(held, saved.shape, strides).reshape(-1)[start:stop]

    def _start(self, dtype: Dtype, chunk: Chunk) -> tuple[int, SavedTensor]:
        """Where a box's numbers begin in its file, from the small file of torch.save that it is."""
        place = chunk.place
        if place not in self._starts:
            where = f"{self.path / place.file}, bytes {place.offset} to {place.offset + place.length}"
            try:
                window = SourceFile(self._sources[place.file], place.offset, place.length)
                with zipfile.ZipFile(window) as archive:
                    saved = self._unpickled(place, window, archive)
                    if not isinstance(saved, SavedTensor) or saved.dtype != dtype.name or saved.shape != chunk.sizes:
                        raise ValueError(f"they hold {saved!r:.200}, {dtype.name} of the shape {list(chunk.sizes)} was expected")
                    record = next(info for info in archive.infolist() if info.filename.endswith(f"/data/{saved.storage}"))
                    header = archive_header(window, record)
                    needed = (saved.offset + saved.span) * dtype.itemsize
                    if record.compress_type != zipfile.ZIP_STORED or record.file_size < needed or header + needed > place.length:
                        raise ValueError(f"their record of numbers has {record.file_size} bytes, at least {needed} were expected")
                    self._starts[place] = place.offset + header + saved.offset * dtype.itemsize, saved
            except (zipfile.BadZipFile, ValueError, StopIteration, KeyError, pickle.UnpicklingError, EOFError) as error:
                raise CheckpointError(f"{where}: no tensor as torch.save writes it ({error!s:.300}); {AGAIN}") from None
        return self._starts[place]

    def _unpickled(self, place: Place, window: SourceFile, archive: zipfile.ZipFile) -> Any:
        name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if name is None:
            raise CheckpointError(f"{self.path / place.file}: no data.pkl at byte {place.offset}, torch.save writes one; {AGAIN}")
        try:
            record = archive.getinfo(name)
            if record.compress_type != zipfile.ZIP_STORED or record.file_size > place.length:
                raise ValueError("its record is compressed, torch.save stores records as they are")
            window.seek(archive_header(window, record))
            held = window.read(record.file_size)
            # Without the sum of its bytes, which torch leaves away where it is told to (set_crc32_options), it is 0.
            if len(held) < record.file_size or (record.CRC and zlib.crc32(held) != record.CRC):
                raise ValueError("its bytes are not those that were written")
            return unpickle(held, RECORDS)
        except Exception as error:  # a damaged or hostile pickle can raise anything; nothing of it has been executed
            raise CheckpointError(
                f"{self.path / place.file}: the object at byte {place.offset} cannot be read: {type(error).__name__}: {error!s:.300}; {AGAIN}"
            ) from None


def archive_header(window: SourceFile, record: zipfile.ZipInfo) -> int:
    """Where a record's bytes begin, counted from the beginning of its zip file."""
    window.seek(record.header_offset)
    header = window.read(_LOCAL_HEADER)
    name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    return record.header_offset + _LOCAL_HEADER + name + extra
