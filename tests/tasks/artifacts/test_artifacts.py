"""The artifact store on both kinds of root: complete or not there, computed once, nothing left by a crash."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ota_core.artifact import RECORD, ArtifactRef
from ota_core.errors import ArtifactError
from tasks.artifacts.store import ArtifactStore, BuildResult
from tasks.storage import models as storage
from tasks.storage import s3, transfers
from tests.s3_requests import requests
from tests.servers import S3Test, wait_until

REPOSITORY = Path(__file__).parents[3]
KEY = "0123456789abcdef"


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "s3":
        server: S3Test = request.getfixturevalue("s3_server")
        return ArtifactStore(server.uri + "/ota", tmp_path / "cache")
    return ArtifactStore(str(tmp_path / "root"), tmp_path / "cache")


def build(folder: Path) -> BuildResult:
    (folder / "parts").mkdir()
    (folder / "masks.bin").write_bytes(b"m" * 1000)
    (folder / "parts" / "table.json").write_text("{}")
    return BuildResult(results={"density": 0.4}, provenance={"device": "cpu"})


def produce(store: ArtifactStore, build: Callable[[Path], BuildResult] = build) -> ArtifactRef:
    return store.produce("masks", KEY, config={"density": 0.4}, inputs={"moments": "xxh3:1"}, build=build)


def never(folder: Path) -> BuildResult:
    raise AssertionError("computed again")


def remains(tmp_path: Path) -> list[str]:
    """Files other than the cache's own bookkeeping."""
    own = {".lock", ".sqlite"}
    return sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in own)


def remove(ref: ArtifactRef, name: str) -> None:
    if storage.is_s3(ref.uri):
        bucket, key = s3.split_uri(storage.join(ref.uri, name))
        s3.client().delete_object(Bucket=bucket, Key=key)
    else:
        (Path(ref.uri) / name).unlink()


def test_what_is_produced_is_found_and_never_computed_again(store: ArtifactStore) -> None:
    assert store.find("masks", KEY) is None
    ref = produce(store)
    assert ref.uri == storage.join(store.root, "masks", KEY) and ref.bytes == 1002
    assert store.find("masks", KEY) == ref == produce(store, never)
    assert store.find("moments", KEY) is None

    record = store.read_record(ref)
    assert record.files == {"masks.bin": 1000, "parts/table.json": 2}
    assert (record.config, record.inputs, record.results) == ({"density": 0.4}, {"moments": "xxh3:1"}, {"density": 0.4})
    assert record.provenance["device"] == "cpu" and record.provenance["seconds"] >= 0
    folder = store.local_path(ref)
    assert (folder / "masks.bin").read_bytes() == b"m" * 1000 and (folder / "parts" / "table.json").read_text() == "{}"


def test_another_machine_downloads_it(s3_server: S3Test, tmp_path: Path) -> None:
    ref = produce(ArtifactStore(s3_server.uri, tmp_path / "one"))
    other = ArtifactStore(s3_server.uri, tmp_path / "two")
    assert other.find("masks", KEY) == ref
    folder = other.local_path(ref)
    assert folder.is_relative_to(tmp_path / "two")
    assert {path.name for path in folder.iterdir()} == {"masks.bin", "parts", RECORD}
    assert other.local_path(ref) == folder


def test_local_copy_of_what_was_made_anew_elsewhere_is_not_used(s3_server: S3Test, tmp_path: Path) -> None:
    one, two = ArtifactStore(s3_server.uri, tmp_path / "one"), ArtifactStore(s3_server.uri, tmp_path / "two")
    produce(one)
    two.delete(produce(two, never))

    def changed(folder: Path) -> BuildResult:
        (folder / "masks.bin").write_bytes(b"n" * 1000)
        return BuildResult()

    ref = produce(two, changed)
    assert (one.local_path(ref) / "masks.bin").read_bytes() == b"n" * 1000


