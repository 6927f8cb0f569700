"""What a leaderboard is asked for, and the answer from MLflow."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from pydantic import Field

from ota_core.artifact import canonical_json
from ota_core.frozen import Frozen
from tasks.experiments.leaderboard.entries import LeaderboardError
from tasks.experiments.leaderboard.leaderboard import BEST, Leaderboard, leaderboard
from tasks.tracking.experiment import read_benchmarked, read_experiment
from tasks.tracking.names import EXPERIMENT
from tasks.tracking.store import Store


class Question(Frozen):
    """Which merges of which experiment, compared with what."""

    experiment: str = Field(EXPERIMENT, min_length=1)
    suite: str | None = None
    """Name or key of the suite, where merges were scored on several."""
    filter: str = ""
    """MLflow's filter string."""
    baseline: str = BEST
    last: int | None = None
    since: str | None = None

    def identity(self) -> str:
        """The question in one line: the same question is answered in the same summary run."""
        return canonical_json(self.model_dump(mode="json", exclude={"experiment", "suite"}))

    def answer(self, store: Store) -> Leaderboard:
        """The leaderboard, read from MLflow. Raises LeaderboardError, OtaError, StorageError."""
        if self.last is not None and self.last < 1:
            raise LeaderboardError(f"last is {self.last}; expected at least one merge")
        since = None if self.since is None else parse_since(self.since)
        found = read_experiment(store, self.experiment, filter_string=self.filter, since_ms=since, last=self.last)
        return leaderboard(
            found, suite=self.suite, baseline=self.baseline, read_documents=lambda run_id: read_benchmarked(store, run_id)
        )


def parse_since(text: str, now: datetime | None = None) -> int:
    """Milliseconds since 1970 of a date (2026-11-20, or with a time; UTC unless it says otherwise) or an age (36h, 7d, 2w).

    Raises LeaderboardError.
    """
    age = re.fullmatch(r"(\d+)\s*([hdw])", text.strip())
    if age:
        units = {"h": "hours", "d": "days", "w": "weeks"}
        start = (now or datetime.now(UTC)) - timedelta(**{units[age[2]]: int(age[1])})
    else:
        try:
            start = datetime.fromisoformat(text.strip())
        except ValueError:
            raise LeaderboardError(f"since {text!r}: expected a date such as 2026-11-20, or an age such as 36h, 7d, 2w") from None
        start = start if start.tzinfo else start.replace(tzinfo=UTC)
    return int(start.timestamp() * 1000)
