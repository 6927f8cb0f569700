"""Files of torch.save whose tensors are read by ranges.

Format: a zip file that stores ``data.pkl`` and each storage's bytes uncompressed. torch.load with ``map_location="meta"`` unpickles
the structure alone and notes in each storage where its bytes lie (``torch.load`` documents this as ``_checkpoint_offset``).
torch's old format, which is no zip, is loaded whole. Tensor subclasses that are known come as stand-ins (``torch_subclasses``).
"""

import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ota_core.compute.blocks import matrix_shape
from ota_core.files.byte_source import ByteSource, SourceOf, numbers, open_source
from ota_core.files.rows import dtype_of

if TYPE_CHECKING:
    import torch

ZIP = b"PK\x03\x04"
LOCAL_HEADER = 30  # bytes before a record's name (APPNOTE.TXT 4.3.7); the lengths of name and extra field are its last four


class TorchFile:
    """One file of torch.save. ``saved`` is what was saved; its tensors have shapes and dtypes, their numbers come from ``read_rows``."""

    path: Path
    saved: Any

    def __init__(self, path: Path, source_of: SourceOf | None = None) -> None:
        """Only tensors and plain containers are unpickled (``weights_only``).

        Raises whatever torch.load raises for a damaged or hostile file, OSError, or ValueError for a zip file that torch did not write.
        """
        from ota_core.files.torch_subclasses import load  # it needs torch

        self.path = path
        source = open_source(path, source_of)
        self._source: ByteSource | None = source
        if bytes(source.read(0, min(4, source.size))) != ZIP:
            source.close()
            self._source = None
            self.saved = load(path, "cpu")
            return
        self.saved = load(path, "meta")
        self._records = _records(path, source)

    def check(self, tensors: "Iterable[torch.Tensor]") -> None:
        """Raises ValueError where the bytes of one of the file's tensors do not lie where torch puts them."""
        for tensor in tensors:
            if self._source is not None and tensor.numel():
                self._offset(tensor)

    def read_rows(self, tensor: "torch.Tensor", start: int, stop: int) -> "torch.Tensor":
        """Rows start:stop of one of the file's tensors as the matrix (R, C) of ``blocks.matrix_shape``, in its dtype; read-only."""
        rows, cols = matrix_shape(tensor.shape)
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} asked, the tensor has rows 0:{rows}")
        if self._source is None or tensor.numel() == 0:
            whole = tensor if self._source is None else tensor.new_empty(tensor.shape, device="cpu")
            return whole.reshape(rows, cols)[start:stop]
        offset = self._offset(tensor)
        if tensor.is_contiguous():
            first = offset + start * cols * tensor.itemsize
            return _numbers(self._source, first, (stop - start) * cols, tensor).view(stop - start, cols)
        held = _numbers(self._source, offset, _span(tensor), tensor)
        # Of a tensor that was saved transposed or as a slice, only the planes that hold the rows are put in order.
        plane = rows // tensor.shape[0]
        first, last = start // plane, -(-stop // plane)
        found = held.as_strided(tensor.shape, tensor.stride(), 0)[first:last].reshape((last - first) * plane, cols)
        return found[start - first * plane : stop - first * plane]

    def read(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """All numbers of one of the file's tensors, in its shape; read-only."""
        return self.read_rows(tensor, 0, matrix_shape(tensor.shape)[0]).reshape(tensor.shape)

    def read_flat(self, tensor: "torch.Tensor", start: int, stop: int) -> "torch.Tensor":
        """Elements start:stop of one of the file's contiguous tensors, shape (stop − start,), in its dtype; read-only."""
        assert tensor.is_contiguous() and 0 <= start <= stop <= tensor.numel()
        if self._source is None:
            return tensor.reshape(-1)[start:stop]
        if start == stop:
            return tensor.new_empty(0, device="cpu")
        return _numbers(self._source, self._offset(tensor) + start * tensor.itemsize, stop - start, tensor)

    def prefetch_flat(self, tensor: "torch.Tensor", start: int, stop: int) -> None:
        """The same elements are read soon: a hint, see ``ByteSource.prefetch``."""
        if self._source is not None and start < min(stop, tensor.numel()):
            offset, stop = self._offset(tensor), min(stop, tensor.numel())
            self._source.prefetch(offset + start * tensor.itemsize, offset + stop * tensor.itemsize)

    def prefetch(self, tensor: "torch.Tensor", start: int, stop: int) -> None:
        """The same rows are read soon: a hint, see ``ByteSource.prefetch``."""
        if self._source is None or tensor.numel() == 0:
            return
        offset = self._offset(tensor)
        width = matrix_shape(tensor.shape)[1] * tensor.itemsize
        if tensor.is_contiguous():
            self._source.prefetch(offset + start * width, min(offset + stop * width, offset + tensor.nbytes))
        else:
            self._source.prefetch(offset, offset + _span(tensor) * tensor.itemsize)

    def drop_pages(self) -> None:
        """Give memory that holds bytes already read back. What was returned stays valid."""
        if self._source is not None:
            self._source.drop()

    def close(self) -> None:
        """Let go of the file; closing twice is fine."""
        self.saved = None
        if self._source is not None:
            self._source.close()

    def _offset(self, tensor: "torch.Tensor") -> int:
        """Where a tensor's first element lies in the file. torch computes it from sizes; the zip's own directory must agree."""
        storage = tensor.untyped_storage()
        offset = getattr(storage, "_checkpoint_offset", None)
        held = -1 if offset is None else self._records.get(offset, -1)
        # On the device meta torch widens a storage that is too small for its tensors, rather than to raise.
        if 0 <= held < storage.nbytes():
            raise ValueError(
                f"a tensor of the shape {list(tensor.shape)} reaches to byte {storage.nbytes()} of its storage, which has {held} bytes in "
                "the file: it is damaged"
            )
        if offset is None or held != storage.nbytes():
            raise ValueError(
                f"torch looks for a storage of {storage.nbytes()} bytes at byte {offset}, where the zip file has no such record: it was "
                "not written by torch.save"
            )
        return int(offset) + int(tensor.storage_offset()) * tensor.itemsize


def _numbers(source: ByteSource, offset: int, count: int, like: "torch.Tensor") -> "torch.Tensor":
    """``count`` numbers from a byte offset on, shape (count,), in the type of ``like``."""
    import torch

    held = numbers(source, offset, count, dtype_of(like).held)
    return torch.from_numpy(held).view(like.dtype)


def _span(tensor: "torch.Tensor") -> int:
    """Elements of the storage from the tensor's first to its last one."""
    return 1 + sum(int((size - 1) * stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _records(path: Path, source: ByteSource) -> dict[int, int]:
    """Offset of a record's bytes to their number. Raises ValueError for compressed records and another byte order."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"its record {info.filename} is compressed, torch.save stores records as they are")
            if info.filename.endswith("/byteorder") and archive.read(info).decode(errors="replace") != sys.byteorder:
                raise ValueError(f"it was saved on a machine of another byte order than this one ({sys.byteorder} endian)")
            header = bytes(source.read(info.header_offset, info.header_offset + LOCAL_HEADER))
            name, extra = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
            start = info.header_offset + LOCAL_HEADER + name + extra
            if start + info.file_size > source.size:
                raise ValueError(
                    f"its record {info.filename} ends at byte {start + info.file_size}, the file has {source.size} bytes"
                )
            found[start] = info.file_size
    return found
