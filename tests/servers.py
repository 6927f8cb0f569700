"""Servers that tests start, each once a session: S3, Prefect, MLflow; and how a test waits for what is not done at once."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import pytest

from tasks.local.s3_server import S3Server, environment, start_server
from tasks.storage import s3

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test-key", "AWS_SECRET_ACCESS_KEY": "test-secret"}
Found = TypeVar("Found")


def wait_until(holds: Callable[[], Found], said: Callable[[], object] = str, *, seconds: float = 120) -> Found:
    """What ``holds`` gives once it is true. Fails after so many seconds with what was ``said``, such as a log, until then."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, f"not within {seconds} s: {str(said())[-3000:]}"
        time.sleep(0.05)
    return found


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


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server of our own, with results in a temporary folder: nothing of the user's Prefect is read or written."""
    from prefect.settings import PREFECT_HOME, PREFECT_LOCAL_STORAGE_PATH, PREFECT_SERVER_ANALYTICS_ENABLED, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    home = tmp_path_factory.mktemp("prefect")
    settings = {PREFECT_HOME: home, PREFECT_LOCAL_STORAGE_PATH: home / "storage", PREFECT_SERVER_ANALYTICS_ENABLED: False}
    with temporary_settings(updates=settings), prefect_test_harness(server_startup_timeout=120):
        yield


def task_states(flow_run_id: UUID, *, seconds: float = 60) -> dict[str, list[str]]:
    """Task run's name to the names of its final states, in the order of their starts: usually one, such as Cached.

    Task runs reach the server as events, some time after they end: they are complete once they have all ended and none is added.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    runs: list[Any] = []

    def complete() -> bool:
        seen = len(runs)
        runs[:] = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])), limit=200)
        time.sleep(0.25)
        return len(runs) == seen > 0 and all(run.state is not None and run.state.is_final() for run in runs)

    with get_client(sync_client=True) as client:
        wait_until(complete, lambda: [(run.name, run.state_name) for run in runs], seconds=seconds)
    states: dict[str, list[str]] = {}
    for run in sorted(runs, key=lambda run: run.start_time or run.expected_start_time):
        states.setdefault(run.name, []).append(run.state_name)
    return states


def flow_run_name(flow_run_id: UUID) -> str:
    """The name that the Prefect server shows for a flow run."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run_id).name


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path, *, seconds: float = 240, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address of an MLflow server whose database and artifacts lie in the folder. On leaving, its whole process group is stopped.

    ``env``: more of its environment.
    """
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")]
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {"MLFLOW_DISABLE_TELEMETRY": "true"}
    plain |= env or {}
    log, url = folder / "server.log", f"http://127.0.0.1:{port}"
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=stream, start_new_session=True, env=plain)

    def answers() -> bool:
        assert process.poll() is None, f"the MLflow server did not come up: {log.read_text()[-2000:]}"
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return True
        except (urllib.error.URLError, OSError):
            return False

    try:
        wait_until(answers, log.read_text, seconds=seconds)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


@pytest.fixture(scope="session")
def blank_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables without a row; making them takes seconds, copying them does not."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow-blank") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking(blank_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home's folder of MLflow, empty."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "home" / "tracking"
    folder.mkdir(parents=True)
    shutil.copy(blank_database, folder / "mlflow.db")
    return folder
