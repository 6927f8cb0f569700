"""Ranges of a file in S3, against a real server: right whatever is asked for, several at once, asked again where one breaks off."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tasks.storage import s3
from tasks.storage.streaming.chunk_cache import ChunkCache
from tasks.storage.streaming.remote_file import RemoteFile
from tests.servers import S3Test

MIB = 2**20


@pytest.fixture
def big(s3_server: S3Test) -> tuple[s3.S3Object, bytes]:
    content = Random(1).randbytes(6 * MIB + 12_345)
    s3.client().put_object(Bucket=s3_server.bucket, Key="big", Body=content)
    (one,) = s3.list_objects(s3_server.uri)
    return one, content


def test_any_range_is_right(big: tuple[s3.S3Object, bytes], tmp_path: Path) -> None:
    one, content = big
    (tmp_path / "outline").write_bytes(content[:1000] + bytes(len(content) - 1000))
    random = Random(2)
    cuts = sorted(random.randrange(len(content)) for _ in range(5))
    cache = ChunkCache(4 * MIB)
    file = RemoteFile(one, cache, client=s3.client(patient=True), outline=tmp_path / "outline", extents=[(0, 1000)], cuts=cuts)

    def work(seed: int) -> None:
        mine = Random(seed)
        for _ in range(60):
            start = mine.choice([mine.randrange(len(content)), mine.randrange(2000), *cuts])
            stop = min(len(content), start + mine.choice([0, 1, 100, 70_000, 900_000]))
            file.prefetch(stop, stop + 200_000)
            assert bytes(file.read(start, stop)) == content[start:stop]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert bytes(file.read(0, len(content))) == content, "also more than the cache holds"
    assert cache.held <= 4 * MIB
    cache.close()


def test_one_read_is_several_requests_at_once(big: tuple[s3.S3Object, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    one, content = big
    real, together = s3.read_range, threading.Barrier(4)

    def read_range(*arguments: Any) -> Any:
        body = real(*arguments)
        together.wait(20)  # fails unless four answers are open at the same time
        return body

    monkeypatch.setattr(s3, "read_range", read_range)
    cache = ChunkCache(32 * MIB)
    assert cache.chunk == MIB
    file = RemoteFile(one, cache, client=s3.client(patient=True))
    assert bytes(file.read(0, 4 * MIB)) == content[: 4 * MIB]
    cache.close()


def test_a_body_that_breaks_off_is_asked_again(big: tuple[s3.S3Object, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    one, content = big
    real, asked = s3.read_range, []

    class Broken:
        def __init__(self, body: Any) -> None:
            self.body = body

        def read(self, amount: int) -> bytes:
            if self.body is None:
                raise ConnectionResetError("injected")
            piece, self.body = bytes(self.body.read(1000)), None
            return piece

    def read_range(*arguments: Any) -> Any:
        asked.append(arguments[2:])
        return Broken(real(*arguments)) if len(asked) <= 2 else real(*arguments)

    monkeypatch.setattr(s3, "read_range", read_range)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    cache = ChunkCache(4 * MIB)
    assert bytes(RemoteFile(one, cache, client=s3.client(patient=True)).read(5, 50_000)) == content[5:50_000]
    assert [start for start, _ in asked] == [0, 1000, 2000]
    cache.close()
