"""The steps of a search as Prefect tasks: a trial, and its run in MLflow; and how a search is logged while it goes on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from ota_core.errors import StorageError
from ota_core.recipe.recipe import MergeRecipe
from tasks.experiments.search import log as search_log
from tasks.experiments.search.merge import Trials
from tasks.experiments.search.search import Point, Search, Trial, Tuned
from tasks.settings import Places
from tasks.tracking.outbox import send_waiting, tell
from tasks.tracking.patience import ASKING_SECONDS, LOGGING_SECONDS, within
from tasks.tracking.run import LoggedRun
from tasks.tracking.store import Store, resolve_store

T = TypeVar("T")


@task(name="trial", cache_policy=NO_CACHE, persist_result=False)
def run_trial(tried: Search, point: Point, trials: Trials) -> Trial:
    """Merge one point and score it, on more and more documents while it is good."""
    log = get_run_logger()

    def evaluate(recipe: MergeRecipe, limit: int) -> dict[str, float | None]:
        found = trials.score(recipe, limit, f"trial {point.number}").objective()
        values = {name: value for name, value in found.items() if value is not None}
        shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in values.items())
        log.info("%d documents a task: average %.1f (%s)", limit, 100 * fmean(values.values() or [0.0]), shown)
        return found

    trial = tried.run(point, evaluate)
    below = f", below the floor: {', '.join(trial.shortfall)}" if trial.shortfall else ""
    log.info("%s%s", "complete" if trial.complete else "stopped early", below)
    return trial


@task(
    name="log", task_run_name="log trial {trial.number}", retries=2, retry_delay_seconds=10, cache_policy=NO_CACHE,
    persist_result=False,
)  # fmt: skip
def log_trial(trial: Trial, best: Trial, parent: LoggedRun, store: Store) -> None:
    """Log one trial to MLflow; finds the run of an earlier try."""
    within(ASKING_SECONDS, f"logging trial {trial.number}", lambda: search_log.log_trial(parent, trial, best, store))


@dataclass
class Live:
    """A search in MLflow as it goes on. A server that is away ends no search: it is told everything at the end, or by ``ota sync``."""

    name: str
    search: str
    params: Mapping[str, object]
    where: Places
    tracking_uri: str | None
    logged: LoggedRun | None = None
    known: set[int] = field(default_factory=set)
    """Trials that have their run."""
    away: StorageError | None = None

    def __post_init__(self) -> None:
        self.store: Store = resolve_store(tracking_uri=self.tracking_uri, root=self.where.tracking)

    def begin(self) -> None:
        """Find or make the search's run, and what is logged of it already. What of an earlier process waits is sent first: it is older."""
        if not send_waiting(self.where.home, self.where.tracking, self.tracking_uri, only=search_log.fingerprint(self.search)):
            self._went_away(StorageError("what was kept of this search could not be logged"))
        self.logged = self._try(lambda: search_log.begin(self.name, self.search, self.params, self.store))
        if (logged := self.logged) is not None:
            self.known = self._try(lambda: search_log.logged_trials(logged, self.store)) or set()

    def trial(self, trial: Trial, best: Trial) -> None:
        """Log a trial as it ends."""
        if self.away is not None or self.logged is None or trial.number in self.known:
            return
        try:
            log_trial(trial, best, self.logged, self.store)
        except StorageError as error:
            self._went_away(error)

    def fail(self, status: str) -> None:
        """Mark the search's run as FAILED or KILLED. Raises StorageError."""
        if self.away is None and self.logged is not None:
            search_log.fail(self.logged, self.store, status)

    def finish(self, tuned: Tuned, files: Mapping[str, str | bytes]) -> LoggedRun:
        """Log the end, then what of other runs waits; where the server was away, everything. Raises StorageError, which names the file that keeps it."""
        logged = self.logged
        if self.away is None and logged is not None:
            try:
                doing = f"logging the end of {self.name!r}"
                within(LOGGING_SECONDS, doing, lambda: search_log.finish(logged, tuned, files, self.store))
            except StorageError as error:
                self._went_away(error)
            else:
                send_waiting(self.where.home, self.where.tracking, self.tracking_uri)
                return logged
        run_id = str(flow_run.id) if flow_run.id else None
        kept = search_log.search_run(self.name, self.search, self.params, tuned, files, run_id)
        return tell(kept, home=self.where.home, root=self.where.tracking, tracking_uri=self.tracking_uri)

    def _try(self, ask: Callable[[], T]) -> T | None:
        if self.away is None:
            try:
                return within(ASKING_SECONDS, f"beginning {self.name!r} in MLflow", ask)
            except StorageError as error:
                self._went_away(error)
        return None

    def _went_away(self, error: StorageError) -> None:
        self.away = error
        get_run_logger().warning("%s. The search goes on; at its end everything is logged, or kept for: ota sync", error)
