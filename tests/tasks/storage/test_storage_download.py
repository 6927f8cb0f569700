"""Downloads against a real S3 server: parts, breaks, replaced objects, wrong sums, and what the cache spares."""

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ota_core.errors import StorageError
from tasks.storage import download as storage_download
from tasks.storage import s3
from tasks.storage.cache import blob_path, hash_file
from tasks.storage.download import download
from tests.s3_requests import Requests
from tests.servers import S3Test

MIB = 1024 * 1024
PART = 5 * MIB


def put(uri: str, content: bytes, **extra: Any) -> s3.S3Object:
    bucket, key = s3.split_uri(uri)
    s3.client().put_object(Bucket=bucket, Key=key, Body=content, **extra)
    return next(one for one in s3.list_objects(s3.join("s3://" + bucket, *key.split("/")[:-1])) if one.uri == uri)


def read_blob(cache: Path, digest: str) -> bytes:
    return blob_path(cache, digest).read_bytes()


def test_large_object_arrives_in_parallel_parts(s3_server: S3Test, gets: Requests, tmp_path: Path) -> None:
    content = os.urandom(60 * MIB + 123)
    one = put(s3_server.uri + "/big.bin", content)
    seen: list[tuple[int, int]] = []

    known = download([one], cache=tmp_path, part_size=PART, progress=lambda done, total: seen.append((done, total)))

    assert read_blob(tmp_path, known[one.uri].digest) == content
    assert len(gets) == 13
    assert len(set(gets)) == 13
    assert seen[-1] == (len(content), len(content))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert not list((tmp_path / "partial").iterdir())


def test_break_keeps_the_finished_parts(s3_server: S3Test, gets: Requests, tmp_path: Path) -> None:
    content = os.urandom(8 * PART)
    one = put(s3_server.uri + "/big.bin", content)

    def break_after_five(count: int) -> None:
        if count > 5:
            raise ConnectionResetError("injected")

    gets.before = break_after_five
    with pytest.raises(ConnectionResetError):
        download([one], cache=tmp_path, threads=1, part_size=PART)
    gets.clear()
    gets.before = lambda count: None

    seen: list[int] = []
    known = download([one], cache=tmp_path, threads=1, part_size=PART, progress=lambda done, total: seen.append(done))

    assert read_blob(tmp_path, known[one.uri].digest) == content
    assert len(gets) == 3
    assert seen[0] == 5 * PART


def test_killed_download_is_resumed(s3_server: S3Test, gets: Requests, tmp_path: Path) -> None:
    content = os.urandom(8 * PART)
    one = put(s3_server.uri + "/big.bin", content)
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom tasks.storage import s3\nfrom tasks.storage import download as storage_download\n"
        "calls = []\nreal = s3.read_range\n"
        "def read_range(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*arguments)\n"
        "s3.read_range = read_range\n"
        f"one = s3.S3Object.model_validate_json({one.model_dump_json()!r})\n"
        f"storage_download.download([one], cache=Path({str(tmp_path)!r}), threads=1, part_size={PART})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[3])
    assert killed.returncode == -9

    known = download([one], cache=tmp_path, threads=4, part_size=PART)

    assert read_blob(tmp_path, known[one.uri].digest) == content
    assert len(gets) == 4


def test_part_that_the_journal_praises_wrongly_is_fetched_again(s3_server: S3Test, gets: Requests, tmp_path: Path) -> None:
    """After a power failure the journal may list a part whose bytes never reached the disk; a torn last line is ignored."""
    content = os.urandom(4 * PART)
    one = put(s3_server.uri + "/big.bin", content)

    def break_at_the_last(count: int) -> None:
        if count == 4:
            raise ConnectionResetError("injected")

    gets.before = break_at_the_last
    with pytest.raises(ConnectionResetError):
        download([one], cache=tmp_path, threads=1, part_size=PART)
    (part,) = (tmp_path / "partial").glob("*.part")
    with open(part, "r+b") as stream:
        stream.seek(PART)
        stream.write(b"\0" * 4096)
    with open(part.with_suffix(".journal"), "a") as stream:
        stream.write("3 abc")
    gets.clear()
    gets.before = lambda count: None

    known = download([one], cache=tmp_path, threads=1, part_size=PART)

    assert read_blob(tmp_path, known[one.uri].digest) == content
    assert len(gets) == 2


