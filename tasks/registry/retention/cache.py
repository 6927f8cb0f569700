"""What of the local cache may go: downloads, outlines and copies that nobody has used for some days. All of it can be had again.

Last use is what ``tasks.storage.cache.note_use`` noted. A blob is in use as well when a folder in use links to it. Who uses something notes
it first and looks whether it is there then; here it leaves its place first and is looked at again then, under the lock of those who make
it. What a process has open lives until it is closed. Lock files stay: one may be held.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import Timeout

from ota_core.artifact import RECORD
from ota_core.errors import StorageError
from tasks.registry.retention.listing import (
    File,
    Stored,
    is_left_by_the_dead,
    is_temporary_of_live_process,
    last_change,
    local_files,
)
from tasks.registry.retention.plan import Item, Outcome, Plan, largest_first
from tasks.storage.cache import KnownObject, blob_path, forget_digests, last_use, locked, remove_tree
from tasks.storage.download import object_lock

_PLACES = {
    "checkpoint": "checkpoints/*", "outline": "outlines/*", "copy": "artifacts/*/*/*", "partial": "partial/*", "download": "blobs/*/*",
    "written": "written/*", "companions": "gguf-companions/*", "gguf": "gguf/*", "estimate": "estimates/*",
}  # fmt: skip
_LEFTOVERS = (
    "checkpoints/.*", "outlines/.*", "blobs/*/.*", "objects/*/.*", "artifacts/*/*/.*", "written/.*", "gguf-companions/.*", "gguf/.*", "estimates/.*",
)  # fmt: skip
_SAID = {
    "partial": "interrupted download", "written": "a model written for scores or estimates: an adapter on its base, or GGUF", "estimate": "interrupted estimate",
    "companions": "configuration and tokenizer of a GGUF file",
}  # fmt: skip


def plan_cache(cache: Path, since: datetime) -> Plan:
    """Judge everything in the cache by its last use. Deletes nothing. Raises StorageError when it cannot be read."""
    try:
        found = list(_everything(cache))
    except PermissionError as error:
        raise StorageError(f"cannot read {error.filename} of the cache ({error.strerror}); run this as its owner") from error
    linked = {inode for one, _ in found if one.kind != "download" and one.touched >= since for inode in one.inodes}

    def keep(one: Stored) -> bool:
        if one.kind == "leftover" and is_left_by_the_dead(one):
            return False
        in_use = one.touched >= since or (one.kind == "download" and bool(one.inodes & linked))
        return in_use or is_temporary_of_live_process(one.name)

    return Plan(
        str(cache), largest_first(Item(one, *((True, "used") if keep(one) else (False, "unused")), what) for one, what in found)
    )


def collect_cache(plan: Plan, progress: Callable[[str, int, int], None] | None = None) -> Outcome:
    """Delete what the plan says; what was used since it was made is spared. What a break leaves, the next call takes."""
    outcome, cache = Outcome(), Path(plan.root)
    # Folders first: a blob whose folder turns out to be in use stays as well.
    order = sorted(plan.going, key=lambda item: item.stored.kind == "download")
    busy: set[object] = set()
    for done, item in enumerate(order):
        if progress:
            progress("delete", done, len(order))
        one = item.stored
        if (one.kind == "download" and one.inodes & busy) or not _remove(cache, one):
            outcome.spared.append(item)
            busy |= one.inodes
        else:
            outcome.deleted.append(item)
    if progress:
        progress("delete", len(order), len(order))
    gone = (item.stored for item in outcome.deleted if item.stored.kind != "download")
    forget_digests([Path(one.uri) / name for one in gone for name in one.files], cache=cache)
    for path, entry in _entries(cache):
        if not blob_path(cache, entry.digest).is_file():
            path.unlink(missing_ok=True)
    return outcome


def _remove(cache: Path, one: Stored) -> bool:
    """Whether it is gone: not where it was used since it was listed, or somebody works on it."""
    locks = {
        "checkpoint": f"folder {one.uri}", "outline": f"outline {one.name}", "copy": f"copy {one.uri}",
        "partial": object_lock(one.name.partition("-")[0]), "written": f"written {one.name}", "companions": f"gguf {one.name}",
        "gguf": f"gguf links {one.name}",
    }  # fmt: skip
    lock = locks.get(one.kind)
    unless = None if one.kind == "leftover" else lambda place: _used(one.kind, place) > one.touched
    try:
        with locked(cache, lock, wait=False) if lock else nullcontext(), suppress(FileNotFoundError):
            return remove_tree(Path(one.uri), unless=unless)
    except Timeout:
        return False
    return True


def _everything(cache: Path) -> Iterator[tuple[Stored, str]]:
    """Everything in the cache, and what it is in a few words."""
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
                    yield Stored(kind, path.name, str(path), files, _used(kind, path)), _what(kind, path, files, sources)
    for pattern in _LEFTOVERS:
        for path in cache.glob(pattern):
            with suppress(FileNotFoundError):
                yield Stored("leftover", path.name, str(path), local_files(path), last_change(path)), "interrupted work"


def _what(kind: str, path: Path, files: Mapping[str, File], sources: Mapping[int, str]) -> str:
    if kind == "outline":
        return f"headers of {len(files) - 1} files"
    if kind == "copy":
        return f"{path.parent.name} {path.name[:8]} of s3://{path.parents[1].name.replace('+', '/')}"
    if kind == "gguf":
        return f"links to {', '.join(sorted(files)[:2])}"
    if kind in _SAID:
        return _SAID[kind]
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
