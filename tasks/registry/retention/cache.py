"""What of the local cache may go: downloads, outlines and copies that nobody has used for some days. All of it can be had again.

Last use is what ``storage_cache.note_use`` noted: the time of change of an object's entry, of the folder of a checkpoint or outline, of
the record of a copy. A blob is in use when an entry that names it is, when a folder in use links to it, or when it was downloaded within
the days. Who uses something notes it first and looks whether it is there then; here it leaves its place first and is looked at again then,
under the lock of those who make it. What a process has open lives until it is closed. Lock files stay: one may be held.
"""

import os
import shutil
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import Timeout

from ota_core.artifact import RECORD
from ota_core.errors import StorageError
from tasks.registry.retention.listing import File, freed, is_temporary_of_live_process, local_files
from tasks.storage.cache import KnownObject, blob_path, forget_digests, locked, remove_tree
from tasks.storage.download import object_lock

_NEVER = datetime.fromtimestamp(0, UTC)


@dataclass(frozen=True)
class Cached:
    """One thing in the cache. Sizes are those on the disk: outlines are mostly holes."""

    kind: str
    """checkpoint, download, outline, copy, partial, leftover."""
    path: Path
    what: str
    used: datetime
    files: Mapping[str, File]

    @property
    def size(self) -> int:
        return sum(one.disk for one in self.files.values())

    @property
    def inodes(self) -> set[Any]:
        return {one.inode for one in self.files.values()}

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.kind, "name": self.path.name, "what": self.what, "bytes": self.size,
            "used": self.used.isoformat(timespec="seconds"), "uri": str(self.path),
        }  # fmt: skip


@dataclass(frozen=True)
class CachePlan:
    """What would go and what stays, largest first."""

    cache: Path
    since: datetime
    going: tuple[Cached, ...]
    kept: tuple[Cached, ...]

    @property
    def frees(self) -> int:
        """Bytes that the deletion gives back: a file's when none of its names stays."""
        return freed(self.going)

    @property
    def listed(self) -> list[Cached]:
        """What goes, without the downloads that a checkpoint in this list is made of."""
        linked = {inode for one in self.going if one.kind == "checkpoint" for inode in one.inodes}
        return [one for one in self.going if one.kind != "download" or not one.inodes & linked]


@dataclass
class CacheOutcome:
    """What a deletion did."""

    deleted: list[Cached] = field(default_factory=list)
    spared: list[Cached] = field(default_factory=list)
    """In use since they were listed."""

    @property
    def frees(self) -> int:
        return freed(self.deleted)


def plan_cache(cache: Path, since: datetime) -> CachePlan:
    """Judge everything in the cache by its last use. Deletes nothing. Raises StorageError when it cannot be read."""
    try:
        found = sorted(_everything(cache), key=lambda one: (-one.size, str(one.path)))
    except PermissionError as error:
        raise StorageError(f"cannot read {error.filename} of the cache ({error.strerror}); run this as its owner") from error
    going = tuple(one for one in found if one.used < since and not is_temporary_of_live_process(one.path.name))
    return CachePlan(cache, since, going, tuple(one for one in found if one not in going))


def collect_cache(plan: CachePlan, progress: Callable[[str, int, int], None] | None = None) -> CacheOutcome:
    """Delete what the plan says; what was used since it was made is spared. What a break leaves, the next call takes."""
    outcome = CacheOutcome()
    # Folders first: a blob whose folder turns out to be in use stays as well.
    order = sorted(plan.going, key=lambda one: one.kind == "download")
    busy: set[Any] = set()
    known = _Known(plan.cache)
    for done, one in enumerate(order):
        if progress:
            progress("delete", done, len(order))
        if one.inodes & busy or not _remove(plan.cache, one, known):
            outcome.spared.append(one)
            busy |= one.inodes
        else:
            outcome.deleted.append(one)
    if progress:
        progress("delete", len(order), len(order))
    forget_digests([one.path / name for one in outcome.deleted if one.kind != "download" for name in one.files], cache=plan.cache)
    for path, entry in _entries(plan.cache):
        if _time(path) < plan.since and not blob_path(plan.cache, entry.digest).is_file():
            path.unlink(missing_ok=True)
    return outcome


