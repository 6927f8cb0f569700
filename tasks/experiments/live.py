"""A run in MLflow of a search or a tuning that goes on for hours: a server that is away ends none, and is told everything at the end."""

from dataclasses import dataclass, field

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ota_core.errors import StorageError
from tasks.settings import Places
from tasks.tracking.kept_run import KeptRun, Known, log_part, mark
from tasks.tracking.outbox import tell
from tasks.tracking.patience import ASKING_SECONDS, within
from tasks.tracking.run import LoggedRun
from tasks.tracking.store import Store


@dataclass
class Live:
    """The run as it goes on. A server that was away once is not asked again until the end."""

    name: str
    store: Store
    logged: LoggedRun | None = None
    """Where it is, once the server has answered."""
    away: StorageError | None = None
    known: Known = field(default_factory=dict)

    def log(self, part: KeptRun) -> None:
        """Log what there is of it, or more of it: a part has the identity of the whole, and its new points and children."""
        if self.away is None:
            try:
                self.logged = _log(part, self.store, self.logged, self.known)
            except StorageError as error:
                self._went_away(error)

    def log_patiently(self, part: KeptRun, what: str) -> None:
        """The same as a Prefect task of its own, which is tried three times: for parts that come minutes after each other."""
        if self.away is None:
            try:
                self.logged = _log_as_task.with_options(task_run_name=f"log {what}")(part, self.store, self.logged)
            except StorageError as error:
                self._went_away(error)

    def fail(self, status: str) -> None:
        """Mark the run as FAILED or KILLED. Raises StorageError."""
        if self.logged is not None:
            mark(self.logged, self.name, self.store, status)

    def finish(self, whole: KeptRun, where: Places, tracking_uri: str | None) -> LoggedRun:
        """Log all that is missing; the run is FINISHED. Raises StorageError, which names the file that keeps it."""
        self.logged = None  # what goes wrong from here on is marked there
        return tell(whole, home=where.home, root=where.tracking, tracking_uri=tracking_uri)

    def _went_away(self, error: StorageError) -> None:
        self.away = error
        message = "%s. %s goes on; at its end everything is logged, or kept for: ota sync"
        get_run_logger().warning(message, error, f"'{self.name}'")


def _log(part: KeptRun, store: Store, logged: LoggedRun | None, known: Known | None = None) -> LoggedRun:
    return within(ASKING_SECONDS, f"logging {part.name!r} to MLflow", lambda: log_part(part, store, logged, known))


@task(name="log", retries=2, retry_delay_seconds=10, cache_policy=NO_CACHE, persist_result=False)
def _log_as_task(part: KeptRun, store: Store, logged: LoggedRun | None) -> LoggedRun:
    # Without the points of earlier parts: of a try that ended after a minute, nobody knows how far it came.
    return _log(part, store, logged)
