"""Pieces of remote files in memory: fetched in parallel, each once, kept least recently used within a limit of bytes."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tasks.storage.s3 import MIB

CHUNK = 8 * MIB
THREADS = 16
# So many chunks fit at least: the blocks under work lie in several files at once.
_CHUNKS = 32
_SMALLEST = 64 * 1024

_CLOSED = "the cache of remote chunks is closed"

Load = Callable[[], memoryview]


@dataclass
class _Entry:
    """A chunk here or under way. It refers to nothing that refers to it: what is evicted must be freed at once, not by the collector."""

    size: int
    content: memoryview | None = None
    error: BaseException | None = None
    waiting: int = 0
    """Threads that wait for it or are taking it."""
    read: bool = False
    """Whether anybody has taken it; a prefetched chunk has not been."""

    @property
    def done(self) -> bool:
        return self.content is not None or self.error is not None


class ChunkCache:
    """Thread-safe. Chunks under way count as held. A chunk that was evicted lives on in who still uses it."""

    def __init__(self, limit: int, *, threads: int = THREADS) -> None:
        """``limit``: bytes that all chunks together may take."""
        self.limit = limit
        self.chunk = min(CHUNK, max(_SMALLEST, 1 << max(0, (limit // _CHUNKS).bit_length() - 1)))
        """The size of a chunk that users of the cache should ask for."""
        if self.chunk > limit:
            raise ValueError(f"limit: got {limit} bytes, expected at least {_SMALLEST}")
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._held = 0
        self._changed = threading.Condition()
        self._closed = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read-ahead")

    @property
    def held(self) -> int:
        """Bytes of the chunks here and under way."""
        with self._changed:
            return self._held

    def read(self, key: Hashable, size: int, load: Load) -> memoryview:
        """The chunk of this key, ``size`` ≤ ``chunk`` bytes, through ``load`` where it is not here. Raises what ``load`` raises.

        Waits while every held chunk is under way or waited for.
        """
        with self._changed:
            while (entry := self._entries.get(key)) is None and not self._make_room(size):
                self._changed.wait()
            if entry is None:
                entry = self._start(key, size, load)
            self._entries.move_to_end(key)
            entry.waiting += 1
            while not entry.done:
                self._changed.wait()
            entry.waiting -= 1
            entry.read = True
            self._changed.notify_all()
            if entry.content is None:
                assert entry.error is not None
                raise entry.error
            return entry.content

    def prefetch(self, key: Hashable, size: int, load: Load) -> bool:
        """Start fetching a chunk. False, with nothing done, where half of the limit is taken by what nobody has read yet."""
        with self._changed:
            if key in self._entries:
                self._entries.move_to_end(key)
                return True
            ahead = sum(entry.size for entry in self._entries.values() if not entry.read)
            if self._closed or ahead + size > self.limit // 2 or not self._make_room(size):
                return False
            self._start(key, size, load)
            return True

    def close(self) -> None:
        """Forget everything; what is under way is finished first, what is only planned is not fetched."""
        with self._changed:
            self._closed = True
        self._pool.shutdown(cancel_futures=True)
        with self._changed:
            for entry in self._entries.values():
                if not entry.done:
                    entry.error = ValueError(_CLOSED)
            self._entries.clear()
            self._held = 0
            self._changed.notify_all()

    def _start(self, key: Hashable, size: int, load: Load) -> _Entry:
        if self._closed:
            raise ValueError(_CLOSED)
        entry = self._entries[key] = _Entry(size)
        self._held += size
        self._pool.submit(self._fetch, key, entry, load)
        return entry

    def _fetch(self, key: Hashable, entry: _Entry, load: Load) -> None:
        content, failure = None, None
        try:
            content = load()
        except BaseException as error:  # told to whoever reads the chunk
            failure = error
        with self._changed:
            entry.content, entry.error = content, failure
            if failure is not None and self._entries.get(key) is entry:  # the next one who wants it asks again
                del self._entries[key]
                self._held -= entry.size
            self._changed.notify_all()

    def _make_room(self, size: int) -> bool:
        """Evict the least recently used chunks, but none that is under way or waited for. All or nothing."""
        idle = [(key, entry) for key, entry in self._entries.items() if entry.done and not entry.waiting]
        if self._held + size - sum(entry.size for _, entry in idle) > self.limit:
            return False
        for key, entry in idle:
            if self._held + size <= self.limit:
                break
            del self._entries[key]
            self._held -= entry.size
        return True
