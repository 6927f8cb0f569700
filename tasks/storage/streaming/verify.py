"""Whether the bytes that were streamed are those that were stored: what passes is folded into a digest that somebody keeps.

Of a file that is the SHA-256 of ``expert.json``, or that of its uploader, or the MD5 that S3's ETag is, of parts too; of a file of torch the
CRC-32 that it holds of each tensor, so that a part of it can be checked alone. A digest takes bytes in their order, and chunks arrive nearly so: those that come early
wait, within a limit of memory. What is left at the end is asked for again. A chunk that is read twice must be the same twice.

Of a file that was found to be right, digests of its blocks are kept beside its outline: whoever reads it later on this machine, in any
order and any part of it, compares with those and asks for nothing again.
"""

import hashlib
import logging
import os
import threading
import uuid
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import xxhash

from ota_core.errors import StorageError
from tasks.storage import s3
from tasks.storage.s3_body import read_exactly
from tasks.storage.streaming.remote_file import chunk_spans

log = logging.getLogger(__name__)

UNREAD = 8
"""A file of which less than this part of its bytes was not asked for is brought to its end; of another one nothing can be said."""
_READS_AT_ONCE = 8
_BLOCK = 64 * 1024  # every chunk begins at a multiple of it, and ends at one or with the file
_DIGEST = 16


class Digest(Protocol):
    """What takes bytes in their order."""

    def update(self, data: Any, /) -> None: ...

    def hexdigest(self) -> str: ...


class Crc32:
    """The CRC-32 of zip files."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: Any, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def hexdigest(self) -> str:
        return f"{self._value:08x}"


class PartsMd5:
    """S3's ETag of an upload in parts: the MD5 of their MD5s, and their number."""

    def __init__(self, part_size: int) -> None:
        self._size, self._room, self._part, self._sums = part_size, part_size, _md5(), bytearray()

    def update(self, data: Any, /) -> None:
        view = memoryview(data)
        while view:
            piece, view = view[: self._room], view[self._room :]
            self._part.update(piece)
            self._room -= len(piece)
            if not self._room:
                self._sums += self._part.digest()
                self._part, self._room = _md5(), self._size

    def hexdigest(self) -> str:
        sums = self._sums + (self._part.digest() if self._room < self._size else b"")
        return f"{hashlib.md5(sums, usedforsecurity=False).hexdigest()}-{len(sums) // 16}"


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)


@dataclass(frozen=True)
class Claim:
    """What somebody says of bytes."""

    value: str
    source: str
    """In words."""
    start: Callable[[], Digest]
    """What makes it out of the bytes."""


class Room:
    """Bytes that chunks may take that wait for those before them, of all files together."""

    def __init__(self, limit: int) -> None:
        self._left, self._lock = limit, threading.Lock()

    def take(self, count: int) -> bool:
        with self._lock:
            if count > self._left:
                return False
            self._left -= count
            return True

    def give_back(self, count: int) -> None:
        with self._lock:
            self._left += count


@dataclass
class _Fold:
    """A range of bytes with a digest, and how far it has come."""

    start: int
    stop: int
    claim: Claim | None = None
    digest: Digest | None = None
    at: int = 0
    waiting: dict[int, memoryview] = field(default_factory=dict)
    busy: bool = False
    """A thread folds; others leave their chunk to it."""


