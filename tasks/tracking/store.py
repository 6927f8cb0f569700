"""Where MLflow keeps its runs, and how this project talks to it: bounded in time, one clear error, names that MLflow accepts."""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ota_core.addresses import holds_secret, without_secrets
from ota_core.errors import StorageError
from ota_core.frozen import Frozen
from tasks.settings import allow_server
from tasks.storage import s3
from tasks.tracking.database import make_database
from tasks.tracking.names import EXPERIMENT
from tasks.tracking.view import VIEW, VIEW_KEY

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.store.entities import PagedList

T = TypeVar("T")

DATABASE = "mlflow.db"
ARTIFACTS = "mlartifacts"

NAME_LENGTH = 250
"""MLflow's longest name of a metric, param or tag, in characters."""
PARAM_LENGTH = 6000
TAG_LENGTH = 8000

# MLflow's own defaults keep a caller waiting for minutes when its server is away. What the user has set wins.
CLIENT_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",  # seconds
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a link for every child run; the flow prints one of its own
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # a bar for every file, also where it takes no time
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing leaves the machine unasked
}
LOCK_SECONDS = 120.0
_SERVER_LOCK = threading.Lock()


class Store(Frozen):
    """A tracking store: its URI as MLflow wants it, and for SQLite the folder that its artifacts go to."""

    uri: str
    artifacts: Path | None = None
    """None where the server decides."""

    @property
    def is_server(self) -> bool:
        return self.uri.startswith(("http://", "https://"))

    @property
    def shown(self) -> str:
        """The URI without a user name and password, for messages."""
        return without_secrets(self.uri)


def resolve_store(*, tracking_uri: str | None = None, root: Path | None = None) -> Store:
    """The store: the argument, else ``MLFLOW_TRACKING_URI``, else SQLite at ``root/mlflow.db`` with the artifacts beside it.

    An empty address counts as none: pools of type docker hand on what their worker lacks as an empty variable.
    Raises StorageError when none of the three is given.
    """
    if tracking_uri:
        if holds_secret(tracking_uri):
            raise StorageError(
                f"tracking_uri {without_secrets(tracking_uri)} held a user name or a password, which Prefect would keep; give them in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
                "or in the address in MLFLOW_TRACKING_URI"
            )
        allow_server(tracking_uri, "tracking_uri", os.environ.get("MLFLOW_TRACKING_URI"))
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        if root is None:
            raise StorageError("MLflow has no place for its runs: set MLFLOW_TRACKING_URI, or name a folder for its database")
        return embedded(root)
    if uri.startswith("sqlite:///"):
        return Store(uri=uri, artifacts=Path(uri.removeprefix("sqlite:///")).resolve().parent / ARTIFACTS)
    return Store(uri=uri)


def embedded(root: Path) -> Store:
    """The database in a folder."""
    root = root.resolve()
    return Store(uri=f"sqlite:///{root / DATABASE}", artifacts=root / ARTIFACTS)


def noted_address(shown: str | None, root: Path) -> str | None:
    """The ``tracking_uri`` for a store that was noted by ``shown`` (None: the embedded one): None where the environment names the same one, with a password."""
    if shown is None:
        return embedded(root).uri
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return None if given and without_secrets(given) == shown else shown


def connect(store: Store) -> MlflowClient:
    """A client of the store. Creates an embedded database, but asks nothing of a server yet. Raises StorageError."""
    for name, value in CLIENT_DEFAULTS.items():
        os.environ.setdefault(name, value)
    for noisy in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    if store.artifacts is not None:
        make_database(Path(store.uri.removeprefix("sqlite:///").partition("?")[0]).resolve())
    return MlflowClient(tracking_uri=store.uri)


def locked(store: Store) -> AbstractContextManager[object]:
    """One writer at a time: looking a run up and making it are two steps, and an embedded database's tables are made first.

    Across processes for an embedded database, across the threads of this process for a server.
    """
    from filelock import FileLock

    if store.artifacts is None:
        return _server_lock()
    store.artifacts.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(store.artifacts.with_name(f"{DATABASE}.lock"), timeout=LOCK_SECONDS)


@contextmanager
def _server_lock() -> Iterator[None]:
    if not _SERVER_LOCK.acquire(timeout=LOCK_SECONDS):
        raise TimeoutError(f"another thread of this process has been talking to the server for {LOCK_SECONDS:g} s")
    try:
        yield
    finally:
        _SERVER_LOCK.release()


