"""What else lies below a root: leftovers, parts of merges, hard links, other kinds, and what is not the store's."""

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ota_core.artifact import RECORD, ArtifactRef
from tasks.artifacts.store import ArtifactStore, BuildResult
from tasks.registry.retention.listing import list_root
from tasks.storage import s3
from tasks.tracking.names import REGISTERED_MODEL
from tasks.tracking.registered import TAG_WEIGHTS_DELETED
from tests.fixtures.retention import Shop, keys, names, open_shop, why
from tests.s3_requests import requests
from tests.servers import S3Test

pytestmark = pytest.mark.usefixtures("quick")
FP = "0123456789abcdef0123456789abcdef"


def part(shop: Shop, kind: Any, name: str, merge: str) -> ArtifactRef:
    def build(folder: Path) -> BuildResult:
        (folder / "part.bin").write_bytes(b"p" * 1000)
        return BuildResult()

    return shop.store.produce(
        kind, name * 32, config={"part": kind, "shard": "model.safetensors"}, inputs={"merge": merge}, build=build
    )


def test_leftovers_of_interrupted_work(settled: Shop) -> None:
    shop = settled
    merge = shop.made["red ota"]["merged"].fingerprint
    finished = [part(shop, kind, "a", merge) for kind in ("surveys", "facts", "shards")]
    unfinished = [part(shop, "shards", "b", FP), part(shop, "surveys", "c", FP)]
    root = Path(shop.where.artifacts)
    (root / "moments" / FP).mkdir()
    (root / "moments" / FP / "half.safetensors").write_bytes(b"h" * 500)
    damaged = shop.made["grey ota"]["moments grey0"]
    (Path(damaged.uri) / "moments.safetensors").unlink()
    dead = root / "moments" / f".{FP}.{os.uname().nodename}.999999999.0.1.tmp"
    foreign = [root / "merged" / "our-model" / "3", root / "notes", root / "moments" / "by hand"]
    for folder in (dead, *foreign):
        folder.mkdir(parents=True)
        (folder / RECORD).write_text("{}")

    plan = shop.retention().plan()
    reasons = why(plan)
    assert {reasons[ref.kind, ref.fingerprint] for ref in finished} == {"parts of a finished merge"}
    assert {reasons[ref.kind, ref.fingerprint] for ref in unfinished} == {"interrupted work"}
    assert reasons["moments", FP] == reasons["moments", dead.name] == "interrupted work"
    assert reasons["moments", damaged.fingerprint] == "damaged"
    assert not any(folder.name in {name for _, name in reasons} for folder in foreign)
    shop.retention().collect(plan)
    assert not dead.exists()
    assert all((folder / RECORD).exists() for folder in foreign), "what is not the store's is not touched"

    young = shop.retention(later=0).plan()
    assert not young.going


def test_a_temporary_of_a_running_process_stays(shop: Shop) -> None:
    shop.merge("red")
    begun, end = threading.Event(), threading.Event()

    def build(folder: Path) -> BuildResult:
        (folder / "slow.bin").write_bytes(b"s")
        begun.set()
        assert end.wait(60)
        return BuildResult()

    def work() -> None:
        shop.store.produce("moments", FP, config={}, inputs={"moments": "xxh3:1"}, build=build)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert begun.wait(60)
        plan = shop.retention().plan()
        assert [item.why for item in plan.items if item.stored.temporary] == ["being written"]
        shop.retention().collect(plan)
    finally:
        end.set()
        thread.join()
    assert shop.store.find("moments", FP)


def test_what_a_killed_deletion_left_goes_at_once_and_what_a_living_one_works_on_stays(shop: Shop) -> None:
    shop.merge("red")
    root = Path(shop.where.artifacts) / "moments"
    left, held = root / f".{FP}.0123abcd.trash", root / f".{FP}.4567abcd.trash"
    for folder in (left, held):
        folder.mkdir()
        (folder / "half").write_text("half")
    with being_deleted(held):
        plan = shop.retention(later=0).plan()
        assert [item.stored.name for item in plan.going] == [left.name]
        shop.retention(later=0).collect(plan)
    assert not left.exists() and held.exists()


