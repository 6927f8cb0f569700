"""Open files of a process are few (``ulimit -n``): inputs are mapped without one, outputs share some, and the limit is raised as far as it goes."""

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ota_core.errors import OtaError

AT_ONCE = 64
"""Output files that are open at a time."""
WANTED = 65536
"""Descriptors that a process asks for; a system's hard limit may be lower."""


def raise_limit() -> None:
    """Raise this process's soft limit of open files to the hard one, at most ``WANTED``. A process may always do that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # macOS has a smaller limit of its own; the soft one stays
            return


def check_limit(error: OSError) -> None:
    """Raise OtaError where a file could not be opened because too many are open already, which says nothing about the file."""
    if error.errno in {errno.EMFILE, errno.ENFILE}:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise OtaError(
            f"{error.filename or 'a file'} cannot be opened, because this process may hold only {soft} files open at a time; nothing is wrong with the file. "
            "Raise the limit (ulimit -n 65536) and run the command again"
        ) from None


class Written:
    """One output file, written by offset from any thread. It is open while it is written to, and closed when others need its descriptor."""

    def __init__(self, path: Path, size: int) -> None:
        """Make the file, empty but of its full size. Raises OSError."""
        self.path = path
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.ftruncate(fd, size)
        finally:
            os.close(fd)

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        """A descriptor that stays open as long as the body runs."""
        fd = _pool.take(self.path)
        try:
            yield fd
        finally:
            _pool.give(self.path)

    def sync(self) -> None:
        """Flush what was written to the disk, and let go of the file."""
        with self.descriptor() as fd:
            os.fsync(fd)
        self.close()

    def close(self) -> None:
        """Let go of the file; closing twice is fine."""
        _pool.close(self.path)


class _Pool:
    """The descriptors of all outputs of this process, the least recently used first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, list[int]] = OrderedDict()  # file to [descriptor, users]

    def take(self, path: Path) -> int:
        with self._lock:
            held = self._open.get(path)
            if held is None:
                self._make_room()
                held = self._open[path] = [os.open(path, os.O_WRONLY), 0]
            self._open.move_to_end(path)
            held[1] += 1
            return held[0]

    def give(self, path: Path) -> None:
        with self._lock:
            self._open[path][1] -= 1

    def close(self, path: Path) -> None:
        with self._lock:
            if (held := self._open.pop(path, None)) is not None:
                os.close(held[0])

    def _make_room(self) -> None:
        idle = [path for path, (_, users) in self._open.items() if users == 0]
        for path in idle[: max(0, len(self._open) + 1 - AT_ONCE)]:
            os.close(self._open.pop(path)[0])


_pool = _Pool()
