"""Credentials from a real block on a real Prefect server, used against a real S3 server."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect_aws import AwsCredentials

from ota_core.errors import OtaError, StorageError
from tasks.fetch import FetchJob
from tasks.job import run_job
from tasks.local.s3_server import S3Server
from tasks.orchestration.credentials import VARIABLE, block_credentials
from tasks.orchestration.executors import Here
from tasks.orchestration.run_log import for_users
from tasks.settings import Places, places
from tasks.storage import s3
from tasks.tracking.store import clear_errors, connect, resolve_store
from tests.servers import CREDENTIALS

ROOT = Path(__file__).parents[3]
NAMES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_REGION",
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", VARIABLE,
)  # fmt: skip
KEYS: dict[str, Any] = {"aws_access_key_id": "block-key", "aws_secret_access_key": "block-secret"}


@pytest.fixture(autouse=True)
def plain_environment(prefect_server: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine's user."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))


def saved(name: str, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    AwsCredentials(**fields).save(name, overwrite=True, _sync=True)  # type: ignore[call-arg]
    monkeypatch.setenv(VARIABLE, name)


def ours() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ and name != VARIABLE}


def handed_here() -> dict[str, str]:
    with s3.environment():
        return ours()


def handed() -> dict[str, str]:
    """What a block hands to somebody else's client; the environment is the same before, meanwhile and afterwards."""
    before = dict(os.environ)
    with block_credentials():
        assert dict(os.environ) == before
        found = handed_here()
        assert dict(os.environ) == before
    assert not s3.has_credentials()
    return found


def test_a_block_opens_a_real_bucket(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    saved(
        "opens", monkeypatch, aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1",
        aws_client_parameters={"endpoint_url": s3_process.endpoint},
    )  # fmt: skip
    bucket = s3_process.create_bucket("from-a-block")
    with block_credentials():
        s3.write_bytes(f"{bucket}/hello", b"there")
        with s3.Threads(1) as pool:
            assert pool.submit(s3.read_bytes, f"{bucket}/hello").result() == b"there"
        # MLflow's own client, which uploads from threads of its own.
        store = resolve_store(root=tmp_path)
        with clear_errors(store, "logging", "Nothing is lost."):
            client = connect(store)
            experiment = client.create_experiment("in S3", artifact_location=f"{bucket}/artifacts")
            client.log_text(client.create_run(experiment).info.run_id, "four", "note.txt")
        objects = [one.uri for one in s3.list_objects(f"{bucket}/")]
        assert len(objects) == 2 and any(uri.endswith("/artifacts/note.txt") for uri in objects)
        s3.delete_prefix(f"{bucket}/")
        s3.client().delete_bucket(Bucket=bucket.removeprefix("s3://"))
    with pytest.raises(StorageError):
        s3.list_objects(f"{bucket}/")


def test_the_last_thread_that_leaves_restores_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "own-key")
    before, inside, leave = dict(os.environ), threading.Event(), threading.Event()

    def stay() -> None:
        with s3.environment():
            inside.set()
            leave.wait(60)
            assert ours()["AWS_ACCESS_KEY_ID"] == "block-key"

    with s3.use_credentials(s3.Credentials(access_key="block-key", secret_key="block-secret")), s3.Threads(1) as pool:
        with s3.environment():
            other = pool.submit(stay)
            assert inside.wait(60)
        assert ours()["AWS_ACCESS_KEY_ID"] == "block-key", "somebody is still within"
        leave.set()
        other.result()
    assert dict(os.environ) == before


def test_without_a_name_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "  "):
        if value is not None:
            monkeypatch.setenv(VARIABLE, value)
        assert handed() == {}


@pytest.mark.parametrize("prefix", ["", "aws-credentials/"])
def test_all_that_a_block_holds_is_handed_on(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(
        "full", monkeypatch, **KEYS, aws_session_token="block-token", region_name="eu-central-1",
        aws_client_parameters={"endpoint_url": "http://127.0.0.1:1"},
    )  # fmt: skip
    monkeypatch.setenv(VARIABLE, f"{prefix}full")
    assert handed() == {
        "AWS_ACCESS_KEY_ID": "block-key", "AWS_SECRET_ACCESS_KEY": "block-secret", "AWS_SESSION_TOKEN": "block-token",
        "AWS_DEFAULT_REGION": "eu-central-1", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
    }  # fmt: skip


def test_the_block_wins_and_says_so_without_values(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    saved("wins", monkeypatch, **KEYS)
    given = {"AWS_ACCESS_KEY_ID": "own-key", "AWS_SECRET_ACCESS_KEY": "own-secret", "AWS_SESSION_TOKEN": "own-token"}
    for name, value in (given | {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:2"}).items():
        monkeypatch.setenv(name, value)
    found: list[dict[str, str]] = []

    @for_users
    @flow
    def inner() -> None:
        found.append(handed_here())

    @for_users
    @flow
    def outer() -> None:  # in the run's own log, which the server keeps; the inner flow has nothing to add
        inner()

    outer()
    # Somebody else's session token would spoil the block's keys; the endpoint, which the block leaves open, stays.
    assert found == [
        {"AWS_ACCESS_KEY_ID": "block-key", "AWS_SECRET_ACCESS_KEY": "block-secret", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:2"}
    ]  # fmt: skip
    (record,) = [record for record in caplog.records if VARIABLE in record.getMessage()]
    assert record.name == "prefect.flow_runs"
    assert all(name in record.getMessage() for name in given)
    assert not any(value in record.getMessage() for value in [*given.values(), *KEYS.values(), "127.0.0.1"])


def test_a_profile_is_not_hidden_by_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    saved("profile", monkeypatch, profile_name="team")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "own-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "own-secret")
    assert handed() == {"AWS_PROFILE": "team"}


@pytest.mark.parametrize(
    "reference, message",
    [
        ("no-such-block", "has no block aws-credentials/no-such-block; make it in the UI"),
        ("s3-bucket/x", "expected the name of a block"),
        ("aws-credentials/", "expected the name of a block"),
    ],
)
def test_names_that_lead_nowhere(reference: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, reference)
    with pytest.raises(OtaError, match=message):
        handed()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"aws_access_key_id": "block-key"}, "give both or none"),
        ({"aws_secret_access_key": "block-secret"}, "give both or none"),
        (KEYS | {"assume_role_arn": "arn:aws:iam::123456789012:role/merge"}, "assumes a role"),
        (KEYS | {"aws_client_parameters": {"verify": False}}, "sets verify of the client"),
    ],
)
def test_blocks_that_say_too_little_or_too_much(fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("odd", monkeypatch, **fields)
    with pytest.raises(OtaError, match=message) as caught:
        handed()
    assert "block-" not in str(caught.value)


def test_a_job_in_another_process_asks_for_the_block_itself(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Probe(Here):
        def run(self, job: Any, where: Places) -> Any:
            return handed_here()

    saved("elsewhere", monkeypatch, **KEYS)
    there: Any = run_job.fn(FetchJob(source="s3://b/m", identity="1"), places(tmp_path), Probe())
    assert there == {"AWS_ACCESS_KEY_ID": "block-key", "AWS_SECRET_ACCESS_KEY": "block-secret"} and ours() == {}


def test_without_prefect_aws_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['prefect_aws'] = None\n"
        "from tasks.orchestration.credentials import block_credentials\nfrom ota_core.errors import OtaError\n"
        "try:\n with block_credentials(): pass\nexcept OtaError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {VARIABLE: "any"}, capture_output=True, text=True, check=True
    )
    assert "pip install prefect-aws" in done.stdout