@contextmanager
def being_deleted(folder: Path) -> Iterator[None]:
    """Held as by a process that deletes it."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
    os.close(handle)


def test_uploads_that_nobody_finished_are_ended(s3_server: S3Test, tmp_path: Path, ground: Path) -> None:
    shop = open_shop(tmp_path / "home", f"{s3_server.uri}/artifacts", ground, ground / "mlflow.db")
    for key in ("artifacts/merged/x/model.safetensors", "others/model.safetensors"):
        s3_server.client.create_multipart_upload(Bucket=s3_server.bucket, Key=key)
    assert shop.retention(later=0).collect(shop.retention(later=0).plan()).uploads == 0
    assert shop.retention().collect(shop.retention().plan()).uploads == 1
    found = s3_server.client.list_multipart_uploads(Bucket=s3_server.bucket)["Uploads"]
    assert [one["Key"] for one in found] == ["others/model.safetensors"]


def test_parts_of_a_merge_under_way_stay_together(shop: Shop) -> None:
    refs = [part(shop, "shards", "b", FP), part(shop, "surveys", "c", FP)]
    shop.age(20)
    assert names(shop.retention(later=0).plan(), going=True) == keys(refs)
    assert shop.store.find("shards", "b" * 32)
    assert not shop.retention(later=0).plan().going


def test_hard_links_are_counted_once_and_only_when_the_last_goes(settled: Shop) -> None:
    shop = settled
    merged = shop.made["red ota"]["merged"]
    weights = Path(merged.uri) / "model.safetensors"

    def build(folder: Path) -> BuildResult:
        os.link(weights, folder / "model.safetensors")
        (folder / "own.bin").write_bytes(b"o" * 8192)
        return BuildResult()

    shop.store.produce("shards", "d" * 32, config={}, inputs={"merge": merged.fingerprint}, build=build)
    plan = shop.retention().plan()
    shard = next(item.stored for item in plan.going if item.stored.name == "d" * 32)
    rest = sum(item.stored.size for item in plan.going) - shard.size
    assert shard.size > weights.stat().st_size + 8192
    assert plan.frees == rest + shard.size - weights.stat().st_size


def test_kinds_narrow_and_widen_what_is_collected(settled: Shop) -> None:
    shop = settled

    def trained(kind: Any, name: str, **inputs: str) -> str:
        def build(folder: Path) -> BuildResult:
            (folder / "x").write_text("x")
            return BuildResult()

        shop.store.produce(kind, name * 32, config={"seed": 1}, inputs=inputs, build=build)
        return name * 32

    data = trained("data", "1")
    base = trained("checkpoint", "2", data=data)
    expert = trained("checkpoint", "3", data=data, base=base)
    assert not {"checkpoint", "data"} & {kind for kind, _ in names(shop.retention().plan(), going=True)}
    plan = shop.retention(kinds={"masks"}).plan()
    assert names(plan, going=True) == {key for key in keys(shop.made["grey ota"].values()) if key[0] == "masks"}
    assert why(plan)["merged", shop.made["grey ota"]["merged"].fingerprint] == "kind not collected"
    both: Any = {"checkpoint", "data"}
    assert names(shop.retention(kinds=both).plan(), going=True) == {("data", data), ("checkpoint", base), ("checkpoint", expert)}
    shop.age(20)
    assert shop.store.find("checkpoint", expert)
    plan = shop.retention(later=0, kinds=both).plan()
    assert not plan.going and why(plan)["data", data] == "trained on or from"


def test_records_that_are_not_understood_stay(settled: Shop) -> None:
    shop = settled
    ref = shop.made["grey ota"]["moments grey0"]
    path = Path(ref.uri) / RECORD
    path.write_text(path.read_text().replace('"results"', '"of_a_later_version": 1, "results"'))
    assert why(shop.retention().plan())["moments", ref.fingerprint] == "record not understood"


def test_a_tag_of_an_interrupted_deletion_is_taken_back_when_the_weights_stay(settled: Shop) -> None:
    shop = settled
    shop.client.set_model_version_tag(
        REGISTERED_MODEL, shop.versions["red ota"], TAG_WEIGHTS_DELETED, "2026-01-01T00:00:00+00:00"
    )
    shop.retention().collect(shop.retention().plan())
    assert TAG_WEIGHTS_DELETED not in shop.client.get_model_version(REGISTERED_MODEL, shop.versions["red ota"]).tags


def test_reading_an_artifact_in_s3_writes_nothing(s3_server: S3Test, tmp_path: Path) -> None:
    """Also what was made long ago: who may only read can use it all the same."""

    def build(folder: Path) -> BuildResult:
        (folder / "m.bin").write_bytes(b"m")
        return BuildResult()

    ref = ArtifactStore(s3_server.uri, tmp_path / "cache").produce("moments", FP, config={}, inputs={}, build=build)
    store = ArtifactStore(s3_server.uri, tmp_path / "another machine")
    with requests() as asked:
        assert store.find("moments", FP) == ref
        assert store.read_record(ref).files == {"m.bin": 1} and (store.local_path(ref) / "m.bin").read_bytes() == b"m"
        assert store.find("moments", FP) == ref
    assert {one.operation for one in asked} == {"ListObjectsV2", "GetObject", "HeadObject"}


def test_a_model_published_below_the_same_prefix_is_not_seen(s3_server: S3Test, tmp_path: Path) -> None:
    root = f"{s3_server.uri}/team"
    for name in (f"merged/ota-merged/3/{RECORD}", "merged/ota-merged/3/model.safetensors", "merged/ota-merged/latest.json"):
        s3.write_bytes(f"{root}/{name}", b"{}")
    s3.write_bytes(f"{root}/masks/{FP}/half.bin", b"m" * 10)
    (found,) = list_root(root)
    assert (found.kind, found.name, found.size, found.complete) == ("masks", FP, 10, False)
