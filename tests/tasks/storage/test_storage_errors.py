"""What a user reads when storage fails: what was tried, and what to do."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ota_core.errors import StorageError
from tasks.storage import models as storage
from tasks.storage import s3
from tasks.storage.cache import digest_file
from tasks.storage.models import fetch
from tasks.storage.streaming.streams import Streams
from tests.servers import S3Test


@pytest.fixture
def refused(s3_server: S3Test, tmp_path: Path) -> Callable[..., str]:
    def message(source: str, **options: bool) -> str:
        with pytest.raises(StorageError) as seen:
            fetch(source, cache=tmp_path / "cache", **options)
        return str(seen.value)

    return message


def test_no_such_bucket(s3_server: S3Test, refused: Callable[..., str]) -> None:
    text = refused("s3://no-such-bucket/math")
    assert f"endpoint {s3_server.endpoint}, bucket 'no-such-bucket', key 'math'" in text
    assert "there is no bucket 'no-such-bucket'" in text and "check the name" in text


def test_no_such_key(s3_server: S3Test, refused: Callable[..., str]) -> None:
    text = refused(f"{s3_server.uri}/experts/matth")
    assert "no such key or prefix" in text and "'experts/matth'" in text and s3_server.endpoint in text
    with pytest.raises(StorageError, match=rf"cannot read {s3_server.uri}/x .*there is no such key"):
        storage.read_bytes(s3_server.uri + "/x")


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_access_denied(s3_server: S3Test, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "wrong")
    text = refused(f"{s3_server.uri}/a")
    assert "access denied" in text and "AWS_ACCESS_KEY_ID" in text and s3_server.bucket in text


def test_credentials_that_are_handed_on(s3_server: S3Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold within the block and in the threads that it starts, and leave the environment as it is."""
    for name, wrong in {"ACCESS_KEY_ID": "no-key", "SECRET_ACCESS_KEY": "no-secret", "SESSION_TOKEN": "no-token"}.items():
        monkeypatch.setenv(f"AWS_{name}", wrong)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    before, folder = dict(os.environ), tmp_path / "model"
    (folder).mkdir()
    (folder / "config.json").write_text("{}")
    ours = s3.Credentials(access_key="test-key", secret_key="test-secret", endpoint=s3_server.endpoint)
    assert "test-secret" not in repr(ours)
    with s3.use_credentials(ours):
        storage.upload_folder(folder, s3_server.uri + "/a")
        fetched = fetch(s3_server.uri + "/a", cache=tmp_path / "cache")
        with s3.use_credentials(None), pytest.raises(StorageError, match=r"endpoint http://127\.0\.0\.1:9"):
            storage.list_objects(s3_server.uri)
        with Streams(cache=tmp_path / "cache", memory=2**26) as streams:
            assert set(streams.model(s3_server.uri + "/a").files) == set(fetched.files)
    assert dict(os.environ) == before
    with pytest.raises(StorageError, match=r"endpoint http://127\.0\.0\.1:9"):
        storage.list_objects(s3_server.uri)


def test_a_profile_is_preferred_to_keys_of_the_environment(
    s3_server: S3Test, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["[team]", "aws_access_key_id = test-key", "aws_secret_access_key = test-secret"]
    (tmp_path / "keys").write_text("\n".join(lines))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "no-key")
    with s3.use_credentials(s3.Credentials(profile="team")):
        assert storage.list_objects(s3_server.uri) == []
    with s3.use_credentials(s3.Credentials(profile="other")), pytest.raises(StorageError, match="other"):
        storage.list_objects(s3_server.uri)


def test_no_credentials(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE" in refused("s3://bucket/a")


def test_nobody_at_the_endpoint(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    started = time.monotonic()
    text = refused("s3://bucket/a")
    assert "endpoint http://127.0.0.1:9, bucket 'bucket'" in text and "check that the server runs" in text
    assert time.monotonic() - started < 15


@pytest.mark.slow
def test_endpoint_that_swallows_connections(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A host behind a firewall answers nothing: a listener with a full queue does the same."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{listener.getsockname()[1]}")
        started = time.monotonic()
        text = refused("s3://bucket/a")
        assert "Connect timeout" in text and "check that the server runs" in text
        assert time.monotonic() - started < 20
        for filler in fillers:
            filler.close()


def test_prefix_one_level_too_high(s3_server: S3Test, refused: Callable[..., str]) -> None:
    s3.write_bytes(s3_server.uri + "/experts/math/config.json", b"{}")
    assert "name one of the folders below it: math" in refused(s3_server.uri + "/experts")


def test_expert_without_its_manifest(s3_server: S3Test, refused: Callable[..., str], tmp_path: Path) -> None:
    s3.write_bytes(s3_server.uri + "/a/config.json", b"{}")
    assert fetch(s3_server.uri + "/a", cache=tmp_path / "cache").expert is None
    assert "holds no expert.json" in refused(s3_server.uri + "/a", require_expert_json=True)
    (tmp_path / "config.json").write_text("{}")
    assert "holds no expert.json" in refused(str(tmp_path), require_expert_json=True)


def test_manifest_that_does_not_fit(s3_server: S3Test, refused: Callable[..., str]) -> None:
    known = {"capability": "math", "base_model": "b", "trained_at": "2026-11-20"}
    uri = s3_server.uri + "/a"
    s3.write_bytes(uri + "/config.json", b"{}")
    for manifest, expected in [
        (b"{", r"expert.json is not JSON"),
        (b"[]", "lacks capability, base_model, trained_at"),
        (json.dumps(known | {"files": {"config.json": "12"}}).encode(), "expected a sha256 of 64 hex digits"),
        (
            json.dumps(known | {"files": {"gone.bin": "0" * 64}}).encode(),
            "expert.json lists gone.bin, which the prefix does not hold",
        ),
        (json.dumps(known | {"files": {"config.json": {"sha256": "0" * 64}}}).encode(), hashlib.sha256(b"{}").hexdigest()),
    ]:
        s3.write_bytes(uri + "/expert.json", manifest)
        assert expected in refused(uri)


def test_no_such_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "expected a checkpoint folder, s3://bucket/prefix, or a Hugging Face id org/name@revision" in refused(
        "/no/such/folder"
    )
    (tmp_path / "file").write_text("")
    assert "is a file; name the checkpoint's folder" in refused(str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    assert "holds no model files" in refused(str(tmp_path / "empty"))
    (tmp_path / "run" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-10" / "config.json").write_text("{}")
    assert "Folders in it do: checkpoint-10; name one of them" in refused(str(tmp_path / "run"))
    assert "is not an S3 address" in refused("s3:///x")


def test_a_cache_that_cannot_be_made_is_not_the_inputs_fault(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    (tmp_path / "weights").write_text("")
    with pytest.raises(StorageError, match=r"home.cache cannot be made \(Not a directory\); let OTA_HOME name"):
        digest_file(tmp_path / "weights", cache=tmp_path / "home" / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "config.json").touch(0o000)
    assert "cannot read" in refused(str(tmp_path))
