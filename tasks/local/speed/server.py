"""A Prefect server of the benchmark's own on loopback."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ota_core.errors import OtaError
from tasks.artifacts.processes import tail
from tasks.local.loopback import free_ports, get
from tasks.local.s3_server import kill_group
from tasks.local.speed.measure import child_environment

QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false"}


@contextmanager
def prefect_server(home: Path, *, timeout: float = 180.0) -> Iterator[dict[str, str]]:
    """A server whose database lies in ``home``, for the length of a ``with`` block: the environment that its clients need.

    Raises OtaError, with the end of its log, when it does not come up.
    """
    home.mkdir(parents=True, exist_ok=True)
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/api"
    environment = {**QUIET, "PREFECT_HOME": str(home)}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with open(home / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, env=child_environment(environment), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + timeout
        while get(f"{url}/health") is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise OtaError(f"the Prefect server did not come up within {timeout:g} s; {tail(home / 'server.log')}")
            time.sleep(0.2)
        yield {**environment, "PREFECT_API_URL": url}
    finally:
        kill_group(process.pid, grace=10.0)
        process.wait()
