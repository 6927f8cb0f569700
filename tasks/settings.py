"""Where this tool keeps things, from the environment: ``OTA_HOME`` for everything, ``OTA_ARTIFACTS`` for the artifacts alone.

And what a deployed flow may touch on its worker: whoever may start a run chooses its parameters, and those are addresses. A flow that
somebody runs in a shell may touch what that person may. On a worker (``OTA_WORK_POOL`` is set there) it takes models, suites, data, homes
and tracking servers from S3, the hub, the deployment's own folders and what ``OTA_ALLOWED_ROOTS`` names, with commas between: folders, and
servers such as ``https://mlflow.example.com``.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, cast, get_args
from urllib.parse import urlsplit

from pydantic import Field

from ota_core.errors import OtaError, StorageError
from ota_core.frozen import Frozen

Device = Literal["auto", "cpu", "cuda"]
"""What a flow may be asked to compute on; auto: cuda where torch sees one."""


Address = Annotated[str, Field(pattern=r"^(?:[^:]*://[^/?#@]*(?:[/?#].*)?|[^:]*(?::(?:[^/].*|/(?:[^/].*)?)?)?)$")]
"""A server's address as a parameter of a flow. Prefect keeps parameters, so that it refuses one with a user name and a password: an @ between
:// and the first slash after it. In a path, such as that of a database's file, an @ means nothing."""


def as_device(text: str) -> Device:
    """``text``, where it names what a flow may compute on. Raises OtaError."""
    if text not in get_args(Device):
        raise OtaError(f"device: got '{text}', expected cpu, cuda or auto")
    return cast(Device, text)


class Places(Frozen):
    """The folders of one installation."""

    artifacts: str
    """Root of the stage outputs: a folder or ``s3://bucket/prefix``."""
    cache: Path
    """Local cache of downloads, digests and locks."""
    tracking: Path
    """Folder of the embedded MLflow database, used where no tracking server is configured."""

    @property
    def home(self) -> Path:
        """The folder that all but the artifacts lies below; searches, studies and the demo's models, too."""
        return self.tracking.parent

    def here(self) -> "Places":
        """The places as this machine has them, of those that another one sends: a machine's own ``OTA_HOME`` wins for the cache."""
        own = self.model_copy(update={"cache": places().cache}) if os.environ.get("OTA_HOME") else self
        allow_path(own.cache, "the cache")
        if "://" not in own.artifacts:
            allow_path(own.artifacts, "the root of the artifacts")
        return own


def home_folder(home: str | Path | None = None) -> Path:
    """The folder for everything: the argument, else ``OTA_HOME``, else ``~/.ota``."""
    return Path(home or os.environ.get("OTA_HOME") or "~/.ota").expanduser().absolute()


def places(home: str | Path | None = None, artifacts: str | None = None) -> Places:
    """The places in force: the arguments, else the environment, else ``~/.ota``."""
    root = home_folder(home)
    if home is not None:
        allow_path(root, "the home folder")
    if artifacts is not None and "://" not in artifacts:
        allow_path(artifacts, "the root of the artifacts")
    return Places(
        artifacts=artifacts or os.environ.get("OTA_ARTIFACTS") or str(root / "artifacts"),
        cache=root / "cache",
        tracking=root / "tracking",
    )


@contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables, or unset those that are None, for the length of a ``with`` block, and put the old ones back."""
    before = exchanged(values)
    try:
        yield
    finally:
        exchanged(before)


def exchanged(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """Put these into the environment, None for what it is not to hold; what it held before."""
    before = {name: os.environ.pop(name, None) for name in values}
    os.environ.update({name: value for name, value in values.items() if value is not None})
    return before


ROOTS = "OTA_ALLOWED_ROOTS"
DEPLOYMENTS = Path(__file__).resolve().parents[1] / "deployments"


def is_deployed() -> bool:
    """Whether this process runs a flow for a work pool."""
    return bool(os.environ.get("OTA_WORK_POOL"))


def allow_path(path: Path | str, what: str) -> None:
    """Raise StorageError where a deployed flow may not use this path of its worker; symbolic links are followed first."""
    if not is_deployed():
        return
    given = Path(path).expanduser().resolve()
    if not any(given.is_relative_to(root) for root in _folders()):
        raise StorageError(
            f"{what} {path} lies on the worker, outside of what its runs may use; put it into S3, or let the worker's {ROOTS} name the folder",
            reason="denied",
        )


def allow_server(address: str, what: str, own: str | None) -> None:
    """Raise StorageError where a deployed flow may not speak to this server: the worker would show it its credentials. own: its own server."""
    if not is_deployed() or address == own:
        return
    if not address.startswith(("http://", "https://")):
        allow_path(urlsplit(address).path or address, what)
        return
    if _server(address) not in {_server(one) for one in _listed() if "://" in one}:
        raise StorageError(
            f"{what} {_server(address)} is not the worker's own; leave it out, or let the worker's {ROOTS} name the server",
            reason="denied",
        )


def _listed() -> list[str]:
    return [one.strip() for one in os.environ.get(ROOTS, "").split(",") if one.strip()]


def _folders() -> list[Path]:
    own = [os.environ.get("OTA_HOME") or "~/.ota", os.environ.get("OTA_ARTIFACTS") or "", os.environ.get("OTA_NIGHTLY") or ""]
    local = [one for one in (*_listed(), *own) if one and "://" not in one]
    return [DEPLOYMENTS, *(Path(one).expanduser().resolve() for one in local)]


def _server(address: str) -> str:
    """Scheme, host and port, without a user name and password."""
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        return parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{parts.hostname}:{port or {'http': 80, 'https': 443}.get(parts.scheme)}"
