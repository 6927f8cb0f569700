"""An object in S3 as a source of bytes: ranged GETs of chunks, shared in memory by all that read it."""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tasks.storage import s3
from tasks.storage.s3_body import read_exactly
from tasks.storage.streaming.chunk_cache import ChunkCache


class RemoteFile:
    """A ``ByteSource`` of one object as it was listed. ``read`` raises StorageError, also when the object was replaced meanwhile."""

    def __init__(
        self,
        one: s3.S3Object,
        chunks: ChunkCache,
        *,
        client: Any,
        outline: Path | None = None,
        extents: Sequence[tuple[int, int]] = (),
        cuts: Sequence[int] = (),
        passed: Callable[[int, memoryview], None] | None = None,
    ) -> None:
        """``client``: of boto3, for S3. ``extents``: ranges of bytes that the local file ``outline`` holds at their place; they are read from there.

        ``cuts``: no chunk reaches over these offsets, so that what lies between two of them is fetched only where it is wanted.
        ``passed``: told every chunk that arrives, with its first byte's place; what it raises, the reader of the chunk gets.
        """
        self.size = one.size
        self._one, self._chunks = one, chunks
        self._outline, self._extents = outline, sorted(extents)
        self._starts = [start for start, _ in self._extents]
        self._cuts = sorted({0, *cuts, one.size})
        self._client, self._passed = client, passed

    def read(self, start: int, stop: int) -> memoryview:
        if start >= stop:
            return memoryview(b"")
        if self._outline is not None and self._is_here(start, stop):
            return _read_local(self._outline, start, stop)
        spans = list(self._spans(start, stop))
        if len(spans) == 1:
            first, last = spans[0]
            return self._chunk(first, last)[start - first : stop - first]
        self.prefetch(start, stop)
        joined = memoryview(bytearray(stop - start))
        for first, last in spans:
            low, high = max(first, start), min(last, stop)
            joined[low - start : high - start] = self._chunk(first, last)[low - first : high - first]
        return joined

    def prefetch(self, start: int, stop: int) -> None:
        start, stop = max(0, start), min(stop, self.size)
        if start >= stop or self._is_here(start, stop):
            return
        for first, last in self._spans(start, stop):
            if not self._chunks.prefetch((self._one, first), last - first, self._load(first, last)):
                return

    def drop(self) -> None:
        """Nothing to do: the chunks keep to a limit of their own, and dropping what was fetched ahead would fetch it twice."""

    def close(self) -> None:
        """The chunks belong to who opened their cache."""

    def _chunk(self, first: int, last: int) -> memoryview:
        return self._chunks.read((self._one, first), last - first, self._load(first, last))

    def _load(self, first: int, last: int) -> partial[memoryview]:
        return partial(self._fetch, first, last)

    def _fetch(self, first: int, last: int) -> memoryview:
        content = read_exactly(self._client, self._one, first, last)
        if self._passed is not None:
            self._passed(first, content)
        return content

    def _is_here(self, start: int, stop: int) -> bool:
        place = bisect_right(self._starts, start) - 1
        return place >= 0 and stop <= self._extents[place][1]

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        return chunk_spans(self._cuts, self._chunks.chunk, start, stop)


def chunk_spans(cuts: Sequence[int], chunk: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The chunks, as ranges of bytes, that together cover [start, stop). ``cuts``: sorted, with 0 and the file's size."""
    while start < stop:
        place = bisect_right(cuts, start) - 1
        first = cuts[place] + (start - cuts[place]) // chunk * chunk
        start = min(first + chunk, cuts[place + 1])
        yield first, start


def _read_local(path: Path, start: int, stop: int) -> memoryview:
    with open(path, "rb") as stream:
        content = bytearray(os.pread(stream.fileno(), stop - start, start))
    if len(content) != stop - start:
        raise OSError(f"{path} was cut off while it was in use")
    return memoryview(content)