def store_errors() -> tuple[type[Exception], ...]:
    """What MLflow, its database or the connection raises."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


@contextmanager
def clear_errors(store: Store, doing: str, safe: str) -> Iterator[None]:
    """What MLflow, its database or the connection raises becomes one StorageError; anything else passes unchanged.

    ``safe`` says what is not lost. Credentials that were handed to this tool's S3 client hold for MLflow's own, too.
    """
    try:
        with s3.environment():
            yield
    except store_errors() as error:
        where = (
            f"check that the server at {store.shown} is up (MLFLOW_TRACKING_URI names it; unset it for the embedded database)"
            if store.is_server
            else f"check the database {store.shown}"
        )
        raise StorageError(
            f"MLflow at {store.shown} failed while {doing}: {_reason(error)}. {safe} What to do: {where}, then run the same again"
        ) from error


@contextmanager
def artifact_errors(what: str, location: str, safe: str) -> Iterator[None]:
    """Around nothing but the call that stores ``what`` at ``location``: any error of the artifact store becomes one StorageError.

    ``safe`` says what is not lost. A bucket raises boto's exceptions, which ``clear_errors`` does not know; each kind of store has its own.
    """
    try:
        yield
    except Exception as error:
        raise StorageError(
            f"{what} could not be stored at {without_secrets(location)} ({_reason(error)}). {safe} "
            "Check access to the artifact store, then run the same again"
        ) from error


def experiment_id(client: MlflowClient, store: Store) -> str:
    """The experiment's id; the experiment is made when it is missing. Raises StorageError when it was deleted."""
    from mlflow.entities import LifecycleStage
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        location = store.artifacts.as_uri() if store.artifacts is not None else None
        # The kind spares the reader the UI's question what sort of experiment this is.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return str(client.create_experiment(EXPERIMENT, artifact_location=location, tags=tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(EXPERIMENT)  # somebody else made it in between
            if found is None:
                raise
    if found.lifecycle_stage != LifecycleStage.ACTIVE:
        raise StorageError(
            f"MLflow's experiment {EXPERIMENT!r} at {store.shown} was deleted; "
            f"restore it with: mlflow experiments restore --experiment-id {found.experiment_id}"
        )
    return str(found.experiment_id)


def open_hint(
    *, tracking_uri: str | None = None, root: Path | None = None, experiment: str | None = None, run: str | None = None
) -> str:
    """Where to look at the runs: the server's address, or the command that shows the embedded database and the address then.

    With an experiment's id the address leads to its table of runs, with a run's id as well to that run.
    """
    store = resolve_store(tracking_uri=tracking_uri, root=root)
    if store.is_server:
        return f"MLflow: {page_url(store.shown, experiment, run)}"
    program = Path(sys.executable).with_name("mlflow")
    name = os.path.relpath(program) if program.is_relative_to(Path.cwd()) else str(program)
    command = shlex.join([name if program.exists() else "mlflow", "ui", "--backend-store-uri", store.shown, "--port", "5000"])
    return f"MLflow: run\n  {command}\nand open {page_url('http://127.0.0.1:5000', experiment, run)}"


def page_url(server: str, experiment: str | None = None, run: str | None = None) -> str:
    """The address of a page of MLflow's UI."""
    if experiment is None:
        return server.rstrip("/")
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs" + (f"?{VIEW_KEY}={VIEW}" if run is None else f"/{run}")


def mlflow_name(name: str) -> str:
    """The nearest name that MLflow takes: ASCII letters, digits and ``_-. :/``, a plain relative path, at most 250 characters."""
    clean = re.sub(r"[^A-Za-z0-9_\-. :/]", ".", name)
    clean = posixpath.normpath(clean).lstrip("/")
    clean = "/".join(part for part in clean.split("/") if part != "..") or "_"
    if clean == "." or clean.startswith(".."):  # read as a way up, even where it is the beginning of a longer name
        clean = f"_{clean.lstrip('.')}"
    if len(clean) > NAME_LENGTH:
        clean = f"{clean[: NAME_LENGTH - 9]}.{_short_hash(name)}"
    return clean


def mlflow_names(names: Iterable[str]) -> dict[str, str]:
    """Each name to one that MLflow accepts. Where two would become one, both carry a hash of their spelling; none is dropped."""
    clean = {name: mlflow_name(name) for name in names}
    taken = list(clean.values())
    return {n: c if taken.count(c) == 1 else f"{c[: NAME_LENGTH - 9]}.{_short_hash(n)}" for n, c in clean.items()}


def mlflow_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics under names that MLflow accepts."""
    return {name: metrics[key] for key, name in mlflow_names(metrics).items()}


def cut(value: str, length: int) -> str:
    """The value, or its beginning and a note when it is longer than MLflow keeps. The same value is always cut the same way."""
    if len(value) <= length:
        return value
    note = f"... ({len(value)} characters, sha256 {_short_hash(value)}; whole in the artifacts)"
    return value[: length - len(note)] + note


def batches(rows: Sequence[T], size: int) -> Iterator[list[T]]:
    """The rows in lists of at most ``size``."""
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


def pages(search: Callable[..., PagedList[T]], **asked: Any) -> Iterator[T]:
    """Everything that one of the client's searches finds, page by page as it is taken."""
    token = None
    while True:
        page = search(**asked, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def quoted(filters: Mapping[str, str]) -> str:
    """A search filter that asks for all of these tags. Raises ValueError on a value that cannot be quoted."""
    for key, value in filters.items():
        if "'" in value or "`" in key:
            raise ValueError(f"tag {key}={value!r} holds a quote, which MLflow's search cannot escape")
    return " and ".join(f"tags.`{key}` = '{value}'" for key, value in filters.items())


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    lines = without_secrets(str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