class Verifier:
    """Of one file. ``passed`` is told every chunk; ``finish`` says what could not be checked, and raises where the bytes are not those stored."""

    def __init__(
        self, one: s3.S3Object, client: Any, *, outline: Path, extents: Sequence[tuple[int, int]], cuts: Sequence[int], sums: Sequence[int],
        chunk: int, room: Room, sha256: str | None, ledger: Path | None = None,
    ) -> None:  # fmt: skip
        """``ledger``: where the digests of the blocks of a file lie that was found to be right. ``cuts``: where records of a torch file begin and end, ``sums``: their CRC-32, 0 for one without. ``chunk``: as the file is read in."""
        self._one, self._client, self._outline, self._extents = one, client, outline, sorted(extents)
        self._cuts, self._chunk, self._room, self._sha256 = sorted({0, *cuts, one.size}), chunk, room, sha256
        self._lock, self._seen = threading.Lock(), dict[int, bytes]()
        pairs = list(zip(cuts[::2], cuts[1::2], sums, strict=True)) if sums else []
        self._folds = [_Fold(start, stop, _crc(crc), at=start) for start, stop, crc in pairs] or [_Fold(0, one.size)]
        self._begins = [fold.start for fold in self._folds]
        self._by_record = bool(pairs)
        self._asked = False
        self._ledger = None if self._by_record else ledger
        self._right = _read_ledger(self._ledger, one.size) if self._ledger else None

    def passed(self, first: int, content: memoryview) -> None:
        """A chunk has arrived. Raises StorageError when it is not what it was before, or the digest that it completes is another one."""
        self._compare(first, content)
        fold = self._fold_of(first)
        if fold is None or self._right is not None:
            return
        self._know(fold)
        with self._lock:
            if fold.claim is None or first < fold.at or first in fold.waiting or not self._room.take(len(content)):
                return
            fold.waiting[first] = content
            if fold.busy:
                return
            fold.busy = True
        self._go_on(fold)

    def finish(self, *, whole: bool = False) -> str | None:
        """Bring every digest to its end. Returns what could not be checked, in words; raises StorageError for bytes that are not those stored.

        ``whole``: also where little of the file was read, or nothing.
        """
        unread = 0
        if self._right is not None:
            return None
        for fold in self._folds:
            spans = list(chunk_spans(self._cuts, self._chunk, fold.start, fold.stop))
            missing = sum(last - first for first, last in spans if first not in self._seen)
            if whole:
                self._know(fold)
            elif missing == fold.stop - fold.start:
                continue
            if fold.claim is None or (not self._by_record and not whole and missing * UNREAD > fold.stop - fold.start):
                unread += fold.stop - fold.start - (0 if whole else missing)
            elif fold.at < fold.stop:
                self._complete(fold, [span for span in spans if span[0] >= fold.at])
        (last, *others), self._folds = self._folds, []
        if self._ledger is not None and not others and last.claim is not None and last.at == self._one.size:
            _write_ledger(self._ledger, b"".join(self._seen[first] for first in sorted(self._seen)))
        if not unread:
            return None
        why = "nobody keeps a digest of it" if self._asked and not self._sha256 else "only a part of it was read"
        return f"{self._one.uri}: {unread:,} bytes were read and could not be checked against a digest ({why}); --fetch reads whole files"

    def _complete(self, fold: _Fold, spans: Sequence[tuple[int, int]]) -> None:
        def bring(span: tuple[int, int]) -> memoryview:
            held = fold.waiting.get(span[0])
            content = held if held is not None else read_exactly(self._client, self._one, *span)
            self._compare(span[0], content)
            return content

        with s3.Threads(_READS_AT_ONCE) as pool:
            for start in range(0, len(spans), _READS_AT_ONCE):
                some = spans[start : start + _READS_AT_ONCE]
                for (first, _), content in zip(some, pool.map(bring, some), strict=True):
                    self._take(fold, first, content)
        for content in fold.waiting.values():
            self._room.give_back(len(content))
        fold.waiting.clear()

    def _fold_of(self, first: int) -> _Fold | None:
        place = bisect_right(self._begins, first) - 1
        return self._folds[place] if 0 <= place < len(self._folds) and first < self._folds[place].stop else None

    def _know(self, fold: _Fold) -> None:
        """Find out once what is said of the file."""
        if self._by_record or self._asked:
            return
        with self._lock:
            if not self._asked:
                fold.claim = claim_of(self._one, self._client, self._sha256)
                self._asked = True

    def _compare(self, first: int, content: memoryview) -> None:
        """With what an earlier read of this chunk brought, and with what the outline holds of it."""
        digest = b"".join(xxhash.xxh3_128_digest(content[i : i + _BLOCK]) for i in range(0, len(content), _BLOCK))
        with self._lock:
            known = self._seen.setdefault(first, digest)
        if self._right is not None:
            place = first // _BLOCK * _DIGEST
            known = self._right[place : place + len(digest)]
        if known != digest:
            raise StorageError(
                f"{self._one.uri}: the bytes from {first:,} on were others when they were read before, though its ETag is the same; what lies "
                "there, or the way to it, is damaged"
            )
        for start, stop in self._extents:
            low, high = max(start, first), min(stop, first + len(content))
            if low < high:
                with open(self._outline, "rb") as stream:
                    stream.seek(low)
                    if stream.read(high - low) != content[low - first : high - first]:
                        raise StorageError(
                            f"{self._one.uri}: its header, bytes {low:,} to {high:,}, is another one than when it was read before; what lies there, or "
                            "the way to it, is damaged"
                        )

    def _go_on(self, fold: _Fold) -> None:
        """Fold what waits, as far as it goes."""
        while True:
            with self._lock:
                content = fold.waiting.pop(fold.at, None)
                if content is None:
                    fold.busy = False
                    return
            try:
                self._take(fold, fold.at, content)
            finally:
                self._room.give_back(len(content))

    def _take(self, fold: _Fold, first: int, content: memoryview) -> None:
        assert fold.claim is not None and first == fold.at, (first, fold.at)
        fold.digest = fold.digest or fold.claim.start()
        fold.digest.update(content)
        fold.at += len(content)
        if fold.at == fold.stop and (seen := fold.digest.hexdigest()) != fold.claim.value:
            what = f"bytes {fold.start:,} to {fold.stop:,} of " if self._by_record else ""
            raise StorageError(
                f"{self._one.uri} is damaged: {fold.claim.source} says {fold.claim.value} of {what}its content, what was read has {seen}; "
                "upload the file and its manifest again, or run again if the way to it is to blame"
            )


