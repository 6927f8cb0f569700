"""Publishing into a real S3 server and into folders: what a reader finds, also after a break at every request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tasks.registry.publish as publishing
from ota_core.artifact import RECORD
from ota_core.errors import StorageError
from tasks.artifacts.store import record_at
from tasks.registry.promotion import PromotionError, promote
from tasks.registry.publish import point_latest, publish, publish_champion, read_latest
from tasks.storage import models as storage
from tasks.storage import s3
from tests.s3_requests import requests
from tests.servers import S3Test
from tests.tasks.registry.registry_fixture import Registry, register, write_model
from tests.tasks.registry.registry_fixture import registry as registry
from tests.tasks.registry.registry_fixture import registry_template as registry_template

NAMES = {"model.safetensors", "extra/chat.jinja", RECORD}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "artifacts" / "fp1", "fp1")


@pytest.fixture(params=["s3 to s3", "folder to s3", "s3 to folder", "folder to folder"])
def places(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> tuple[str, str]:
    """(the model's address, the root of what is published), of both kinds."""
    source, root = str(model), str(tmp_path / "published")
    if "s3" in request.param:
        server: S3Test = request.getfixturevalue("s3_server")
        if request.param.startswith("s3"):
            source = f"{server.uri}/artifacts/fp1"
            storage.upload_folder(model, source, last=RECORD)
        if request.param.endswith("s3"):
            root = f"{server.uri}/merged"
    return source, root


def publish_one(source: str, root: str, tmp_path: Path, version: str = "1") -> int:
    return publish(source, root=root, name="ota-merged", version=version, cache=tmp_path / "cache")


def test_the_card_with_the_scores_and_the_report_are_published_too(places: tuple[str, str], tmp_path: Path) -> None:
    source, root = places
    record = record_at(source)
    assert record is not None
    listed = record.model_copy(update={"files": record.files | {"README.md": 3}})
    card, report = b"# with scores, longer than the card that the record lists", b"<html></html>"
    for name, text in (("README.md", card), ("report.html", report), (RECORD, listed.model_dump_json().encode())):
        storage.write_note(storage.join(source, name), text.decode())
    for copied in (True, False):
        assert bool(publish_one(source, root, tmp_path)) is copied
    published = contents(f"{root}/ota-merged/1")
    assert published["report.html"] == report and published["README.md"] == card
    assert record_at(f"{root}/ota-merged/1") is not None


def contents(uri: str) -> dict[str, bytes]:
    """Every file below an address."""
    if storage.is_s3(uri):
        return {one.uri.removeprefix(uri + "/"): storage.read_bytes(one.uri) for one in storage.list_objects(uri)}
    return {path.relative_to(uri).as_posix(): path.read_bytes() for path in Path(uri).rglob("*") if path.is_file()}


def test_a_published_model_is_the_artifact_byte_for_byte(
    places: tuple[str, str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, root = places
    assert publish_one(source, root, tmp_path) == 3
    published = contents(f"{root}/ota-merged/1")
    assert published == contents(str(model)) and published.keys() == NAMES

    for name in ("upload_folder", "copy_objects", "download_folder", "write_bytes"):
        monkeypatch.delattr(storage, name)
    assert publish_one(source, root, tmp_path) == 0
    assert {path.name for path in tmp_path.rglob(".*.tmp")} == set()


def test_a_folders_copy_is_no_link(model: Path, tmp_path: Path) -> None:
    publish_one(str(model), str(tmp_path / "published"), tmp_path)
    (tmp_path / "published" / "ota-merged" / "1" / "model.safetensors").write_bytes(b"edited!")
    assert (model / "model.safetensors").read_bytes() == b"weights"


def test_within_s3_no_weights_pass_through_this_machine(s3_server: S3Test, model: Path, tmp_path: Path) -> None:
    source = f"{s3_server.uri}/artifacts/fp1"
    storage.upload_folder(model, source, last=RECORD)
    with requests("GetObject", "PutObject", "UploadPart") as passed:
        publish_one(source, f"{s3_server.uri}/merged", tmp_path)
    assert {one.key.rsplit("/", 1)[1] for one in passed} == {RECORD}


@pytest.mark.parametrize("source_kind", ["s3", "folder"])
def test_a_copy_broken_at_any_write_has_no_record_and_is_completed(
    s3_server: S3Test, model: Path, tmp_path: Path, source_kind: str
) -> None:
    source, written = str(model), 0
    if source_kind == "s3":
        source = f"{s3_server.uri}/artifacts/fp1"
        storage.upload_folder(model, source, last=RECORD)
    for at in (1, 2, 3):
        root = f"{s3_server.uri}/merged{at}"

        def breaks(count: int, at: int = at) -> None:
            if count == at:
                raise ConnectionError("the line went dead")

        with requests("PutObject", "CopyObject") as writes, pytest.raises(ConnectionError):
            writes.before = breaks
            publish_one(source, root, tmp_path)
        target = f"{root}/ota-merged/1"
        assert RECORD not in contents(target) and record_at(target) is None
        with pytest.raises(StorageError, match=r"holds no complete model for latest\.json"):
            point_latest(root, "ota-merged", "1", "digest1")
        assert read_latest(root, "ota-merged") is None
        left = len(contents(target))
        written += left
        assert publish_one(source, root, tmp_path) == 3 - left, "only what was missing"
        assert contents(target) == contents(str(model))
    assert written, "some breaks left files behind"


def test_damaged_files_of_a_half_made_copy_are_copied_again(s3_server: S3Test, model: Path, tmp_path: Path) -> None:
    source, target = f"{s3_server.uri}/artifacts/fp1", f"{s3_server.uri}/merged/ota-merged/1"
    storage.upload_folder(model, source, last=RECORD)
    storage.write_bytes(f"{target}/model.safetensors", b"WEIGHTS")  # of the same size
    assert publish_one(source, f"{s3_server.uri}/merged", tmp_path) == 3
    assert contents(target) == contents(str(model))


def test_a_copy_that_differs_gets_no_record(
    s3_server: S3Test, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = f"{s3_server.uri}/artifacts/fp1", f"{s3_server.uri}/merged/ota-merged/1"
    storage.upload_folder(model, source, last=RECORD)
    monkeypatch.setattr(storage, "copy_objects", lambda pairs: [s3.write_bytes(copy, b"WEIGHTS") for copy in pairs.values()])
    with pytest.raises(StorageError, match=r"model\.safetensors: the copy differs from"):
        publish_one(source, f"{s3_server.uri}/merged", tmp_path)
    assert RECORD not in contents(target)


def test_another_model_under_the_same_version_is_refused(places: tuple[str, str], tmp_path: Path) -> None:
    source, root = places
    publish_one(source, root, tmp_path)
    before = contents(f"{root}/ota-merged/1")
    other = write_model(tmp_path / "artifacts" / "fp2", "fp2", b"other weights")
    with pytest.raises(StorageError, match=r"holds another model \(merged fp1, not merged fp2\).*another name or root"):
        publish_one(str(other), root, tmp_path)
    assert contents(f"{root}/ota-merged/1") == before


def test_what_lies_there_is_never_deleted(s3_server: S3Test, model: Path, tmp_path: Path) -> None:
    root = f"{s3_server.uri}/merged"
    storage.write_bytes(f"{root}/ota-merged/1/notes.txt", b"mine")
    with pytest.raises(StorageError, match=r"holds notes\.txt, no file of the model"):
        publish_one(str(model), root, tmp_path)
    publish_one(str(model), root, tmp_path, "2")
    s3.client().delete_object(Bucket=s3_server.bucket, Key="merged/ota-merged/2/model.safetensors")
    with pytest.raises(StorageError, match=r"holds a record\.json, but not the files that it lists"):
        publish_one(str(model), root, tmp_path, "2")
    folder = tmp_path / "published" / "ota-merged" / "1"
    folder.mkdir(parents=True)
    with pytest.raises(StorageError, match="exists, but holds no complete model"):
        publish_one(str(model), str(tmp_path / "published"), tmp_path)


def test_a_source_that_is_not_complete_is_refused(places: tuple[str, str], tmp_path: Path) -> None:
    source, root = places
    if storage.is_s3(source):
        bucket, key = s3.split_uri(f"{source}/model.safetensors")
        s3.client().delete_object(Bucket=bucket, Key=key)
    else:
        (Path(source) / "model.safetensors").unlink()
    with pytest.raises(StorageError, match="holds no complete model"):
        publish_one(source, root, tmp_path)
    assert contents(root) == {}


def test_a_killed_copy_into_a_folder_is_swept_away(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "published" / "ota-merged"

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(publishing.os, "replace", killed)
        patch.setattr(publishing.shutil, "rmtree", lambda *_, **__: None)  # a dead process cleans nothing up
        with pytest.raises(Killed):
            publish_one(str(model), str(tmp_path / "published"), tmp_path)
    assert [path.suffix for path in place.iterdir()] == [".tmp"]
    publish_one(str(model), str(tmp_path / "published"), tmp_path)
    assert [path.name for path in place.iterdir()] == ["1"]


# ---- latest.json


def test_latest_points_to_a_complete_version(places: tuple[str, str], tmp_path: Path) -> None:
    source, root = places
    assert read_latest(root, "ota-merged") is None
    for version in ("1", "2"):
        publish_one(source, root, tmp_path, version)
        latest = point_latest(root, "ota-merged", version, "digest1", mlflow_run="run")
        assert read_latest(root, "ota-merged") == latest
        assert record_at(latest.uri) is not None and latest.uri == f"{root}/ota-merged/{version}"
    back = point_latest(root, "ota-merged", "1", "digest1")
    assert (back.version, back.mlflow_run) == ("1", None)
    written = json.loads(contents(f"{root}/ota-merged")["latest.json"])
    assert written.keys() == {"name", "version", "uri", "digest", "published_at", "mlflow_run"}
    with pytest.raises(StorageError, match="publish version 7 first"):
        point_latest(root, "ota-merged", "7", "digest7")
    assert read_latest(root, "ota-merged") == back


def test_latest_is_not_written_again_for_the_same_version(model: Path, tmp_path: Path) -> None:
    root = tmp_path / "published"
    publish_one(str(model), str(root), tmp_path)
    point_latest(str(root), "ota-merged", "1", "digest1")
    place = root / "ota-merged" / "latest.json"
    place.write_text(place.read_text().replace('"20', '"19'))  # years ago
    assert point_latest(str(root), "ota-merged", "1", "digest1").published_at.startswith("19")
    place.write_text("{")
    with pytest.raises(StorageError, match="cannot be read as a pointer"):
        read_latest(str(root), "ota-merged")


# ---- the champion


def test_the_champion_is_published_and_a_later_one_meanwhile_too(
    registry: Registry, s3_server: S3Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, where = f"{s3_server.uri}/merged", {"cache": tmp_path / "cache", "tracking": registry.root}
    with pytest.raises(PromotionError, match="no champion to publish"):
        publish_champion(root, **where)
    promote("1", by="anna", reason="", root=registry.root)
    latest = publish_champion(root, **where)
    assert (latest.version, latest.digest) == ("1", "digest1")
    assert latest.mlflow_run == registry.client.get_model_version("ota-merged", "1").run_id
    assert publish_champion(root, **where) == latest

    promote("2", by="anna", reason="", root=registry.root)
    whole = publishing.publish

    def overtaken(source: str, **more: Any) -> int:
        done = whole(source, **more)
        if more["version"] == "2":
            promote("3", by="ben", reason="", root=registry.root)
        return done

    monkeypatch.setattr(publishing, "publish", overtaken)
    assert publish_champion(root, **where).version == "3"
    assert read_latest(root, "ota-merged") == publish_champion(root, **where)
    assert {name.split("/")[0] for name in contents(f"{root}/ota-merged")} == {"1", "2", "3", "latest.json"}


def test_an_artifact_in_s3_can_be_promoted(registry: Registry, s3_server: S3Test, model: Path) -> None:
    source = f"{s3_server.uri}/artifacts/fp1"
    storage.upload_folder(model, source, last=RECORD)
    assert register(registry.root, source, "in s3") == "4"
    promote("4", by="anna", reason="", root=registry.root)
    storage.delete_prefix(source, first=RECORD)
    promote("1", by="anna", reason="", root=registry.root)
    with pytest.raises(PromotionError, match=f"not complete at {source}"):
        promote("4", by="anna", reason="", root=registry.root)
