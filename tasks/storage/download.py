"""Downloads of S3 objects: parallel ranged parts, resumed after a break, verified, kept by content."""

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ota_core.errors import StorageError
from ota_core.files.room import Need, check_room
from tasks.storage import s3
from tasks.storage.cache import KnownObject, blob_path, find_object, hash_file, keep_blob, keep_object, locked
from tasks.storage.s3_body import pieces

Progress = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all, from any thread, one call at a time."""

PART_SIZE = 16 * s3.MIB
OBJECTS_AT_ONCE = 4


def download(
    objects: Sequence[s3.S3Object],
    *,
    cache: Path,
    sha256: Mapping[str, str] | None = None,
    threads: int = 8,
    part_size: int = PART_SIZE,
    progress: Progress | None = None,
) -> dict[str, KnownObject]:
    """Bring these objects into the cache's blobs and tell by address what each holds.

    An object that is in the cache already, under this address and ETag or as equal content under another, is not downloaded.
    ``sha256`` holds what a manifest expects, in hex, by address. Raises StorageError when an object cannot be read, was replaced
    since the listing, or differs from what the manifest, the server's SHA-256 or the server's MD5 say. Parts downloaded before
    a break stay and are used by the next call.
    """
    tick = Ticker(progress, sum(one.size for one in objects))
    workers = max(1, min(threads, s3.POOL_CONNECTIONS))
    with s3.Threads(workers) as parts, s3.Threads(OBJECTS_AT_ONCE) as whole:
        job = _Job(s3.client(patient=True), cache, parts, part_size, tick)
        _check_room(objects, job)
        futures = {one.uri: whole.submit(_obtain, one, job, (sha256 or {}).get(one.uri)) for one in objects}
        try:
            done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
            failed = [error for error in (future.exception() for future in done) if error]
            if failed:
                raise failed[0]
        except BaseException:
            job.stop.set()
            whole.shutdown(wait=False, cancel_futures=True)
            raise
        return {uri: future.result() for uri, future in futures.items()}


class Ticker:
    """Adds up bytes of several threads for one progress callback."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done, self._lock = progress, total, 0, threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._total)


@dataclass(frozen=True)
class _Job:
    """What the downloads of one call share."""

    s3: Any
    cache: Path
    parts: ThreadPoolExecutor
    part_size: int
    tick: Ticker
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when one object failed: the others end at their next block."""

    @property
    def endpoint(self) -> str:
        return str(self.s3.meta.endpoint_url)


@dataclass(frozen=True)
class _Claim:
    """What somebody says about an object's content."""

    kind: str
    value: str
    source: str


def _check_room(objects: Sequence[s3.S3Object], job: _Job) -> None:
    """Raise StorageError where the cache's disk has not the room for everything that is not there yet."""
    missing = 0
    for one in objects:
        if find_object(job.cache, job.endpoint, one.uri, one.etag, one.size) is None:
            path, _ = _partial_paths(one, job)
            missing += one.size - (path.stat().st_blocks * 512 if path.is_file() else 0)
    check_room([Need(job.cache, missing, f"downloads of {len(objects)} objects")])


def _obtain(one: s3.S3Object, job: _Job, expected: str | None) -> KnownObject:
    """The object's content in the cache: found there, or downloaded and verified. One at a time per object on this machine."""
    expected = expected.lower() if expected else None
    with locked(job.cache, object_lock(_place(one, job))):
        known = find_object(job.cache, job.endpoint, one.uri, one.etag, one.size)
        noted = known
        if known is None:
            known = _find_equal_or_download(one, job, expected)
        else:
            job.tick(one.size)
        if expected and known.sha256 != expected:
            seen = known.sha256 or hash_file(blob_path(job.cache, known.digest), also=["sha256"])["sha256"]
            if seen != expected:
                raise _mismatch(one, _Claim("sha256", expected, "its manifest expert.json"), seen)
            known = known.model_copy(update={"sha256": seen})
        if known != noted:
            keep_object(job.cache, job.endpoint, known)
    return known


def _find_equal_or_download(one: s3.S3Object, job: _Job, expected: str | None) -> KnownObject:
    """The content under another address where the server or the manifest tells a hash that the cache knows, else a download."""
    answer = s3.head(one.uri)
    if answer is None or answer["ETag"].strip('"') != one.etag:
        what = f"{one.uri} was replaced or deleted since it was listed (its ETag was {one.etag}); run again"
        raise StorageError(what, reason="changed")
    stated = s3.expected_checksums(answer)
    if expected and stated.get("sha256", expected) != expected:
        raise _mismatch(one, _Claim("sha256", expected, "its manifest expert.json"), stated["sha256"])
    claim = None
    if expected:
        claim = _Claim("sha256", expected, "its manifest expert.json")
    elif "sha256" in stated:
        claim = _Claim("sha256", stated["sha256"], "the SHA-256 stored with the object")
    elif "md5" in stated:
        claim = _Claim("md5", stated["md5"], "its ETag")
    if claim is None:
        return _download_and_verify(one, job, None)
    with locked(job.cache, f"content {claim.kind} {claim.value}"):
        equal = find_object(job.cache, claim.kind, claim.kind, claim.value, one.size)
        if equal:
            job.tick(one.size)
            return equal.model_copy(update={"uri": one.uri, "etag": one.etag})
        known = _download_and_verify(one, job, claim)
        keep_object(job.cache, claim.kind, known.model_copy(update={"uri": claim.kind, "etag": claim.value}))
    return known


