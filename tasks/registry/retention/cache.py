"""What of the local cache may go: downloads, outlines and copies that nobody has used for some days. All of it can be had again.

Last use is what ``tasks.storage.cache.note_use`` noted. A blob is in use as well when a folder in use links to it. Who uses something notes
it first and looks whether it is there then; here it leaves its place first and is looked at again then, under the lock of those who make
it. What a process has open lives until it is closed. Lock files stay: one may be held.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import Timeout

from ota_core.artifact import RECORD
from ota_core.errors import StorageError
from tasks.registry.retention.listing import File, freed, is_temporary_of_live_process, last_change, local_files
from tasks.storage.cache import KnownObject, blob_path, forget_digests, last_use, locked, remove_tree
from tasks.storage.download import object_lock

_PLACES = {
    "checkpoint": "checkpoints/*", "outline": "outlines/*", "copy": "artifacts/*/*/*", "partial": "partial/*", "download": "blobs/*/*",
}  # fmt: skip
_LEFTOVERS = ("checkpoints/.*", "outlines/.*", "blobs/*/.*", "objects/*/.*", "artifacts/*/*/.*")


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
    going: tuple[Cached, ...]
    kept: tuple[Cached, ...]

    @property
    def frees(self) -> int:
        """Bytes that the deletion gives back: a file's when none of its names stays."""
        return freed(one.files for one in self.going)

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
        return freed(one.files for one in self.deleted)


def plan_cache(cache: Path, since: datetime) -> CachePlan:
    """Judge everything in the cache by its last use. Deletes nothing. Raises StorageError when it cannot be read."""
    try:
        found = sorted(_everything(cache), key=lambda one: (-one.size, str(one.path)))
    except PermissionError as error:
        raise StorageError(f"cannot read {error.filename} of the cache ({error.strerror}); run this as its owner") from error
    linked = {inode for one in found if one.kind != "download" and one.used >= since for inode in one.inodes}
    going = [one for one in found if one.used < since and not (one.kind == "download" and one.inodes & linked)]
    going = [one for one in going if not is_temporary_of_live_process(one.path.name)]
    return CachePlan(cache, tuple(going), tuple(one for one in found if one not in going))


def collect_cache(plan: CachePlan, progress: Callable[[str, int, int], None] | None = None) -> CacheOutcome:
    """Delete what the plan says; what was used since it was made is spared. What a break leaves, the next call takes."""
    outcome = CacheOutcome()
    # Folders first: a blob whose folder turns out to be in use stays as well.
    order = sorted(plan.going, key=lambda one: one.kind == "download")
    busy: set[Any] = set()
    for done, one in enumerate(order):
        if progress:
            progress("delete", done, len(order))
        if (one.kind == "download" and one.inodes & busy) or not _remove(plan.cache, one):
            outcome.spared.append(one)
            busy |= one.inodes
        else:
            outcome.deleted.append(one)
    if progress:
        progress("delete", len(order), len(order))
    forget_digests([one.path / name for one in outcome.deleted if one.kind != "download" for name in one.files], cache=plan.cache)
    for path, entry in _entries(plan.cache):
        if not blob_path(plan.cache, entry.digest).is_file():
            path.unlink(missing_ok=True)
    return outcome


def _remove(cache: Path, one: Cached) -> bool:
    """Whether it is gone: not where it was used since it was listed, or somebody works on it."""
    locks = {
        "checkpoint": f"folder {one.path}", "outline": f"outline {one.path.name}", "copy": f"copy {one.path}",
        "partial": object_lock(one.path.name.partition("-")[0]),
    }  # fmt: skip
    lock = locks.get(one.kind)
    try:
        with locked(cache, lock, wait=False) if lock else nullcontext(), suppress(FileNotFoundError):
            return remove_tree(
                one.path, unless=None if one.kind == "leftover" else lambda place: _used(one.kind, place) > one.used
            )
    except Timeout:
        return False
    return True


def _everything(cache: Path) -> Iterator[Cached]:
    uris: dict[Path, str] = {}
    for _, known in _entries(cache):
        if known.uri.startswith("s3://"):  # others say what content a hash has
            blob = blob_path(cache, known.digest)
            uris[blob] = min(known.uri, uris.get(blob, known.uri))
    sources = {path.stat().st_ino: uri for path, uri in uris.items() if path.is_file()}
    for kind, pattern in _PLACES.items():
        for path in cache.glob(pattern):
            if not path.name.startswith("."):
                with suppress(FileNotFoundError):  # whoever makes or removes it may finish now
                    files = local_files(path)
                    yield Cached(kind, path, _what(kind, path, files, sources), _used(kind, path), files)
    for pattern in _LEFTOVERS:
        for path in cache.glob(pattern):
            with suppress(FileNotFoundError):
                yield Cached("leftover", path, "interrupted work", last_change(path), local_files(path))


def _what(kind: str, path: Path, files: Mapping[str, File], sources: Mapping[int, str]) -> str:
    if kind == "outline":
        return f"headers of {len(files) - 1} files"
    if kind == "copy":
        return f"{path.parent.name} {path.name[:8]} of s3://{path.parents[1].name.replace('+', '/')}"
    if kind == "partial":
        return "interrupted download"
    # The largest file is the one that no other model has.
    name, largest = max(files.items(), key=lambda item: item[1].size, default=("", None))
    uri = sources.get(largest.inode[1]) if largest and largest.inode else None
    if uri is None:
        return "objects that are no longer known" if kind == "checkpoint" else "object that is no longer known"
    return uri.removesuffix(f"/{name}") if kind == "checkpoint" else uri


def _entries(cache: Path) -> Iterable[tuple[Path, KnownObject]]:
    for path in cache.glob("objects/*/[!.]*.json"):
        with suppress(ValueError, FileNotFoundError):
            yield path, KnownObject.model_validate_json(path.read_text(encoding="utf-8"))


def _used(kind: str, place: Path) -> datetime:
    """The last use of what lies at this place now."""
    path = place / RECORD if kind == "copy" and (place / RECORD).is_file() else place
    return datetime.fromtimestamp(last_use(path, blob=kind == "download"), UTC)