def _read_ledger(path: Path, size: int) -> bytes | None:
    """The digests of every block of a file of this size; None where they are not known, or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    held, total = content[:-_DIGEST], content[-_DIGEST:]
    whole = len(held) == -(-size // _BLOCK) * _DIGEST and xxhash.xxh3_128_digest(held) == total
    return held if whole else None


def _write_ledger(path: Path, digests: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        temporary.write_bytes(digests + xxhash.xxh3_128_digest(digests))
        os.replace(temporary, path)
    except OSError as error:  # a full or read-only disk: the next one checks the file itself again
        temporary.unlink(missing_ok=True)
        log.warning("the digests of a checked file cannot be kept in %s: %s", path, error)


def _crc(value: int) -> Claim | None:
    return Claim(f"{value:08x}", "the CRC-32 in the file itself", Crc32) if value else None


def claim_of(one: s3.S3Object, client: Any, sha256: str | None) -> Claim | None:
    """What is said of a whole object: by its manifest (``sha256``), by its uploader, or by its ETag. None where nobody says anything."""
    if sha256:
        return Claim(sha256, "its manifest expert.json, by SHA-256,", hashlib.sha256)
    told = s3.head(one.uri)
    if told is None or told["ETag"].strip('"') != one.etag:
        raise StorageError(f"{one.uri} was replaced or deleted since it was listed; run again", reason="changed")
    stated = s3.expected_checksums(told)
    if "sha256" in stated:
        return Claim(stated["sha256"], "the SHA-256 stored with the object", hashlib.sha256)
    if "md5" in stated:
        return Claim(stated["md5"], "its ETag, by MD5,", _md5)
    size = s3.part_size(one, told, client)
    return None if size is None else Claim(one.etag, "its ETag, by the MD5 of its parts,", lambda: PartsMd5(size))
