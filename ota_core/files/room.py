"""Room on a disk: asked for before the first byte is written, and said clearly where it runs out all the same."""

import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ota_core.errors import StorageError, raise_all

_FULL = {errno.ENOSPC, errno.EDQUOT}


class Need(NamedTuple):
    """Bytes that something is going to take."""

    path: Path
    """Where; it need not exist yet."""
    bytes: int
    what: str


def check_room(needs: Sequence[Need]) -> None:
    """Raise StorageError where a disk has not the room for everything that is going to lie on it; all such disks are named at once."""
    by_disk: dict[int, list[Need]] = {}
    for need in needs:
        if need.bytes > 0:
            by_disk.setdefault(os.stat(_existing(need.path)).st_dev, []).append(need)
    problems = []
    for some in by_disk.values():
        free, wanted = shutil.disk_usage(_existing(some[0].path)).free, sum(need.bytes for need in some)
        if wanted > free:
            each = "; ".join(f"{need.what} at {need.path}: {need.bytes:,} bytes" for need in some)
            problems.append(
                f"no room on the disk of {some[0].path}: {wanted:,} bytes are needed ({each}), {free:,} are free; make room or choose another place"
            )
    raise_all(problems, StorageError)


@contextmanager
def full_disk(path: Path) -> Iterator[None]:
    """An error of a disk that is full while ``path`` is written becomes a StorageError that says so; any other one passes."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(_existing(path)).free
        raise StorageError(
            f"the disk of {path} became full while it was written ({error.strerror}; {free:,} bytes are free); what was written of it is removed, and "
            "what was there before stays. Make room or choose another place",
            reason="unavailable",
        ) from error


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    here = path.absolute()
    while not here.exists() and here != here.parent:
        here = here.parent
    return here