class _Known:
    """The entries of every blob, read again when one was added."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._state: dict[Path, datetime] = {}
        self._of: dict[Path, list[Path]] = {}

    def last_use(self, blob: Path) -> datetime:
        """The last use that an entry notes."""
        state = {folder: _time(folder) for folder in (self._cache / "objects", *(self._cache / "objects").glob("*"))}
        if state != self._state:
            self._state, self._of = state, defaultdict(list)
            for path, known in _entries(self._cache):
                self._of[blob_path(self._cache, known.digest)].append(path)
        return max(map(_time, self._of.get(blob, [])), default=_NEVER)


def _remove(cache: Path, one: Cached, known: _Known) -> bool:
    """Whether it is gone: not where it was used since it was listed."""

    def used(place: Path) -> bool:
        return _used(one.kind, place) > one.used

    if one.kind == "leftover":
        if one.path.is_dir():
            shutil.rmtree(one.path)
        else:
            one.path.unlink(missing_ok=True)
        return True
    if one.kind == "download":
        return _remove_blob(one, known)
    if one.kind == "partial":
        return _remove_partial(cache, one)
    lock = {"checkpoint": f"folder {one.path}", "outline": f"outline {one.path.name}", "copy": f"copy {one.path}"}[one.kind]
    with locked(cache, lock):
        return not one.path.is_dir() or remove_tree(one.path, unless=used)


def _remove_blob(one: Cached, known: _Known) -> bool:
    """Its entries stay until the end: without a blob they mean nothing."""
    if known.last_use(one.path) > one.used:
        return False
    trash = one.path.with_name(f".{one.path.name}.{uuid.uuid4().hex[:8]}.trash")
    with suppress(FileNotFoundError):
        os.replace(one.path, trash)
        if known.last_use(one.path) > one.used:
            os.replace(trash, one.path)
            return False
        trash.unlink()
    return True


def _remove_partial(cache: Path, one: Cached) -> bool:
    """Under the download's own lock: a resumed download trusts the parts that it has looked at."""
    try:
        with locked(cache, object_lock(one.path.name.partition("-")[0]), wait=False):
            paths = [one.path.parent / name for name in one.files]
            if any(path.exists() and _time(path) > one.used for path in paths):
                return False
            for path in paths:
                path.unlink(missing_ok=True)
            return True
    except Timeout:
        return False


def _everything(cache: Path) -> Iterator[Cached]:
    entries: dict[Path, list[tuple[datetime, str]]] = defaultdict(list)
    for path, known in _entries(cache):
        entries[blob_path(cache, known.digest)].append((_time(path), known.uri))
    blobs = {path: local_files(path) for path in _names(cache, "blobs/*/*")}
    sources = {
        file.inode: [uri for _, uri in entries[path] if uri.startswith("s3://")] for path, own in blobs.items() for file in own.values()
    }  # fmt: skip
    links: dict[Any, datetime] = {}
    for path in _names(cache, "checkpoints/*"):
        folder = Cached("checkpoint", path, "", _used("checkpoint", path), local_files(path))
        for inode in folder.inodes:
            links[inode] = max(folder.used, links.get(inode, folder.used))
        yield Cached("checkpoint", path, _source(folder, sources), folder.used, folder.files)
    for path in _names(cache, "outlines/*"):
        files = local_files(path)
        for file in files.values():
            links[file.inode] = max(_time(path), links.get(file.inode, _time(path)))
        yield Cached("outline", path, f"headers of {len(files) - 1} files", _time(path), files)
    for path, files in blobs.items():
        signs = [file.modified for file in files.values()] + [time for time, _ in entries[path]]
        signs += [links[file.inode] for file in files.values() if file.inode in links]
        names = next((uris for file in files.values() if (uris := sources[file.inode])), ["object that is no longer known"])
        yield Cached("download", path, min(names), max(signs), files)
    for path in _names(cache, "artifacts/*/*/*"):
        what = f"{path.parent.name} {path.name[:8]} of s3://{path.parents[1].name.replace('+', '/')}"
        yield Cached("copy", path, what, _used("copy", path), local_files(path))
    yield from _partials(cache)
    for pattern in ("checkpoints/.*", "outlines/.*", "blobs/*/.*", "objects/*/.*", "artifacts/*/*/.*"):
        for path in cache.glob(pattern):
            with suppress(FileNotFoundError):  # whoever makes it may finish now
                yield Cached("leftover", path, "interrupted work", _changed(path), local_files(path))


def _partials(cache: Path) -> Iterator[Cached]:
    """Interrupted downloads: each a file and the journal of its finished parts."""
    groups: dict[str, dict[str, File]] = defaultdict(dict)
    for path in (cache / "partial").glob("*-*.*"):
        with suppress(FileNotFoundError):
            groups[path.stem] |= local_files(path)
    for stem, files in groups.items():
        used = max(file.modified for file in files.values())
        yield Cached("partial", cache / "partial" / stem, "interrupted download", used, files)


def _source(folder: Cached, sources: Mapping[Any, Sequence[str]]) -> str:
    """Where a checkpoint came from: the prefix that most of its files were seen below."""
    seen = Counter(
        uri.removesuffix(f"/{name}") for name, file in folder.files.items() for uri in sources.get(file.inode, ()) if uri.endswith(f"/{name}")
    )  # fmt: skip
    return seen.most_common(1)[0][0] if seen else "objects that are no longer known"


def _entries(cache: Path) -> Iterator[tuple[Path, KnownObject]]:
    for path in _names(cache, "objects/*/*.json"):
        with suppress(ValueError, FileNotFoundError):
            yield path, KnownObject.model_validate_json(path.read_text(encoding="utf-8"))


def _names(cache: Path, pattern: str) -> Iterable[Path]:
    return [path for path in cache.glob(pattern) if not path.name.startswith(".")]


def _used(kind: str, folder: Path) -> datetime:
    """The last use of a folder, where it lies now."""
    return _time(folder / RECORD) if kind == "copy" and (folder / RECORD).is_file() else _time(folder)


def _time(path: Path) -> datetime:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    except FileNotFoundError:  # gone: nobody uses it
        return _NEVER


def _changed(path: Path) -> datetime:
    """When a temporary was last changed or renamed."""
    stat = path.stat()
    return datetime.fromtimestamp(max(stat.st_mtime, stat.st_ctime), UTC)
