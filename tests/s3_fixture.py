"""A real S3 server for tests: one process per test session, a fresh bucket per test, the environment pointing at it."""

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tasks.local.s3_server import S3Server, environment, start_server
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


class Request(NamedTuple):
    """One request to S3."""

    operation: str
    key: str
    range: str
    condition: str
    """``If-Match``."""


class Requests(list[Request]):
    """Requests that left this process; ``before`` is told how many there were, and may raise to break one."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[int], None] = lambda count: None

    def bytes(self, name: str = "") -> int:
        """Bytes asked for of objects whose key ends so."""
        ranges = [one.range.removeprefix("bytes=").split("-") for one in self if one.key.endswith(name) and one.range]
        return sum(int(last) - int(first) + 1 for first, last in ranges)


@contextmanager
def requests(*operations: str) -> Iterator[Requests]:
    """Everything that is asked of S3 meanwhile, or these operations alone."""
    seen, lock = Requests(), threading.Lock()

    def note(model: Any, params: dict[str, Any], **_: Any) -> None:
        if operations and model.name not in operations:
            return
        headers = params["headers"]
        with lock:
            seen.append(Request(model.name, params["url_path"].strip("/"), headers.get("Range", ""), headers.get("If-Match", "")))
            count = len(seen)
        seen.before(count)

    clients = [s3.client(), s3.client(patient=True)]
    for client in clients:
        client.meta.events.register("before-call.s3", note)
    try:
        yield seen
    finally:
        for client in clients:
            client.meta.events.unregister("before-call.s3", note)


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


@pytest.fixture
def gets(s3_server: S3Test) -> Iterator[Requests]:
    """What is read of objects."""
    with requests("GetObject") as seen:
        yield seen
