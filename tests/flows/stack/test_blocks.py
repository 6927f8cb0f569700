"""Credentials from a real block on a real Prefect server, used against a real S3 server."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect_aws import AwsCredentials

from ota_core.errors import OtaError
from tasks.local.s3_server import S3Server
from tasks.orchestration.credentials import VARIABLE, use_blocks
from tasks.storage import s3
from tests.servers import CREDENTIALS

ROOT = Path(__file__).parents[3]
NAMES = (
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_DEFAULT_REGION", "AWS_REGION",
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", VARIABLE,
)  # fmt: skip
KEYS: dict[str, Any] = {"aws_access_key_id": "block-key", "aws_secret_access_key": "block-secret"}


@pytest.fixture(autouse=True)
def plain_environment(prefect_server: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing of the machine's user, and nothing that a block has set stays after the test."""
    before = dict(os.environ)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    yield
    for name in NAMES:
        os.environ.pop(name, None)
    os.environ.update({name: value for name, value in before.items() if name in NAMES})


def saved(name: str, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    AwsCredentials(**fields).save(name, overwrite=True, _sync=True)  # type: ignore[call-arg]
    monkeypatch.setenv(VARIABLE, name)


def ours() -> dict[str, str]:
    return {name: os.environ[name] for name in NAMES if name in os.environ and name != VARIABLE}


def test_a_block_opens_a_real_bucket(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(
        "opens", monkeypatch, aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1",
        aws_client_parameters={"endpoint_url": s3_process.endpoint},
    )  # fmt: skip
    bucket = s3_process.create_bucket("from-a-block")
    use_blocks()
    s3.client().put_object(Bucket="from-a-block", Key="hello", Body=b"there")
    assert s3.client().get_object(Bucket="from-a-block", Key="hello")["Body"].read() == b"there"
    s3.client().delete_object(Bucket="from-a-block", Key="hello")
    s3.client().delete_bucket(Bucket=bucket.removeprefix("s3://"))


def test_without_a_name_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "  "):
        if value is not None:
            monkeypatch.setenv(VARIABLE, value)
        before = dict(os.environ)
        use_blocks()
        assert dict(os.environ) == before


@pytest.mark.parametrize("prefix", ["", "aws-credentials/"])
def test_all_that_a_block_holds_reaches_the_environment(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(
        "full", monkeypatch, **KEYS, aws_session_token="block-token", region_name="eu-central-1",
        aws_client_parameters={"endpoint_url": "http://127.0.0.1:1"},
    )  # fmt: skip
    monkeypatch.setenv(VARIABLE, f"{prefix}full")
    use_blocks()
    assert ours() == {
        "AWS_ACCESS_KEY_ID": "block-key", "AWS_SECRET_ACCESS_KEY": "block-secret", "AWS_SESSION_TOKEN": "block-token",
        "AWS_DEFAULT_REGION": "eu-central-1", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1",
    }  # fmt: skip


def test_the_block_wins_and_says_so_without_values(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    saved("wins", monkeypatch, **KEYS)
    given = {"AWS_ACCESS_KEY_ID": "own-key", "AWS_SECRET_ACCESS_KEY": "own-secret", "AWS_SESSION_TOKEN": "own-token"}
    for name, value in (given | {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:2"}).items():
        monkeypatch.setenv(name, value)
    flow(use_blocks)()  # in the run's own log, which the server keeps
    use_blocks()  # a second flow in the same process: nothing to say any more
    # Somebody else's session token would spoil the block's keys; the endpoint, which the block leaves open, stays.
    assert ours() == {
        "AWS_ACCESS_KEY_ID": "block-key", "AWS_SECRET_ACCESS_KEY": "block-secret", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:2",
    }  # fmt: skip
    (record,) = [record for record in caplog.records if VARIABLE in record.getMessage()]
    assert record.name == "prefect.flow_runs"
    assert all(name in record.getMessage() for name in given)
    assert not any(value in record.getMessage() for value in [*given.values(), *KEYS.values(), "127.0.0.1"])


def test_a_profile_is_not_hidden_by_keys_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    saved("profile", monkeypatch, profile_name="team")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "own-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "own-secret")
    use_blocks()
    assert ours() == {"AWS_PROFILE": "team"}


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
        use_blocks()
    assert ours() == {}


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
        use_blocks()
    assert "block-" not in str(caught.value)
    assert ours() == {}


def test_without_prefect_aws_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['prefect_aws'] = None\n"
        "from tasks.orchestration.credentials import use_blocks\nfrom ota_core.errors import OtaError\n"
        "try: use_blocks()\nexcept OtaError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {VARIABLE: "any"}, capture_output=True, text=True, check=True
    )
    assert "pip install prefect-aws" in done.stdout
