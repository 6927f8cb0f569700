"""A real S3 server for tests: one process per test session, a fresh bucket per test, the environment pointing at it."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks.local.s3_server import S3Server, start_server
from tasks.settings import environment
from tasks.storage import s3

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret"}


@dataclass(frozen=True)
class S3Test:
    """What a test sees: the server's address and a bucket of its own."""

    endpoint: str
    bucket: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}"

    @property
    def client(self) -> Any:
        """boto3's client, to set up what the code under test finds."""
        return s3.client()


@pytest.fixture(scope="session")
def s3_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The session's server. Tests take ``s3_server`` instead."""
    with environment(CREDENTIALS):
        server = start_server(tmp_path_factory.mktemp("s3"))
    with server:
        yield server


@pytest.fixture
def s3_server(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Test]:
    """The server with the environment set for it and an empty bucket, which is deleted after the test."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    # No settings of the machine's user may reach a test.
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "no-such-file"))
    for name, value in s3_process.env.items():
        monkeypatch.setenv(name, value)
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    s3_process.create_bucket(bucket)
    client = s3.new_client()
    yield S3Test(endpoint=s3_process.endpoint, bucket=bucket)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        for item in page.get("Contents", []):
            client.delete_object(Bucket=bucket, Key=item["Key"])
    client.delete_bucket(Bucket=bucket)
