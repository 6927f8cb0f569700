"""What MLflow is to be told, kept in the home folder until it is told: ``<home>/unsent/*.json``.

A file is written before the first request and removed after the last. So it stays where the server is away and where the process is killed in
between; the next run sends it, or ``ota sync``. Sending twice is fine: a run is found again by what it is of (``tasks.tracking.merge``).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ota_core.artifact import write_text_atomic
from ota_core.errors import OtaError, StorageError
from tasks.evaluation.scores import ModelScores
from tasks.tracking.kept_run import KeptRun, log_kept
from tasks.tracking.merge import log_benchmark, log_merge
from tasks.tracking.patience import LOGGING_SECONDS, within
from tasks.tracking.run import InputRef, LoggedRun, MergeRun
from tasks.tracking.store import embedded, noted_address, resolve_store

log = logging.getLogger(__name__)

FOLDER = "unsent"


class BenchmarkRun(BaseModel):
    """The scores of one model, as they are logged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["benchmark"] = "benchmark"
    name: str
    source: str
    digest: str
    fingerprint: str
    """Of the scores: model, suite and data."""
    scores: ModelScores
    data: InputRef | None = None


class KeptMerge(BaseModel):
    """A merge, as it is logged."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["merge"] = "merge"
    run: MergeRun

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def fingerprint(self) -> str:
        return self.run.fingerprint


class Unsent(BaseModel):
    """Something to log, and where."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: str | None
    """The tracking server's address without a password; None for the embedded database."""
    what: KeptMerge | BenchmarkRun | KeptRun = Field(discriminator="kind")

    def log(self, root: Path, tracking_uri: str | None = None) -> LoggedRun:
        """Tell MLflow. Raises StorageError."""
        uri = tracking_uri or noted_address(self.store, root)
        if isinstance(self.what, KeptMerge):
            return log_merge(self.what.run, tracking_uri=uri, root=root)
        if isinstance(self.what, KeptRun):
            return log_kept(self.what, resolve_store(tracking_uri=uri, root=root))
        one = self.what
        return log_benchmark(
            one.name, source=one.source, digest=one.digest, fingerprint=one.fingerprint, scores=one.scores, data=one.data,
            tracking_uri=uri, root=root,
        )  # fmt: skip


@dataclass
class Keeping:
    """Whether the server was found away within ``keeping``."""

    away: StorageError | None = None


_keeping: ContextVar[Keeping | None] = ContextVar("keeping", default=None)
WAITS = LoggedRun(run_id="", experiment_id="", url=None, model_version=None)
"""What ``tell`` returns within ``keeping`` for what is kept."""


@contextmanager
def keeping() -> Iterator[Keeping]:
    """Within this, what cannot be logged is kept, with a warning, and ends nothing: for parts of something larger, such as a study's merges.

    A server that was away once is not asked again.
    """
    token = _keeping.set(found := Keeping())
    try:
        yield found
    finally:
        _keeping.reset(token)


def tell(what: MergeRun | BenchmarkRun | KeptRun, *, home: Path, root: Path, tracking_uri: str | None = None) -> LoggedRun:
    """Log it, and then what an earlier run could not; what of the same merge waits is sent first.

    A run that labels others, such as a study's, comes after all that waits. root: folder of the embedded database. Takes at most
    ``LOGGING_SECONDS``. Raises StorageError, which names the file that keeps it.
    """
    resolved = resolve_store(tracking_uri=tracking_uri, root=root)
    store = None if resolved.uri == embedded(root).uri else resolved.shown
    unsent = Unsent(store=store, what=KeptMerge(run=what) if isinstance(what, MergeRun) else what)
    path, part_of = _keep(unsent, home), _keeping.get()
    if part_of is not None and part_of.away is not None:
        return WAITS
    waiting = {one: held for one, held in kept(home).items() if held.store == store and one != path}
    labels = isinstance(what, KeptRun) and what.labels is not None
    for earlier in [one for one, held in waiting.items() if labels or held.what.fingerprint == unsent.what.fingerprint]:
        if not _try(earlier, waiting.pop(earlier), root) and labels:
            break  # the others would have to wait as long
    try:
        logged = _send(path, unsent, root, tracking_uri)
    except StorageError as error:
        if part_of is not None:
            part_of.away = error
            log.warning("%s. What was to be logged is kept in %s", error, path)
            return WAITS
        raise StorageError(
            f"{error}. What was to be logged is kept in {path}: the next run sends it, or: ota sync", reason=error.reason
        ) from error
    for earlier, held in waiting.items():
        if not _try(earlier, held, root):
            break  # the others would have to wait as long
    return logged


def kept(home: Path) -> dict[Path, Unsent]:
    """What waits in this home, oldest first. What this version cannot read is left where it is, with a warning."""
    found: dict[Path, Unsent] = {}
    for path in sorted((home / FOLDER).glob("*.json"), key=lambda one: (_age(one), one.name)):
        try:
            found[path] = Unsent.model_validate_json(path.read_bytes())
        except FileNotFoundError:  # sent meanwhile
            continue
        except (OSError, ValidationError) as error:
            first = str(error).splitlines()[0]
            log.warning(
                "%s, which MLflow was to be told, cannot be read (%s); it was written by another version, or is damaged",
                path,
                first,
            )
    return found


def sync(home: Path, root: Path, tracking_uri: str | None = None) -> Iterator[tuple[Unsent, LoggedRun | OtaError]]:
    """Send everything that waits, oldest first: each with the run that holds it, or why it could not be sent."""
    for path, unsent in kept(home).items():
        try:
            yield unsent, _send(path, unsent, root, tracking_uri)
        except OtaError as error:
            yield unsent, error


def _keep(unsent: Unsent, home: Path) -> Path:
    text = unsent.model_dump_json()
    name = f"{unsent.what.kind}-{unsent.what.fingerprint[:16]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    path = home / FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, text)
    return path


def _send(path: Path, unsent: Unsent, root: Path, tracking_uri: str | None = None) -> LoggedRun:
    """Log it and remove its file, which another process that sends it at the same time may have done."""
    with ExitStack() as stack:
        with suppress(FileNotFoundError):
            stack.enter_context(_held(path))
        logged = within(LOGGING_SECONDS, f"logging {unsent.what.name!r} to MLflow", lambda: unsent.log(root, tracking_uri))
        path.unlink(missing_ok=True)
    return logged


def _try(path: Path, unsent: Unsent, root: Path) -> bool:
    """Send what an earlier run left; False where that went wrong. What a live process is sending is left to it."""
    try:
        with _held(path, wait=False):
            pass
        _send(path, unsent, root)
    except (FileNotFoundError, BlockingIOError):
        return True
    except OtaError as error:
        log.warning("what an earlier run could not log is still kept in %s (%s); ota sync sends it", path, error)
        return False
    log.info("logged what an earlier run could not: %s", unsent.what.name)
    return True


@contextmanager
def _held(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the file against other processes; the system lets go of it when a process dies. Raises BlockingIOError, FileNotFoundError."""
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(file)


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
