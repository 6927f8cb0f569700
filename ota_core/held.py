"""Temporary files and folders of which everybody can tell whether their maker still lives: it holds their lock, which the system releases when
it dies.

Who makes one looks again once it has the lock: in between somebody may have taken it for abandoned. On a file system without locks nothing is
ever taken for abandoned.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def held_folder(name: Callable[[], Path]) -> Iterator[Path]:
    """A new folder under a name that ``name`` gives, locked inside the block. Raises OSError."""
    while True:
        path = name()
        path.mkdir()
        with suppress(FileNotFoundError):
            handle = os.open(path, os.O_RDONLY)
            if hold(handle, path):
                break
            os.close(handle)
    try:
        yield path
    finally:
        os.close(handle)


def hold(handle: int, path: Path) -> bool:
    """Lock an open file or folder, and tell whether it still has this name. The lock goes with the handle."""
    with suppress(OSError):  # no locks on this file system
        fcntl.flock(handle, fcntl.LOCK_EX)
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False


def is_abandoned(path: Path) -> bool:
    """Whether nobody holds it."""
    with suppress(OSError), _taken(path):
        return True
    return False


def remove_abandoned(path: Path) -> bool:
    """Remove a file or folder that nobody holds; whether that was done. What somebody holds, or may not be removed, stays."""
    with suppress(OSError), _taken(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        return True
    return False


@contextmanager
def _taken(path: Path) -> Iterator[None]:
    """Raises OSError where it is gone, somebody holds it, or nobody can."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