def test_body_that_breaks_off_is_asked_again(s3_server: S3Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(8 * MIB)
    one = put(s3_server.uri + "/file.bin", content)
    real, calls = s3.read_range, []

    class Broken:
        def __init__(self, body: Any) -> None:
            self.body, self.reads = body, 0

        def read(self, amount: int) -> bytes:
            self.reads += 1
            if self.reads > 1:
                raise ConnectionResetError("injected")
            return bytes(self.body.read(amount))

    def read_range(*arguments: Any) -> Any:
        calls.append(arguments[2:])
        body = real(*arguments)
        return Broken(body) if len(calls) <= tries else body

    monkeypatch.setattr(s3, "read_range", read_range)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    tries = 2
    known = download([one], cache=tmp_path)
    assert read_blob(tmp_path, known[one.uri].digest) == content
    assert calls == [(start * MIB, 8 * MIB) for start in (0, 1, 2)], "what came before the break is kept"

    tries = 100
    with pytest.raises(StorageError, match=r"file\.bin: the connection broke 5 times at byte 5,242,880 of 8,388,608"):
        download([one], cache=tmp_path / "other")


def test_object_replaced_between_parts_is_noticed(s3_server: S3Test, gets: Requests, tmp_path: Path) -> None:
    uri = s3_server.uri + "/big.bin"
    one = put(uri, os.urandom(4 * PART))

    def replace(count: int) -> None:
        if count == 3:
            put(uri, os.urandom(4 * PART))

    gets.before = replace
    with pytest.raises(StorageError, match=r"cannot download s3://.*/big\.bin .*replaced meanwhile.*run again"):
        download([one], cache=tmp_path, threads=1, part_size=PART)
    (new,) = s3.list_objects(s3_server.uri)
    known = download([new], cache=tmp_path, part_size=PART)
    assert hash_file(blob_path(tmp_path, known[uri].digest), also=["md5"])["md5"] == new.etag
    assert not list((tmp_path / "partial").iterdir())


def test_object_replaced_since_the_listing_is_noticed(s3_server: S3Test, tmp_path: Path) -> None:
    uri = s3_server.uri + "/file.bin"
    one = put(uri, b"old")
    put(uri, b"new")
    with pytest.raises(StorageError, match="replaced or deleted since it was listed"):
        download([one], cache=tmp_path)


@pytest.mark.parametrize("source", ["manifest", "metadata"])
def test_wrong_sha256_names_the_object_and_keeps_nothing(s3_server: S3Test, tmp_path: Path, source: str) -> None:
    content, wrong = b"weights", hashlib.sha256(b"other").hexdigest()
    one = put(s3_server.uri + "/w.bin", content, **({"Metadata": {"sha256": wrong}} if source == "metadata" else {}))
    seen = hashlib.sha256(content).hexdigest()
    with pytest.raises(StorageError, match=rf"/w\.bin is damaged.*sha256 {wrong}, but its content has sha256 {seen}; upload"):
        download([one], cache=tmp_path, sha256={one.uri: wrong} if source == "manifest" else None)
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock" and path.name != "digests.sqlite"
    ]


def test_manifest_is_checked_also_for_what_is_cached(s3_server: S3Test, tmp_path: Path) -> None:
    one = put(s3_server.uri + "/w.bin", b"weights")
    download([one], cache=tmp_path)
    right, wrong = hashlib.sha256(b"weights").hexdigest(), "0" * 64
    assert download([one], cache=tmp_path, sha256={one.uri: right.upper()})[one.uri].sha256 == right
    with pytest.raises(StorageError, match="is damaged"):
        download([one], cache=tmp_path, sha256={one.uri: wrong})


