"""What lies below a root of artifacts, from one listing: outputs with their records, and what interrupted work left.

Only ``<kind>/<32 hex digits>/`` counts, and the store's own temporaries beside it. Everything else below the root, such as a published
model (``merged/<name>/<version>/``), is somebody else's and not seen.
"""

import os
import platform
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from ota_core.artifact import RECORD, Kind, Record, has_size, parse_record
from ota_core.errors import StorageError
from ota_core.held import is_abandoned
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
    disk: int
    """Bytes that it takes: a local file may have holes."""
    inode: tuple[int, int] | None = None
    """Device and inode of a local file: hard links of one file are one on the disk."""
    links: int = 1


@dataclass(frozen=True)
class Stored:
    """One folder below the root, or one thing in the local cache."""

    kind: str
    """Of an artifact, or of what lies in the cache: checkpoint, download, outline, copy, partial, written, companions, gguf, estimate, leftover."""
    name: str
    """The fingerprint, or the whole name of a temporary."""
    uri: str
    files: Mapping[str, File]
    touched: datetime
    """When anything in it was last written; in a local folder, also when somebody last found it."""
    record: Record | None = None
    """Of an output whose record can be read."""
    unreadable: bool = False
    """There is a record, but not one that this version understands."""

    @property
    def complete(self) -> bool:
        listed = self.record.files if self.record else {}
        return self.record is not None and all(
            name in self.files and has_size(name, self.files[name].size, size) for name, size in listed.items()
        )

    @property
    def temporary(self) -> bool:
        return self.name.startswith(".")

    @property
    def size(self) -> int:
        """Bytes that all files take."""
        return sum(one.disk for one in self.files.values())

    @property
    def inodes(self) -> set[object]:
        return {one.inode for one in self.files.values()}

    @property
    def used(self) -> datetime:
        """The last sign of use: produced, written, or found."""
        try:
            produced = datetime.fromisoformat(str(self.record.provenance["produced_at"])) if self.record else self.touched
        except (KeyError, ValueError):
            return self.touched
        return max(self.touched, produced if produced.tzinfo else produced.replace(tzinfo=UTC))


def is_temporary_of_live_process(name: str) -> bool:
    """Whether this is the name of a temporary of the store whose process runs on this machine."""
    owner = _OWNED.fullmatch(name)
    return owner is not None and owner["host"] == platform.node() and is_alive(int(owner["pid"]), float(owner["started"]))


def is_left_by_the_dead(one: Stored) -> bool:
    """Whether who made or renamed this temporary is known to be dead: by its name, on this machine, or by the lock on what was being deleted."""
    if one.name.endswith(".trash"):
        return is_abandoned(Path(one.uri))
    owner = _OWNED.fullmatch(one.name)
    return owner is not None and owner["host"] == platform.node() and not is_temporary_of_live_process(one.name)


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
    before, now = ({n: (one.size, one.modified) for n, one in some.items()} for some in (stored.files, files))
    return before == now


def _remote(root: str) -> Iterator[Stored]:
    folders: dict[tuple[Kind, str], dict[str, File]] = defaultdict(dict)
    for path, file in _remote_files(root):
        kind, _, rest = path.partition("/")
        name, _, inside = rest.partition("/")
        if kind in KINDS and inside and _FINGERPRINT.fullmatch(name):
            folders[kind, name][inside] = file
    for (kind, name), files in folders.items():
        yield Stored(kind, name, storage.join(root, kind, name), files, max(file.modified for file in files.values()))


def _remote_files(uri: str) -> Iterator[tuple[str, File]]:
    for one in storage.list_objects(uri):
        assert one.modified is not None
        yield one.uri.removeprefix(uri.rstrip("/") + "/"), File(one.size, one.modified, one.size)


def _local(root: Path) -> Iterator[Stored]:
    for kind in KINDS:
        try:
            entries = [path for path in (root / kind).iterdir() if path.is_dir() and not path.is_symlink()]
        except FileNotFoundError:
            continue
        except OSError as error:
            raise StorageError(
                f"cannot list {root / kind} ({error.strerror}); check that the root of the artifacts may be read"
            ) from error
        for path in entries:
            if not (_FINGERPRINT.fullmatch(path.name) or _TEMPORARY.fullmatch(path.name)):
                continue
            try:
                files, changed = local_files(path), last_change(path)
            except FileNotFoundError:  # it was renamed or removed during the listing: somebody is at work there
                continue
            times = [file.modified for file in files.values()]
            if path.name.startswith(".") or not files:  # a rename is a sign of life, too
                times.append(changed)
            yield Stored(kind, path.name, str(path), files, max(times))


def local_files(place: Path) -> dict[str, File]:
    """Every file below a folder by its relative name, or the one file by its own. Raises OSError."""
    if not place.is_dir():
        return {place.name: _local_file(place)}
    paths = (Path(parent, name) for parent, _, names in os.walk(place, onerror=_fail) for name in names)
    return {path.relative_to(place).as_posix(): _local_file(path) for path in paths}


def last_change(path: Path) -> datetime:
    """When a file or folder was last changed or renamed. Raises OSError."""
    stat = path.lstat()
    return datetime.fromtimestamp(max(stat.st_mtime, stat.st_ctime), UTC)


def _fail(error: OSError) -> None:
    raise error


def _local_file(path: Path) -> File:
    stat = path.lstat()
    time, disk = datetime.fromtimestamp(stat.st_mtime, UTC), min(stat.st_size, stat.st_blocks * 512)
    return File(stat.st_size, time, disk, (stat.st_dev, stat.st_ino), stat.st_nlink)


def _with_record(stored: Stored) -> Stored:
    if stored.temporary or RECORD not in stored.files:
        return stored
    try:
        record = parse_record(storage.read_note(storage.join(stored.uri, RECORD)) or b"")
    except ValueError:  # of another version, or deleted meanwhile
        return replace(stored, unreadable=True)
    fits = (record.kind, record.fingerprint) == (stored.kind, stored.name)
    return replace(stored, record=record) if fits else replace(stored, unreadable=True)