def _download_and_verify(one: s3.S3Object, job: _Job, claim: _Claim | None) -> KnownObject:
    path, journal = _partial_paths(one, job)
    _download_parts(one, job, path, journal)
    seen = hash_file(path, also=[claim.kind] if claim else [])
    if claim and seen[claim.kind] != claim.value:
        path.unlink()
        journal.unlink()
        raise _mismatch(one, claim, seen[claim.kind])
    known = KnownObject(uri=one.uri, size=one.size, etag=one.etag, digest="xxh3:" + seen["xxh3"], sha256=seen.get("sha256"))
    keep_blob(job.cache, path, known.digest)
    journal.unlink()
    return known


def _mismatch(one: s3.S3Object, claim: _Claim, seen: str) -> StorageError:
    return StorageError(
        f"{one.uri} is damaged or was replaced: {claim.source} says {claim.kind} {claim.value}, "
        f"but its content has {claim.kind} {seen}; upload the file and its manifest again"
    )


def object_lock(place: str) -> str:
    """The lock of one object's download, by the part of its partial files' names before the "-"."""
    return f"object {place}"


def _place(one: s3.S3Object, job: _Job) -> str:
    return hashlib.sha256(f"{job.endpoint} {one.uri}".encode()).hexdigest()[:32]


def _partial_paths(one: s3.S3Object, job: _Job) -> tuple[Path, Path]:
    """Where this object's download grows, and its journal. Remains of other versions of the object are removed."""
    place = _place(one, job)
    version = hashlib.sha256(f"{one.etag} {one.size} {job.part_size}".encode()).hexdigest()[:16]
    folder = job.cache / "partial"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{place}-{version}.part"
    journal = path.with_suffix(".journal")
    for other in folder.glob(f"{place}-*"):
        if other not in (path, journal):
            other.unlink()
    return path, journal


def _download_parts(one: s3.S3Object, job: _Job, path: Path, journal: Path) -> None:
    """Fill the preallocated file with the parts that it lacks. Each finished part is noted in the journal with its hash."""
    starts = range(0, one.size, job.part_size)
    done = _finished_parts(path, journal, one.size, job.part_size)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    log = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        _preallocate(file, path, one.size)
        job.tick(sum(min(job.part_size, one.size - starts[index]) for index in done))

        def part(index: int) -> None:
            start, stop = starts[index], min(starts[index] + job.part_size, one.size)
            with s3.s3_errors("download", one.uri, job.s3):
                digest = _download_part(one, job, file, start, stop)
            os.write(log, f"{index} {digest}\n".encode())
            job.tick(stop - start)

        futures = [job.parts.submit(part, index) for index in range(len(starts)) if index not in done]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
        finally:
            for future in futures:
                future.cancel()
            wait(futures)  # no thread may write to a file that is closed
    finally:
        os.close(file)
        os.close(log)


def _finished_parts(path: Path, journal: Path, size: int, part_size: int) -> set[int]:
    """The parts that an earlier try completed. They are hashed again: after a power failure the journal may be ahead of them."""
    if not (path.is_file() and journal.is_file()) or path.stat().st_size != size:
        path.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
        return set()
    done = set()
    with open(path, "rb") as stream:
        for line in journal.read_text(errors="replace").splitlines():
            index, _, digest = line.partition(" ")
            if not index.isdecimal() or int(index) * part_size >= size:
                continue  # the last line of a killed process may be torn
            stream.seek(int(index) * part_size)
            if xxhash.xxh3_128_hexdigest(stream.read(part_size)) == digest:
                done.add(int(index))
    return done


def _preallocate(file: int, path: Path, size: int) -> None:
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.ftruncate(file, size)
    except OSError as error:
        hint = "free some space or choose another cache folder"
        what = f"cannot reserve {size:,} bytes for {path} ({error.strerror}); {hint}"
        raise StorageError(what, reason="unavailable") from error


def _download_part(one: s3.S3Object, job: _Job, file: int, start: int, stop: int) -> str:
    """Write bytes [start, stop) of the object to their place; returns their XXH3-128."""
    digest, position = xxhash.xxh3_128(), start
    for piece in pieces(job.s3, one, start, stop):
        if job.stop.is_set():
            raise CancelledError
        digest.update(piece)
        os.pwrite(file, piece, position)
        position += len(piece)
    return digest.hexdigest()
