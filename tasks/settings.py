"""Where this tool keeps things, from the environment: ``OTA_HOME`` for everything, ``OTA_ARTIFACTS`` for the artifacts alone."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast, get_args

from ota_core.errors import OtaError
from ota_core.frozen import Frozen

Device = Literal["auto", "cpu", "cuda"]
"""What a flow may be asked to compute on; auto: cuda where torch sees one."""


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
        return self.model_copy(update={"cache": places().cache}) if os.environ.get("OTA_HOME") else self


def home_folder(home: str | Path | None = None) -> Path:
    """The folder for everything: the argument, else ``OTA_HOME``, else ``~/.ota``."""
    return Path(home or os.environ.get("OTA_HOME") or "~/.ota").expanduser().absolute()


def places(home: str | Path | None = None, artifacts: str | None = None) -> Places:
    """The places in force: the arguments, else the environment, else ``~/.ota``."""
    root = home_folder(home)
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
