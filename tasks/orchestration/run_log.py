"""What a flow run shows while it works: how far a long stage is, and of a user's mistake its message alone."""

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

from ota_core.errors import OtaError

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

    Use it as a context manager around the stage; call it from any thread.
    """

    def __init__(self, every: float = SECONDS_BETWEEN) -> None:
        self._log, self._said, self._every = get_run_logger(), time.monotonic(), every
        self._context = contextvars.copy_context()  # the stage's threads do not know which run they belong to
        self._lock = threading.Lock()
        self._bars: dict[str, ProgressBar] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if not total or time.monotonic() - self._said < self._every:
            return
        with self._lock:
            if time.monotonic() - self._said < self._every:
                return
            self._said = time.monotonic()
            self._log.info("%s: %.0f %%", what, 100 * done / total)
            self._context.run(self._show, what, 100 * done / total)

    def __enter__(self) -> "Progress":
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


class _UserErrorsOnce(logging.Filter):
    """Drops what Prefect's engine logs, with a traceback, of a user's mistake: the line on the final state that follows says the same."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], OtaError))


def hide_tracebacks_of_user_errors() -> None:
    """Log a failed run's OtaError by its message alone, here and on the Prefect server. Any other error keeps its traceback."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        if not any(isinstance(known, _UserErrorsOnce) for known in logger.filters):
            logger.addFilter(_UserErrorsOnce())
