"""Where a file's bytes come from: a memory map here, or anything else that can be read by ranges (tasks/ reads S3 this way)."""

import ctypes
import io
import mmap
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ota_core.reading import check_regular

# The kernel reads ahead at most this much for one request on a disk with its default settings (read_ahead_kb).
_READ_AHEAD = 128 * 1024
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_madvise = getattr(_libc, "madvise", None)


class ByteSource(Protocol):
    """The bytes of one file. All methods may be called from several threads at once."""

    size: int
    """Bytes in all."""

    def read(self, start: int, stop: int) -> memoryview:
        """The bytes [start, stop), 0 ≤ start ≤ stop ≤ size; read-only by agreement. They stay valid after ``drop`` and ``close``."""
        ...

    def prefetch(self, start: int, stop: int) -> None:
        """These bytes are read soon. Only a hint: it returns at once, may be repeated, and never fails."""
        ...

    def drop(self) -> None:
        """Memory that holds bytes already read may be given back."""
        ...

    def close(self) -> None:
        """Let go of the file; closing twice is fine."""
        ...


SourceOf = Callable[[Path], ByteSource | None]
"""Where the bytes of a file come from; None: from the file itself. The file then only stands for its name."""


class _Mapping:
    """A file's memory map that needs no open file, which Python's own ``mmap`` keeps as long as it lives."""

    bytes: memoryview
    """All of it. Views of it keep the mapping alive."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        held = (ctypes.c_char * size).from_address(address)
        weakref.finalize(held, _libc.munmap, ctypes.c_void_p(address), ctypes.c_size_t(size)).atexit = False
        self.bytes = memoryview(held).cast("B")

    @classmethod
    def of(cls, fd: int, size: int) -> "_Mapping":
        # A private writable mapping: torch takes it without a warning about read-only memory, and a stray write never
        # reaches the file. NORESERVE, because the kernel would otherwise refuse files larger than the memory.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        found = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
        if found == ctypes.c_void_p(-1).value:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return cls(int(found), size)


class MappedFile:
    """A file of this machine, mapped: what is read are views of the mapping. Raises OSError when it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path)
        with open(path, "rb") as stream:
            self.size = os.fstat(stream.fileno()).st_size
            self._map = _Mapping.of(stream.fileno(), self.size) if self.size else None
        self._closed = False

    def read(self, start: int, stop: int) -> memoryview:
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        return memoryview(b"" if self._map is None else self._map.bytes)[start:stop]

    def prefetch(self, start: int, stop: int) -> None:
        """Starts reading into the page cache. ctypes lets go of the GIL: on a busy disk the kernel makes the caller wait here."""
        if self._map is None or _madvise is None or not hasattr(mmap, "MADV_WILLNEED"):
            return
        for piece in range(start // mmap.PAGESIZE * mmap.PAGESIZE, min(stop, self.size), _READ_AHEAD):
            length = min(_READ_AHEAD, self.size - piece)
            _madvise(ctypes.c_void_p(self._map.address + piece), ctypes.c_size_t(length), mmap.MADV_WILLNEED)

    def drop(self) -> None:
        """Take the pages read so far out of this process's resident memory. Views stay valid: a later access reads again."""
        if self._map is not None and _madvise is not None and hasattr(mmap, "MADV_DONTNEED"):
            _madvise(ctypes.c_void_p(self._map.address), ctypes.c_size_t(self.size), mmap.MADV_DONTNEED)

    def close(self) -> None:
        """The mapping itself ends with the last view of it."""
        self._map, self._closed = None, True


def open_source(path: Path, source_of: SourceOf | None) -> ByteSource:
    """The source that ``source_of`` gives for a file, else the file mapped. Raises OSError when it cannot be opened."""
    given = source_of(path) if source_of else None
    return MappedFile(path) if given is None else given


def numbers(source: ByteSource, offset: int, count: int, dtype: Any) -> NDArray[Any]:
    """``count`` numbers of a numpy type that begin at a byte offset, shape (count,): a view of what the source returns, read-only by
    agreement."""
    if count == 0:
        return np.empty(0, dtype)
    found = np.frombuffer(source.read(offset, offset + count * np.dtype(dtype).itemsize), dtype)
    # Not every format promises aligned tensors, compiled loops and torch's kernels expect them: only such numbers are copied.
    return found if found.flags.aligned else found.copy()


class SourceFile(io.RawIOBase):
    """A source, or the part of it that begins at ``offset`` and has ``length`` bytes, as a file that is read and sought."""

    def __init__(self, source: ByteSource, offset: int = 0, length: int | None = None) -> None:
        self._source, self._offset, self._at = source, offset, 0
        self._length = source.size - offset if length is None else length

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        if self._at < 0:
            raise OSError("a seek before the beginning")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._length)
        if stop <= self._at:
            return 0
        content = self._source.read(self._offset + self._at, self._offset + stop)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
