"""Returning the pages of tensors that torch mapped from a file, so that resident memory does not grow with the file."""

import ctypes
import mmap
from pathlib import Path

import torch

MAPS = Path("/proc/self/maps")


class MappedPages:
    """Where a file lies in this process's memory. Does nothing where that cannot be known (another system than Linux)."""

    def __init__(self, path: Path) -> None:
        """Call it after the file was mapped."""
        self._ranges: list[tuple[int, int]] = []
        if not (MAPS.exists() and hasattr(mmap, "MADV_DONTNEED")):
            return
        real = str(path.resolve())
        for line in MAPS.read_text(errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] == real:
                first, last = fields[0].split("-")
                self._ranges.append((int(first, 16), int(last, 16)))

    def drop(self, tensor: torch.Tensor) -> None:
        """Take a contiguous tensor's pages out of resident memory; a later access reads them again from the file.

        Only for tensors inside the file's mapping: the same call would zero ordinary memory.
        """
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        inside = any(first <= start and stop <= last for first, last in self._ranges)
        if not inside or stop == start or not tensor.is_contiguous():
            return
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(page), ctypes.c_size_t(stop - page), mmap.MADV_DONTNEED)
