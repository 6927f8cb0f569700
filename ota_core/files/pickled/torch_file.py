"""Files of torch.save whose tensors are read by ranges, without torch.

Format: a zip file that stores ``data.pkl`` and each storage's bytes uncompressed, ``data/<key>``. torch's old format, from before
version 1.6, is no zip: pickles that follow one another, then the storages, each after the number of its elements.
"""

import io
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.files.byte_source import ByteSource, SourceFile, SourceOf, numbers, open_source
from ota_core.files.pickled.unpickle import SavedTensor, unpickle, unpickle_with_storages
from ota_core.files.rows import NAMED, Dtype, Rows
from ota_core.reading import quoted

ZIP = b"PK\x03\x04"
LOCAL_HEADER = 30  # bytes before a record's name (APPNOTE.TXT 4.3.7); the lengths of name and extra field are its last four
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the old format

MAX_REPEATED = 2**24
"""Elements of a tensor that repeats those of a smaller storage, as ``expand`` leaves it."""
Extent = tuple[int, int]
"""Where bytes lie in a file: the first, and their number."""


class TorchFile:
    """One file of torch.save. ``saved`` is what was saved, with a ``SavedTensor`` for each tensor; numbers come from ``read_rows``."""

    path: Path
    saved: Any

    def __init__(self, path: Path, source_of: SourceOf | None = None, records: Sequence[str] = ()) -> None:
        """Only tensors and plain containers are unpickled, and classes whose full names begin as ``records`` says, as empty records.

        Raises unpickle.Refused for any other name, whatever a damaged pickle raises, OSError, or ValueError for a file that torch did not
        write. Nothing of the file is run.
        """
        self.path = path
        self._source = open_source(path, source_of)
        try:
            if bytes(self._source.read(0, min(4, self._source.size))) == ZIP:
                self._storages = _records(path, self._source)
                self.saved = unpickle(self._pickle(), records)
            else:
                self.saved, self._storages = _old_format(self._source, records)
        except BaseException:
            self._source.close()
            raise

    def _pickle(self) -> bytes:
        name = next((name for name in self._storages if name == "data.pkl"), None)
        if name is None:
            raise ValueError("it holds no data.pkl, so that it was not written by torch.save")
        start, size = self._storages[name]
        return bytes(self._source.read(start, start + size))

    def check(self, tensors: Iterable[SavedTensor]) -> None:
        """Raises ValueError where one of the file's tensors does not lie within its bytes, or has numbers of a type that is not read."""
        for tensor in tensors:
            self._place(tensor)

    def read_rows(self, tensor: SavedTensor, start: int, stop: int) -> Rows:
        """Rows start:stop of one of the file's tensors as the matrix (R, C) of ``blocks.matrix_shape``, in its dtype; read-only."""
        rows, cols = matrix_shape(tensor.shape)
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} asked, the tensor has rows 0:{rows}")
        if tensor.contiguous:
            held = self.read_flat(tensor, start * cols, stop * cols)
            return Rows(NAMED[tensor.dtype], held.reshape(stop - start, cols))
        dtype, first = self._place(tensor)
        whole = numbers(self._source, first, tensor.span, dtype.held)
        strides = [stride * dtype.itemsize for stride in tensor.stride]
        held = np.lib.stride_tricks.as_strided(whole, tensor.shape, strides, writeable=False)
        # Of a tensor that was saved transposed or as a slice, only the planes that hold the rows are put in order.
        plane = max(1, rows // max(1, tensor.shape[0]))
        low, high = start // plane, -(-stop // plane)
        found = held[low:high].reshape(-1, cols)[start - low * plane : stop - low * plane]
        return Rows(dtype, np.array(found, order="C"))

    def read_flat(self, tensor: SavedTensor, start: int, stop: int) -> NDArray[Any]:
        """Elements start:stop of one of the file's contiguous tensors, shape (stop − start,), as ``Dtype.held`` holds them; read-only."""
        assert tensor.contiguous and 0 <= start <= stop <= tensor.numel
        dtype, first = self._place(tensor)
        return numbers(self._source, first + start * dtype.itemsize, stop - start, dtype.held)

    def number(self, tensor: SavedTensor) -> float:
        """The only element of one of the file's tensors."""
        assert tensor.numel == 1
        held = self.read_rows(tensor, 0, 1)
        found: float = (held.to_float32() if held.dtype.is_floating_point and not held.dtype.held_itself else held.held).item()
        return found

    def prefetch(self, tensor: SavedTensor, start: int, stop: int) -> None:
        """The same rows are read soon: a hint, see ``ByteSource.prefetch``."""
        cols = matrix_shape(tensor.shape)[1]
        self.prefetch_flat(tensor, *((start * cols, stop * cols) if tensor.contiguous else (0, tensor.span)))

    def prefetch_flat(self, tensor: SavedTensor, start: int, stop: int) -> None:
        """The same elements are read soon: a hint."""
        stop = min(stop, tensor.span)
        if start < stop:
            dtype, first = self._place(tensor)
            self._source.prefetch(first + start * dtype.itemsize, first + stop * dtype.itemsize)

    def drop_pages(self) -> None:
        """Give memory that holds bytes already read back. What was returned stays valid."""
        self._source.drop()

    def close(self) -> None:
        """Let go of the file; closing twice is fine."""
        self.saved = None
        self._source.close()

    def place(self, tensor: SavedTensor) -> int:
        """The byte of the file at which a tensor's first element lies. Raises ValueError, as ``check`` does."""
        return self._place(tensor)[1]

    def _place(self, tensor: SavedTensor) -> tuple[Dtype, int]:
        dtype = tensor.known
        if dtype is None:
            raise ValueError(f"it holds numbers of the type {tensor.dtype}, which is not read")
        if not tensor.numel:
            return dtype, 0
        start, size = self._storages.get(f"data/{tensor.storage}", (0, -1))
        if tensor.numel > max(tensor.elements, MAX_REPEATED):
            raise ValueError(
                f"a tensor of the shape {quoted(list(tensor.shape))} has {quoted(tensor.numel)} elements, its storage {tensor.elements}: it is damaged, or "
                "repeats numbers; save it again with .contiguous()"
            )
        reach = (tensor.offset + tensor.span) * dtype.itemsize
        if 0 <= size < reach:
            raise ValueError(
                f"a tensor of the shape {quoted(list(tensor.shape))} reaches to byte {quoted(reach)} of its storage, which has {size} bytes in "
                "the file: it is damaged"
            )
        if size != tensor.elements * dtype.itemsize:
            raise ValueError(
                f"a tensor is in storage {tensor.storage} of {tensor.elements * dtype.itemsize} bytes, and the file has no such storage: it "
                "was not written by torch.save"
            )
        return dtype, start + tensor.offset * dtype.itemsize


def _records(path: Path, source: ByteSource) -> dict[str, Extent]:
    """Where each record of a zip file lies, by its name without the folder that torch puts all of them into.

    Raises ValueError for compressed records and another byte order.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its record {info.filename} is compressed, torch.save stores records as they are")
            header = bytes(source.read(info.header_offset, info.header_offset + LOCAL_HEADER))
            name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
            start = info.header_offset + LOCAL_HEADER + name + extra
            if start + info.file_size > source.size:
                raise ValueError(
                    f"its record {info.filename} ends at byte {start + info.file_size}, the file has {source.size} bytes"
                )
            found[info.filename.partition("/")[2]] = start, info.file_size
    if "byteorder" in found:
        start, size = found["byteorder"]
        _check_order(bytes(source.read(start, start + size)).decode(errors="replace"))
    return found


def _old_format(source: ByteSource, records: Sequence[str]) -> tuple[Any, dict[str, Extent]]:
    """What was saved, and where its storages lie. Raises ValueError for a file that torch did not write or that ends too early."""
    stream = io.BufferedReader(SourceFile(source))
    if unpickle(stream, records) != _MAGIC or unpickle(stream) != _PROTOCOL:
        raise ValueError("it does not begin as torch.save begins a file")
    system = unpickle(stream)
    _check_order("little" if isinstance(system, dict) and system.get("little_endian") else "big")
    saved, storages = unpickle_with_storages(stream, records)
    found, start = {}, 0
    keys = unpickle(stream)
    start = stream.tell()
    for key in keys:
        kind, elements = storages[key]
        if kind not in NAMED:
            raise ValueError(f"it holds numbers of the type {kind}, which is not read")
        size = elements * NAMED[kind].itemsize
        if start + 8 + size > source.size:
            raise ValueError(f"its storage {key} ends at byte {start + 8 + size}, the file has {source.size} bytes")
        if int.from_bytes(source.read(start, start + 8), "little") != elements:
            raise ValueError(f"its storage {key} has another number of elements than the {elements} that its description says")
        found[f"data/{key}"] = start + 8, size
        start += 8 + size
    return saved, found


def _check_order(order: str) -> None:
    if order != sys.byteorder:
        raise ValueError(f"it was saved on a machine of another byte order than this one ({sys.byteorder} endian)")
