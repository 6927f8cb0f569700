"""The local cache: files by their content, what is known of remote objects, and digests that are computed once per file.

<cache>/blobs/<aa>/<digest>        file contents, read-only
<cache>/objects/<aa>/<key>.json    which content a remote object of this ETag and size has
<cache>/checkpoints/<digest>/      checkpoint folders, hard links into blobs
<cache>/outlines/<key>/            headers of models that are read in S3 by ranges (tasks/storage/streaming/outline.py)
<cache>/partial/                   downloads under way
<cache>/locks/                     one lock file per object, checkpoint or artifact
<cache>/digests.sqlite             digest by (path, size, time of change, inode)
<cache>/artifacts/<root>/…         outputs that were made here and published to S3 (tasks/artifacts/store.py)

Last use is noted by ``note_use``: of a blob in its time of access, since digests.sqlite would take every link to it for a changed file if
its time of change moved; of a checkpoint's folder, an outline or an artifact in its time of change.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import xxhash
from filelock import FileLock
from pydantic import BaseModel, ConfigDict

from ota_core.artifact import canonical_json, write_text_atomic
from ota_core.errors import StorageError
from ota_core.held import hold

log = logging.getLogger(__name__)

CHUNK = 8 * 1024 * 1024
# Last use is noted no finer than this.
USE_NOTED_SECONDS = 3600.0
HASH_THREADS = 4
# A file changed less than this ago may change again within the resolution of its time stamp; its digest is not remembered.
SETTLED_NS = 2_000_000_000
_MEMO_TABLE = "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, size INT, mtime INT, inode INT, digest TEXT)"


class FileInfo(BaseModel):
    """One file of a checkpoint."""

    model_config = ConfigDict(frozen=True)

    size: int
    digest: str
    """``xxh3:`` and 32 hex digits, the XXH3-128 of the content."""


class KnownObject(BaseModel):
    """What a remote object turned out to hold."""

    model_config = ConfigDict(frozen=True)

    uri: str
    size: int
    etag: str
    digest: str
    sha256: str | None = None
    """Known only where something was compared with it."""


def hash_file(path: Path, *, also: Sequence[str] = ()) -> dict[str, str]:
    """The file's XXH3-128 under ``xxh3`` and, from the same pass, hashlib digests such as ``sha256`` and ``md5``; all in hex."""
    fast = xxhash.xxh3_128()
    others = {name: hashlib.new(name, usedforsecurity=False) for name in also}
    buffer = memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            fast.update(buffer[:count])
            for other in others.values():
                other.update(buffer[:count])
    return {"xxh3": fast.hexdigest()} | {name: other.hexdigest() for name, other in others.items()}


def digest_file(path: Path, *, cache: Path) -> str:
    """``xxh3:<32 hex digits>`` of a file's content, remembered until its size, time of change or inode differs.

    Raises StorageError when the file cannot be read.
    """
    try:
        key = _memo_key(path)
        with _memo(cache) as memo:
            row = memo.execute("SELECT digest FROM digests WHERE path=? AND size=? AND mtime=? AND inode=?", key).fetchone()
        if row:
            return str(row[0])
        digest = "xxh3:" + hash_file(path)["xxh3"]
        unchanged = _memo_key(path) == key
    except OSError as error:
        raise StorageError(f"cannot read {path} ({error.strerror}); check that it exists and may be read") from error
    if not unchanged:
        raise StorageError(f"{path} changed while it was read; wait until whatever writes it is done, then run again")
    if time.time_ns() - key[2] > SETTLED_NS:
        remember_digests({path: digest}, cache=cache)
    return digest


def remember_digests(digests: Mapping[Path, str], *, cache: Path) -> None:
    """Note the digests of files that are known already, so that these are not read again."""
    rows = [(*_memo_key(path), digest) for path, digest in digests.items()]
    with _memo(cache) as memo, memo:
        memo.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?)", rows)


def forget_digests(paths: Iterable[Path], *, cache: Path) -> None:
    """Drop the digests of files that are gone."""
    with _memo(cache) as memo, memo:
        memo.executemany("DELETE FROM digests WHERE path=?", [(str(path),) for path in paths])


def digest_files(folder: Path, names: Sequence[str], *, cache: Path) -> dict[str, FileInfo]:
    """Size and digest of these files below a folder."""

    def info(name: str) -> FileInfo:
        return FileInfo(digest=digest_file(folder / name, cache=cache), size=(folder / name).stat().st_size)

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(info, names), strict=True))


def combined_digest(files: Mapping[str, FileInfo]) -> str:
    """The digest of a set of files: over (name, size, digest) in the order of their names."""
    listing = [[name, files[name].size, files[name].digest] for name in sorted(files)]
    return "xxh3:" + xxhash.xxh3_128_hexdigest(canonical_json(listing).encode())


