"""What lies below a root of artifacts, from one listing: outputs with their records, and what interrupted work left.

Only ``<kind>/<32 hex digits>/`` counts, and the store's own temporaries beside it. Everything else below the root, such as a published
model (``merged/<name>/<version>/``), is somebody else's and not seen.
"""

import os
import platform
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, get_args

from ota_core.artifact import RECORD, Kind, Record
from ota_core.errors import StorageError
from tasks.artifacts.processes import is_alive
from tasks.storage import models as storage
from tasks.storage import s3

KINDS: tuple[Kind, ...] = get_args(Kind)
READS_AT_ONCE = 16
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\..+\.(tmp|trash)")
_OWNED = re.compile(r"\.[0-9a-f]{32}\.(?P<host>.+)\.(?P<pid>\d+)\.(?P<started>\d+)\.\d+\.tmp")


@dataclass(frozen=True)
class File:
    """One file, as listed."""

    size: int
    modified: datetime
    inode: tuple[int, int] | None = None
    """Device and inode of a local file: hard links of one file are one on the disk."""
    links: int = 1
    blocks: int | None = None
    """Bytes on the disk of a local file, which may have holes."""

    @property
    def disk(self) -> int:
        """Bytes that it takes."""
        return self.size if self.blocks is None else min(self.size, self.blocks)


@dataclass(frozen=True)
class Stored:
    """One folder below the root."""

    kind: Kind
    name: str
    """The fingerprint, or the whole name of a temporary."""
    uri: str
    files: Mapping[str, File]
    touched: datetime
    """When anything in it was last written or found by somebody who wanted it."""
    record: Record | None = None
    """Of an output whose record can be read."""
    unreadable: bool = False
    """There is a record, but not one that this version understands."""

    @property
    def complete(self) -> bool:
        listed = self.record.files if self.record else {}
        return self.record is not None and all(
            name in self.files and self.files[name].size == size for name, size in listed.items()
        )

    @property
    def temporary(self) -> bool:
        return self.name.startswith(".")

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(one.size for one in self.files.values())

    @property
    def used(self) -> datetime:
        """The last sign of use: produced, written, or found."""
        produced = _time(self.record.provenance.get("produced_at")) if self.record else None
        return max(self.touched, produced) if produced else self.touched


def is_temporary_of_live_process(name: str) -> bool:
    """Whether this is the name of a temporary of the store whose process runs on this machine."""
    owner = _OWNED.fullmatch(name)
    return owner is not None and owner["host"] == platform.node() and is_alive(int(owner["pid"]), float(owner["started"]))


def list_root(root: str) -> list[Stored]:
    """Every output and leftover below a root: a folder or ``s3://…``. Raises StorageError when it cannot be read."""
    found = _remote(root) if storage.is_s3(root) else _local(Path(root).expanduser().absolute())
    with s3.Threads(READS_AT_ONCE) as pool:
        return list(pool.map(_with_record, found))


def is_as_listed(stored: Stored, place: str) -> bool:
    """Whether the folder, which lies at ``place`` now, holds what was listed, and nobody has touched it since."""
    try:
        files = dict(_remote_files(place)) if storage.is_s3(place) else local_files(Path(place))
    except FileNotFoundError:
        return False

    def seen(files: Mapping[str, File]) -> dict[str, tuple[int, datetime]]:
        return {name: (one.size, one.modified) for name, one in files.items()}

    return seen(files) == seen(stored.files)


class HasFiles(Protocol):
    """A folder or file of which something must be known."""

    @property
    def files(self) -> Mapping[str, File]: ...


def freed(going: Iterable[HasFiles]) -> int:
    """The bytes that deleting these gives back: a local file's only when its last hard link goes."""
    links: dict[tuple[int, int], list[File]] = defaultdict(list)
    total = 0
    for one in (file for stored in going for file in stored.files.values()):
        if one.inode is None:
            total += one.disk
        else:
            links[one.inode].append(one)
    return total + sum(same[0].disk for same in links.values() if len(same) >= same[0].links)


def _remote(root: str) -> list[Stored]:
    folders: dict[tuple[Kind, str], dict[str, File]] = defaultdict(dict)
    for path, file in _remote_files(root):
        kind, _, rest = path.partition("/")
        name, _, inside = rest.partition("/")
        if kind in KINDS and inside and _FINGERPRINT.fullmatch(name):
            folders[kind, name][inside] = file
    return [
        Stored(kind, name, storage.join(root, kind, name), files, max(file.modified for file in files.values()))
        for (kind, name), files in folders.items()
    ]


def _remote_files(uri: str) -> Iterator[tuple[str, File]]:
    for one in storage.list_objects(uri):
        assert one.modified is not None
        yield one.uri.removeprefix(uri.rstrip("/") + "/"), File(one.size, one.modified)


def _local(root: Path) -> list[Stored]:
    found = []
    for kind in KINDS:
        for entry in _entries(root / kind):
            if entry.is_dir(follow_symlinks=False) and (_FINGERPRINT.fullmatch(entry.name) or _TEMPORARY.fullmatch(entry.name)):
                try:
                    files, stat = local_files(Path(entry.path)), os.lstat(entry.path)
                except FileNotFoundError:  # it was renamed or removed during the listing: somebody is at work there
                    continue
                times = [file.modified for file in files.values()]
                if entry.name.startswith(".") or not files:  # a rename is a sign of life, too
                    times.append(datetime.fromtimestamp(max(stat.st_mtime, stat.st_ctime), UTC))
                found.append(Stored(kind, entry.name, entry.path, files, max(times)))
    return found


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(
            f"cannot list {folder} ({error.strerror}); check that the root of the artifacts may be read"
        ) from error


def local_files(place: Path) -> dict[str, File]:
    """Every file below a folder by its relative name, or the one file by its own. Raises OSError."""
    if not place.is_dir():
        return {place.name: _local_file(place)}
    paths = (Path(parent, name) for parent, _, names in os.walk(place, onerror=_fail) for name in names)
    return {path.relative_to(place).as_posix(): _local_file(path) for path in paths}


def _fail(error: OSError) -> None:
    raise error


def _local_file(path: Path) -> File:
    stat = path.lstat()
    time = datetime.fromtimestamp(stat.st_mtime, UTC)
    return File(stat.st_size, time, (stat.st_dev, stat.st_ino), stat.st_nlink, stat.st_blocks * 512)


def _with_record(stored: Stored) -> Stored:
    if stored.temporary or RECORD not in stored.files:
        return stored
    try:
        content = (
            storage.read_bytes(storage.join(stored.uri, RECORD))
            if storage.is_s3(stored.uri)
            else (Path(stored.uri) / RECORD).read_bytes()
        )
        record = Record.model_validate_json(content)
    except ValueError:
        return _changed(stored, unreadable=True)
    except FileNotFoundError:  # it was deleted meanwhile
        return _changed(stored, unreadable=True)
    fits = (record.kind, record.fingerprint) == (stored.kind, stored.name)
    return _changed(stored, record=record) if fits else _changed(stored, unreadable=True)


def _changed(stored: Stored, **values: Any) -> Stored:
    return Stored(**{**vars(stored), **values})


def _time(value: object) -> datetime | None:
    try:
        time = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