def test_plain_etag_is_checked_as_md5(s3_server: S3Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = put(s3_server.uri + "/w.bin", b"weights")
    real = s3.read_range

    def flipped(*arguments: Any) -> Any:
        class Body:
            def read(self, amount: int) -> bytes:
                return bytes(real(*arguments).read(amount)).replace(b"w", b"W")

        return Body()

    monkeypatch.setattr(s3, "read_range", flipped)
    with pytest.raises(
        StorageError, match=f"its ETag says md5 {one.etag}, but its content has md5 {hashlib.md5(b'Weights').hexdigest()}"
    ):
        download([one], cache=tmp_path)


def test_what_an_etag_means() -> None:
    md5, sha = "0" * 32, hashlib.sha256(b"").digest()
    assert s3.expected_checksums({"ETag": f'"{md5}"'}) == {"md5": md5}
    assert s3.expected_checksums({"ETag": f'"{md5}-3"'}) == {}
    assert s3.expected_checksums({"ETag": f'"{md5}"', "ServerSideEncryption": "aws:kms"}) == {}
    assert s3.expected_checksums({"ETag": '"x-1"', "ChecksumSHA256": "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="}) == {
        "sha256": sha.hex()
    }
    assert s3.expected_checksums({"ETag": '"x-1"', "ChecksumSHA256": "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=-2"}) == {}


def test_unchanged_and_equal_objects_are_not_downloaded_again(s3_server: S3Test, gets: Requests, tmp_path: Path) -> None:
    content = os.urandom(MIB)
    first = put(s3_server.uri + "/a/w.bin", content)
    download([first], cache=tmp_path)
    assert len(gets) == 1
    second = put(s3_server.uri + "/b/w.bin", content)
    known = download([first, second], cache=tmp_path)
    assert len(gets) == 1
    assert known[first.uri].digest == known[second.uri].digest
    # Both in one call, with an empty cache: still once.
    download([first, second], cache=tmp_path / "other")
    assert len(gets) == 2


def test_damaged_blob_is_fetched_again(s3_server: S3Test, gets: Requests, tmp_path: Path) -> None:
    one = put(s3_server.uri + "/w.bin", b"weights")
    blob = blob_path(tmp_path, download([one], cache=tmp_path)[one.uri].digest)
    blob.chmod(0o600)
    blob.write_bytes(b"wei")
    download([one], cache=tmp_path)
    assert blob.read_bytes() == b"weights"
    blob.unlink()
    download([one], cache=tmp_path)
    assert blob.read_bytes() == b"weights"
    assert len(gets) == 3


def test_empty_object(s3_server: S3Test, tmp_path: Path) -> None:
    one = put(s3_server.uri + "/empty", b"")
    assert read_blob(tmp_path, download([one], cache=tmp_path)[one.uri].digest) == b""


def test_threads_that_want_the_same_object_download_it_once(s3_server: S3Test, gets: Requests, tmp_path: Path) -> None:
    one = put(s3_server.uri + "/big.bin", os.urandom(4 * PART))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: download([one], cache=tmp_path, part_size=PART), range(4)))
    assert len({known[one.uri].digest for known in found}) == 1
    assert len(gets) == 4


def test_full_disk_is_said_before_the_download(s3_server: S3Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = put(s3_server.uri + "/w.bin", b"weights")

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage_download.os, "posix_fallocate", no_space)
    with pytest.raises(StorageError, match=r"cannot reserve 7 bytes for .*No space left on device.*free some space"):
        download([one], cache=tmp_path)


def test_no_room_for_all_of_them_is_said_before_the_first_byte(
    s3_server: S3Test, gets: Requests, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ota_core.files import room

    objects = [put(f"{s3_server.uri}/{name}", os.urandom(1000)) for name in ("a", "b")]
    free = room.shutil.disk_usage(tmp_path)._replace(free=1500)
    with monkeypatch.context() as patch:
        patch.setattr(room.shutil, "disk_usage", lambda path: free)
        with pytest.raises(StorageError, match=r"2,000 bytes are needed \(downloads of 2 objects at .*1,500 are free"):
            download(objects, cache=tmp_path)
        assert not gets
    download(objects[:1], cache=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(room.shutil, "disk_usage", lambda path: free)
        download(objects, cache=tmp_path)  # one of them is there