@contextmanager
def locked(cache: Path, name: str, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of this name against other threads and processes; the system releases it when a process dies.

    Without ``wait``, raises filelock.Timeout when somebody else holds it.
    """
    folder = cache / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{_short_key(name)}.lock", thread_local=False, blocking=wait):
        yield


def last_use(path: Path, *, blob: bool = False) -> float:
    """When this was last used, in seconds since 1970; 0 for what is gone."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0.0
    return max(stat.st_mtime, stat.st_atime) if blob else stat.st_mtime


def note_use(path: Path, *, blob: bool = False) -> None:
    """Note that this file or folder is in use, if no use was noted within the hour. A missing one is left so."""
    try:
        if time.time() - last_use(path, blob=blob) > USE_NOTED_SECONDS:
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns if blob else time.time_ns()))
    except FileNotFoundError:
        pass
    except OSError as error:  # somebody else's folder, or a read-only disk: it can be used all the same
        log.warning("cannot note that %s is in use (%s); ota gc may take it for unused", path, error.strerror)


def blob_path(cache: Path, digest: str) -> Path:
    hexdigits = digest.removeprefix("xxh3:")
    return cache / "blobs" / hexdigits[:2] / hexdigits


def find_object(cache: Path, endpoint: str, uri: str, etag: str, size: int) -> KnownObject | None:
    """The entry of an unchanged object whose content is still in the cache; a blob of the wrong size is thrown away."""
    try:
        known = KnownObject.model_validate_json(_object_path(cache, endpoint, uri, etag, size).read_text())
    except FileNotFoundError:
        return None
    blob = blob_path(cache, known.digest)
    note_use(blob, blob=True)  # before the look at it: who cleans up removes first, then looks again whether it is in use
    if not blob.is_file():
        return None
    if blob.stat().st_size != size:
        blob.unlink()
        return None
    return known


def keep_object(cache: Path, endpoint: str, known: KnownObject) -> None:
    """Note what a remote object holds; its blob must be there already."""
    path = _object_path(cache, endpoint, known.uri, known.etag, known.size)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, known.model_dump_json())


def keep_blob(cache: Path, path: Path, digest: str) -> None:
    """Move a finished file into the cache under its content's name. Equal content that is there already stays."""
    blob = blob_path(cache, digest)
    note_use(blob, blob=True)
    if blob.is_file() and blob.stat().st_size == path.stat().st_size:
        path.unlink()
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    # Read-only: checkpoint folders are links to this very file, and a change through one would change them all.
    path.chmod(0o444)
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(path, blob)


def link_folder(cache: Path, target: Path, files: Mapping[str, FileInfo]) -> Path:
    """A folder with these files out of the cache's blobs, complete or not there: built beside its place and renamed."""
    with locked(cache, f"folder {target}"):
        if target.is_dir():
            if all((target / name).is_file() and (target / name).stat().st_size == info.size for name, info in files.items()):
                note_use(target)
                return target
            remove_tree(target)
        with appearing(target) as folder:
            for name, info in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(blob_path(cache, info.digest), folder / name)
        remember_digests({target / name: info.digest for name, info in files.items()}, cache=cache)
    return target


def link_name(name: Path, target: Path) -> None:
    """Let ``name`` lead to ``target``, in one step."""
    if name.is_symlink() and name.readlink() == target:
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    temporary = name.with_name(f".{name.name}.{os.getpid()}")
    temporary.symlink_to(target)
    os.replace(temporary, name)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link; a copy on file systems that have none, or across two of them."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
        shutil.copyfile(source, target)


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A new empty folder that becomes ``target`` at the end, in one step; after an error nothing of it stays.

    The caller holds a lock of ``target``: what killed processes left beside it is removed.
    """
    for stale in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(stale)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_tree(folder: Path, *, unless: Callable[[Path], bool] | None = None) -> bool:
    """Remove a folder or file; it leaves its name in one step, so that no reader sees half of it. Returns whether it is gone.

    ``unless`` is asked before and, with the folder's place then, once nobody can find it any more: who came to use it in between is
    seen, and it goes back.
    """
    if unless and unless(folder):
        return False
    trash = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.trash")
    handle = os.open(folder, os.O_RDONLY)
    try:
        hold(handle, folder)  # says to `ota gc` that somebody still works on it
        os.replace(folder, trash)
        if unless and unless(trash):
            try:
                os.rename(trash, folder)
                return False
            except OSError:  # it was made anew already
                pass
        if trash.is_dir():
            shutil.rmtree(trash)
        else:
            trash.unlink()
    finally:
        os.close(handle)
    return True


def _object_path(cache: Path, endpoint: str, uri: str, etag: str, size: int) -> Path:
    key = _short_key(json.dumps([endpoint, uri, etag, size]))
    return cache / "objects" / key[:2] / f"{key}.json"


def _short_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _memo_key(path: Path) -> tuple[str, int, int, int]:
    real = path.resolve(strict=True)
    stat = real.stat()
    return str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino


@contextmanager
def _memo(cache: Path) -> Iterator[sqlite3.Connection]:
    path = cache / "digests.sqlite"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the cache {cache} cannot be made ({error.strerror}); let OTA_HOME name a folder that may be written"
        ) from error
    try:
        with closing(sqlite3.connect(path, timeout=60)) as memo:
            memo.execute(_MEMO_TABLE)
            yield memo
    except sqlite3.Error as error:
        raise StorageError(f"{path}, the memory of file digests, cannot be used ({error}); delete it, it is made anew") from error
