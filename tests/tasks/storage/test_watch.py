"""Changes of a source, and damage to what was fetched, are seen without reading weights."""

import os
import shutil
from pathlib import Path

import pytest

from tasks.storage import models as storage
from tasks.storage import s3
from tasks.storage.layout import write_expert_json
from tasks.storage.models import EXPERT_JSON, upload_folder
from tasks.storage.watch import identity_of_source, is_intact
from tests.s3_requests import requests
from tests.servers import S3Test


@pytest.fixture
def expert(tmp_path: Path) -> Path:
    """The files of an expert; nobody reads the weights here."""
    folder = tmp_path / "expert"
    folder.mkdir()
    for name, content in {
        "config.json": "{}",
        "model.safetensors": "weights",
        "exp_avg_sq.safetensors": "moments",
        "train.log": "x",
    }.items():
        (folder / name).write_text(content)
    write_expert_json(folder, capability="math", base_model="base", trained_at="2026-11-20", step=100)
    return folder


def same_size(path: Path) -> None:
    """Other bytes; the time of change moves, as it does for any write that is not made in the same instant."""
    content = path.read_bytes()
    state = path.stat()
    path.write_bytes(content[::-1])
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


def longer(path: Path) -> None:
    with open(path, "a") as stream:
        stream.write(" ")


def replaced(path: Path) -> None:
    """Another file under the name, with the same size and time: its inode tells."""
    state = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("name", ["model.safetensors", "exp_avg_sq.safetensors", "config.json", EXPERT_JSON])
@pytest.mark.parametrize("change", [same_size, longer, replaced, Path.unlink])
def test_every_change_of_a_folder_is_seen(expert: Path, name: str, change: object) -> None:
    before = identity_of_source(str(expert))
    assert before is not None and identity_of_source(str(expert)) == before == identity_of_source(f"{expert}/.")
    change(expert / name)  # type: ignore[operator]
    assert identity_of_source(str(expert)) not in {before, None}


def test_files_that_are_not_the_models_do_not_count(expert: Path) -> None:
    before = identity_of_source(str(expert))
    longer(expert / "train.log")
    (expert / "README.md").write_text("a card")
    assert identity_of_source(str(expert)) == before
    (expert / "tokenizer.json").write_text("{}")
    assert identity_of_source(str(expert)) != before


def test_another_folder_has_another_identity(expert: Path, tmp_path: Path) -> None:
    assert identity_of_source(str(shutil.copytree(expert, tmp_path / "copy"))) != identity_of_source(str(expert))


def test_an_expert_in_s3(expert: Path, s3_server: S3Test) -> None:
    uri = f"{s3_server.uri}/experts/math/1"
    upload_folder(expert, uri, last=EXPERT_JSON)
    before = identity_of_source(uri)
    assert before is not None and identity_of_source(uri) == before
    for name in ("model.safetensors", EXPERT_JSON):
        same_size(expert / name)  # the same size and other bytes: another ETag
        storage.write_bytes(f"{uri}/{name}", (expert / name).read_bytes())
        after = identity_of_source(uri)
        assert after not in {before, None}
        before = after
    bucket, key = s3.split_uri(f"{uri}/config.json")
    s3_server.client.delete_object(Bucket=bucket, Key=key)
    assert identity_of_source(uri) not in {before, None}


def test_no_weights_are_read(expert: Path, s3_server: S3Test, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{s3_server.uri}/experts/math/1"
    upload_folder(expert, uri)
    with requests() as asked:
        identity_of_source(uri)
    assert {one.operation for one in asked} == {"ListObjectsV2"}
    monkeypatch.setattr(Path, "open", lambda *args, **kwargs: pytest.fail("opened a file"))
    assert identity_of_source(str(expert))


def test_what_no_cheap_look_can_tell(tmp_path: Path, s3_server: S3Test) -> None:
    """The fetch then runs, and says what is wrong."""
    for source in (
        "org/name",
        "org/name@main",
        str(tmp_path / "nowhere"),
        f"{s3_server.uri}/nothing/here",
        "s3://no-such-bucket/x",
    ):
        assert identity_of_source(source) is None, source


@pytest.mark.parametrize("damage", [None, "missing", "truncated", "expert.json", "folder", "log"])
def test_whether_a_fetched_checkpoint_is_intact(expert: Path, s3_server: S3Test, tmp_path: Path, damage: str | None) -> None:
    uri = f"{s3_server.uri}/experts/math/1"
    upload_folder(expert, uri, last=EXPERT_JSON)
    fetched = storage.fetch(uri, cache=tmp_path / "cache")
    if damage == "missing":
        (fetched.path / "exp_avg_sq.safetensors").unlink()
    elif damage == "truncated":
        os.truncate(fetched.path / "model.safetensors", 3)
    elif damage == "expert.json":
        (fetched.path / EXPERT_JSON).unlink()
    elif damage == "folder":
        shutil.rmtree(fetched.path)
    elif damage == "log":
        (fetched.path / "train.log").write_text("nothing of the model")
    assert is_intact(fetched) == (damage in {None, "log"})


def test_without_expert_json_there_is_none_to_miss(expert: Path, tmp_path: Path) -> None:
    (expert / EXPERT_JSON).unlink()
    assert is_intact(storage.fetch(str(expert), cache=tmp_path / "cache"))
