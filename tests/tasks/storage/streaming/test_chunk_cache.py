"""The shared memory of remote chunks: each fetched once, in parallel, never over the limit."""

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random

import pytest

from tasks.storage.streaming.chunk_cache import CHUNK, ChunkCache

KIB = 1024
LIMIT = 1024 * KIB


def content(key: int, size: int) -> memoryview:
    return memoryview(bytes([key % 251]) * size)


def test_the_chunk_follows_the_limit() -> None:
    for limit, chunk in ((2**30, CHUNK), (16 * 2**20, 512 * KIB), (64 * KIB, 64 * KIB)):
        cache = ChunkCache(limit)
        assert cache.chunk == chunk
        cache.close()
    with pytest.raises(ValueError, match="expected at least 65536"):
        ChunkCache(1000)


def test_threads_that_want_one_chunk_fetch_it_once() -> None:
    cache, calls, gate = ChunkCache(LIMIT), [], threading.Event()

    def load() -> memoryview:
        calls.append(1)
        assert gate.wait(10)
        return content(7, cache.chunk)

    cache.prefetch("a", cache.chunk, load)
    with ThreadPoolExecutor(8) as pool:
        readers = [pool.submit(cache.read, "a", cache.chunk, load) for _ in range(8)]
        gate.set()
        first = readers[0].result()
        assert all(reader.result() is first for reader in readers)
    assert len(calls) == 1
    cache.close()


def test_chunks_are_fetched_at_the_same_time() -> None:
    cache, together = ChunkCache(LIMIT, threads=4), threading.Barrier(4)

    def load() -> memoryview:
        together.wait(10)  # breaks, and the read fails, unless four are under way at once
        return content(0, cache.chunk)

    assert all(cache.prefetch(key, cache.chunk, load) for key in range(4))
    for key in range(4):
        cache.read(key, cache.chunk, load)
    cache.close()


def test_the_limit_holds_and_values_are_right_under_load() -> None:
    cache = ChunkCache(LIMIT, threads=8)
    seen: list[int] = []
    loads: list[int] = []

    def load(key: int) -> memoryview:
        seen.append(cache.held)
        loads.append(key)
        return content(key, cache.chunk - key)

    def work(seed: int) -> None:
        random = Random(seed)
        for _ in range(300):
            key = random.randrange(100)
            for ahead in range(key + 1, key + 4):
                cache.prefetch(ahead, cache.chunk - ahead, partial(load, ahead))
            assert cache.read(key, cache.chunk - key, partial(load, key)) == content(key, cache.chunk - key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert 0.5 * LIMIT < max(seen) <= LIMIT
    assert cache.held <= LIMIT and len(loads) < 8 * 300 * 4
    cache.close()


def test_what_is_waited_for_is_never_evicted_and_prefetches_give_way() -> None:
    cache, gate = ChunkCache(2 * 64 * KIB), threading.Event()
    assert cache.chunk == 64 * KIB

    def slow() -> memoryview:
        assert gate.wait(10)
        return content(1, cache.chunk)

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(cache.read, "first", cache.chunk, slow)
        second = pool.submit(cache.read, "second", cache.chunk, slow)
        while cache.held < cache.limit:
            pass
        assert not cache.prefetch("third", cache.chunk, slow)
        third = pool.submit(cache.read, "third", cache.chunk, lambda: content(3, cache.chunk))  # waits for room
        assert not third.done() and cache.held == cache.limit
        gate.set()
        assert first.result()[0] == second.result()[0] == 1 and third.result()[0] == 3
    assert cache.held <= cache.limit
    cache.close()


def test_a_chunk_in_use_outlives_its_eviction() -> None:
    cache = ChunkCache(64 * KIB)
    view = cache.read(0, cache.chunk, lambda: content(5, cache.chunk))[10:20]
    cache.read(1, cache.chunk, lambda: content(6, cache.chunk))
    assert cache.held == 64 * KIB and view == bytes([5]) * 10
    cache.close()
    assert view == bytes([5]) * 10


def test_an_evicted_chunk_is_freed_at_once() -> None:
    """Not when the garbage collector comes: it counts objects, not bytes, and would let a merge grow by gigabytes."""
    cache, buffers = ChunkCache(64 * KIB), []

    class Buffer(bytearray):
        pass

    def load() -> memoryview:
        buffer = Buffer(cache.chunk)
        buffers.append(weakref.ref(buffer))
        return memoryview(buffer)

    gc.disable()
    try:
        started = time.monotonic()
        for key in range(3):
            cache.read(key, cache.chunk, load)
        while buffers[1]() is not None and time.monotonic() < started + 5:
            pass  # the thread that fetched it is still leaving its frame
        assert [buffer() is None for buffer in buffers] == [True, True, False]
    finally:
        gc.enable()
    cache.close()


def test_the_least_recently_used_goes_first() -> None:
    cache, loads = ChunkCache(3 * 64 * KIB), []

    def load(key: str) -> memoryview:
        loads.append(key)
        return content(1, cache.chunk)

    for key in ("a", "b", "c", "a", "d", "a", "c", "b"):
        cache.read(key, cache.chunk, partial(load, key))
    assert loads == ["a", "b", "c", "d", "b"]
    cache.close()


def test_a_failed_fetch_is_told_and_asked_again() -> None:
    cache = ChunkCache(LIMIT)

    def fail() -> memoryview:
        raise OSError("broken")

    assert cache.prefetch("a", cache.chunk, fail)  # a hint never fails
    with pytest.raises(OSError, match="broken"):
        cache.read("a", cache.chunk, fail)
    with pytest.raises(OSError, match="broken"):
        cache.read("a", cache.chunk, fail)
    assert cache.read("a", cache.chunk, lambda: content(2, cache.chunk))[0] == 2
    assert cache.held == cache.chunk
    cache.close()
    assert cache.held == 0
    with pytest.raises(ValueError, match="is closed"):
        cache.read("b", cache.chunk, fail)