@pytest.mark.parametrize("name", ["masks.bin", RECORD])
def test_artifact_with_a_deleted_file_is_not_there_and_made_anew(store: ArtifactStore, name: str) -> None:
    ref = produce(store)
    remove(ref, name)
    assert store.find("masks", KEY) is None
    with pytest.raises(ArtifactError):
        store.read_record(ref)
    with pytest.raises(ArtifactError):
        store.local_path(ref)
    assert produce(store) == ref
    assert store.find("masks", KEY) == ref


def test_truncated_file_and_garbled_record_count_as_not_there(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache")
    ref = produce(store)
    (Path(ref.uri) / "masks.bin").write_bytes(b"m")
    assert store.find("masks", KEY) is None
    produce(store)
    (Path(ref.uri) / RECORD).write_text("{")
    assert store.find("masks", KEY) is None
    assert produce(store) == ref


def test_build_that_raises_leaves_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    def broken(folder: Path) -> BuildResult:
        (folder / "half.bin").write_bytes(b"1")
        raise ValueError("injected")

    with pytest.raises(ValueError, match="injected"):
        produce(store, broken)
    assert remains(tmp_path) == []
    assert store.find("masks", KEY) is None
    assert not storage.is_s3(store.root) or storage.list_objects(store.root) == []
    produce(store)


def test_build_without_files_is_refused(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactError, match=f"masks {KEY} left no file"):
        produce(store, lambda folder: BuildResult())


def test_upload_that_breaks_leaves_no_record(s3_server: S3Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(s3_server.uri, tmp_path / "cache")

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", broken)
        with pytest.raises(ConnectionResetError):
            produce(store)
    assert store.find("masks", KEY) is None and remains(tmp_path) == []
    assert store.find("masks", KEY) is None
    assert store.local_path(produce(store)).is_dir()


def test_faster_machine_wins(s3_server: S3Test, tmp_path: Path) -> None:
    """Two machines have no lock in common; the record that was there first counts."""
    slow, fast = ArtifactStore(s3_server.uri, tmp_path / "slow"), ArtifactStore(s3_server.uri, tmp_path / "fast")

    def overtaken(folder: Path) -> BuildResult:
        produce(fast)
        (folder / "masks.bin").write_bytes(b"late")
        return BuildResult()

    ref = produce(slow, overtaken)
    assert (slow.local_path(ref) / "masks.bin").read_bytes() == b"m" * 1000


def test_delete(store: ArtifactStore) -> None:
    ref = produce(store)
    store.delete(ref)
    assert store.find("masks", KEY) is None
    store.delete(ref)
    assert produce(store) == ref


def test_threads_compute_it_once(store: ArtifactStore) -> None:
    calls, lock = [], threading.Lock()

    def slow(folder: Path) -> BuildResult:
        with lock:
            calls.append(1)
        time.sleep(0.3)
        return build(folder)

    with ThreadPoolExecutor(4) as pool:
        refs = set(pool.map(lambda _: produce(store, slow), range(4)))
    assert len(refs) == 1 and len(calls) == 1


BUILDER = """
import json, os, sys
from pathlib import Path
from tasks.artifacts.store import ArtifactStore, BuildResult
from tests.servers import wait_until
root, cache, log, go = sys.argv[1:]
def build(folder):
    with open(log, "a") as stream: stream.write(f"{os.getpid()}\\n")
    (folder / "masks.bin").write_bytes(b"m")
    wait_until(Path(go).exists)
    return BuildResult()
print("ready", flush=True)
ref = ArtifactStore(root, Path(cache)).produce("masks", "0123456789abcdef", config={}, inputs={}, build=build)
print(ref.model_dump_json())
"""


def start_builder(store: ArtifactStore, log: Path) -> subprocess.Popen[str]:
    """A process that builds, notes it in the log, and ends when there is a file ``go`` beside the log."""
    arguments = [sys.executable, "-c", BUILDER, store.root, str(store.cache), str(log), str(log.with_name("go"))]
    return subprocess.Popen(arguments, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def test_processes_compute_it_once(store: ArtifactStore, tmp_path: Path) -> None:
    log = tmp_path / "calls.txt"
    builders = [start_builder(store, log) for _ in range(3)]
    for builder in builders:
        assert builder.stdout is not None and builder.stdout.readline() == "ready\n"
    wait_until(log.exists)
    (tmp_path / "go").touch()
    refs = {json.loads(builder.communicate()[0])["uri"] for builder in builders}
    assert len(refs) == 1
    assert len(log.read_text().splitlines()) == 1


def test_killed_build_is_taken_over_and_swept_away(store: ArtifactStore, tmp_path: Path) -> None:
    log = tmp_path / "calls.txt"
    killed = start_builder(store, log)
    wait_until(log.exists)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    left = list(tmp_path.rglob(f".{KEY}.*.tmp"))
    assert len(left) == 1, "a killed process cannot clean up"

    assert store.local_path(produce(store)).is_dir()
    assert not left[0].exists()


def test_temporary_of_a_living_process_stays(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "root"), tmp_path / "cache")
    log = tmp_path / "calls.txt"
    living = start_builder(store, log)
    try:
        wait_until(log.exists)
        (temporary,) = (tmp_path / "root" / "masks").glob(".*.tmp")
        store.produce("masks", "another", config={}, inputs={}, build=build)
        assert temporary.is_dir()
    finally:
        living.kill()
        living.wait()


def test_files_of_other_artifacts_are_linked_or_copied_within_s3(store: ArtifactStore, tmp_path: Path) -> None:
    """What is taken outlives the artifact that it came from, and never passes through this machine."""
    shard = produce(store)

    def assembled(folder: Path) -> BuildResult:
        (folder / "index.json").write_text("{}")
        return BuildResult(taken={"part-1.bin": storage.join(shard.uri, "masks.bin")})

    with requests("PutObject", "UploadPart") if storage.is_s3(store.root) else nullcontext([]) as sent:
        ref = store.produce("merged", KEY, config={}, inputs={}, build=assembled)
    record = store.read_record(ref)
    assert record.files == {"index.json": 2, "part-1.bin": 1000} and ref.bytes == 1002
    assert [one for one in sent if one.key.endswith(".bin")] == []
    if not storage.is_s3(ref.uri):
        assert Path(ref.uri, "part-1.bin").samefile(Path(shard.uri, "masks.bin")), "a link: the disk holds it once"
    store.delete(shard)
    assert (store.local_path(ref) / "part-1.bin").read_bytes() == b"m" * 1000

    def from_nowhere(folder: Path) -> BuildResult:
        return BuildResult(taken={"part-1.bin": storage.join(shard.uri, "masks.bin")})

    with pytest.raises(ArtifactError, match=r"masks.bin is not there any more; run its stage again"):
        store.produce("merged", KEY[::-1], config={}, inputs={}, build=from_nowhere)


def test_objects_too_large_for_one_copy_are_copied_by_ranges(
    s3_server: S3Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(11 * s3.MIB)
    (tmp_path / "large.bin").write_bytes(content)
    storage.upload_folder(tmp_path, s3_server.uri + "/from")
    monkeypatch.setattr(transfers, "_COPY_AT_ONCE", 6 * s3.MIB)
    monkeypatch.setattr(transfers, "_COPY_RANGE", 5 * s3.MIB)
    storage.copy_objects({s3_server.uri + "/from/large.bin": s3_server.uri + "/to/large.bin"})
    assert s3.read_bytes(s3_server.uri + "/to/large.bin") == content
    old, new = (s3.head(f"{s3_server.uri}/{place}/large.bin") for place in ("from", "to"))
    assert old and new and new["Metadata"] == old["Metadata"] and "sha256" in new["Metadata"]
    assert new["ETag"].endswith('-3"'), "three ranges"
