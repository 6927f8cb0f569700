"""What a flow run shows while it works: how far a long stage is, and of a user's mistake its message alone."""

import contextvars
import logging
import threading
import time
import traceback
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from uuid import UUID

import httpx
from prefect import Flow, tags
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from ota_core.addresses import without_secrets
from ota_core.errors import OtaError
from tasks.orchestration.credentials import block_credentials
from tasks.orchestration.ending import ends_soon, go_on

P = ParamSpec("P")
R = TypeVar("R")
SECONDS_BETWEEN = 10.0


class ProgressBar:
    """A progress artifact of the run, made when it is first shown."""

    def __init__(self, what: str) -> None:
        self._what, self._log = what, get_run_logger()
        self._artifact: UUID | None = None

    @property
    def shown(self) -> bool:
        """Whether there is something that can be brought up to date."""
        return self._artifact is not None

    def show(self, percent: float, text: str) -> None:
        """Say how far it is. A server that is away for a moment gets no more than a line in the log: it must not end hours of work."""
        try:
            if self._artifact is None:
                made: Any = create_progress_artifact(progress=percent, description=text)
                self._artifact = made
            else:
                update: Callable[..., Any] = update_progress_artifact
                update(artifact_id=self._artifact, progress=percent, description=text)
        except (httpx.HTTPError, PrefectException) as error:
            self._log.warning("the progress of %s cannot be shown: %s", self._what, error)


class Progress:
    """Tells the run's log and a progress artifact how far a long stage is, at most once in ten seconds; short ones leave no trace.

    Use it as a context manager around the stage; call it from any thread. Raises TerminationSignal where the process is told to end.
    """

    def __init__(self, every: float = SECONDS_BETWEEN) -> None:
        self._log, self._said, self._every = get_run_logger(), time.monotonic(), every
        self._context = contextvars.copy_context()  # the stage's threads do not know which run they belong to
        self._lock = threading.Lock()
        self._bars: dict[str, ProgressBar] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        go_on()
        if not total or time.monotonic() - self._said < self._every:
            return
        with self._lock:
            if time.monotonic() - self._said < self._every:
                return
            self._said = time.monotonic()
            self._log.info("%s: %.0f %%", what, 100 * done / total)
            self._context.run(self._show, what, 100 * done / total)

    def __enter__(self) -> "Progress":
        go_on()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with self._lock:  # a thread of the stage may still be telling
                for what in [what for what, bar in self._bars.items() if bar.shown]:
                    self._context.run(self._show, what, 100.0)

    def _show(self, what: str, percent: float) -> None:
        if what not in self._bars:
            self._bars[what] = ProgressBar(what)
        self._bars[what].show(percent, what)


class _Without(logging.Filter):
    """Drops what Prefect's engine logs, with a traceback, of a user's mistake: the line on the final state that follows says the same.

    ``error``: this one alone, and once.
    """

    def __init__(self, logger: logging.Logger, error: OtaError | None = None) -> None:
        super().__init__()
        self._logger, self._error = logger, error

    def filter(self, record: logging.LogRecord) -> bool:
        found = record.exc_info[1] if record.exc_info else None
        if self._error is None:
            return not isinstance(found, OtaError)
        if found is self._error:
            self._logger.removeFilter(self)
        return found is not self._error


def for_users(made: Flow[P, R]) -> Flow[P, R]:
    """A flow as users meet it: it speaks to S3 with the credentials of their block, ends soon when it is cancelled, and logs their mistakes by
    the message alone. The flows that it calls carry its run's tags, by which the server looks for runs that have fallen silent.

    Any other error keeps its traceback, here and on the Prefect server; of one that repeats a secret of an address only the message is left, without
    it. Stands above ``@flow``.
    """
    body, runs, tasks = made.fn, logging.getLogger("prefect.flow_runs"), logging.getLogger("prefect.task_runs")

    @wraps(body)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        quiet = _Without(tasks)
        tasks.addFilter(quiet)
        try:
            with tags(*flow_run.tags or ()), ends_soon(), block_credentials():
                return body(*args, **kwargs)
        except OtaError as error:
            runs.addFilter(_Without(runs, error))  # Prefect logs it after the body has ended
            # Prefect keeps the exception; where Dask has been loaded (tblib), with its causes, which hold addresses as they were given.
            error.__cause__ = error.__context__ = None
            raise
        except Exception as error:
            said = "".join(traceback.format_exception(error))
            if without_secrets(said) == said:
                raise
            hidden = RuntimeError(without_secrets(f"{type(error).__name__}: {error}")).with_traceback(error.__traceback__)
        finally:
            tasks.removeFilter(quiet)
        raise hidden  # here, where the other is not its context

    made.fn = wrapped
    return made
