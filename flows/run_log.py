"""What a flow run's log says: how far a long stage is, and of a user's mistake its message alone."""

import logging
import time

from prefect.logging import get_run_logger

from ota_core.errors import OtaError


class Progress:
    """Tells the run's log how far a long stage is, at most once in ten seconds."""

    def __init__(self) -> None:
        self._log, self._said = get_run_logger(), time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if total and time.monotonic() - self._said >= 10:
            self._said = time.monotonic()
            self._log.info("%s: %.0f %%", what, 100 * done / total)


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
