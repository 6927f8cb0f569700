"""How much of a budget is spent: in a terminal a bar below the log, else lines in the log; on the Prefect server a progress artifact."""

import time
from contextlib import ExitStack
from typing import Self

from prefect.logging import get_run_logger
from rich.progress import Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tasks.orchestration.run_log import SECONDS_BETWEEN, ProgressBar
from tasks.pages.bars import bar_column, in_words, terminal


class BudgetBar:
    """Use it as a context manager inside a run of Prefect."""

    def __init__(self, what: str, *, every: float = SECONDS_BETWEEN) -> None:
        self._what, self._every = what, every
        self._log, self._artifact = get_run_logger(), ProgressBar(what)
        self._began, self._said, self._first = time.monotonic(), float("-inf"), 0.0
        self._stack = ExitStack()
        self._bars: Progress | None = None

    def __enter__(self) -> Self:
        if (console := terminal()) is not None:
            columns = (TextColumn("{task.description}"), bar_column(), TaskProgressColumn(), TextColumn("{task.fields[text]}"))
            self._bars = self._stack.enter_context(Progress(*columns, TimeRemainingColumn(), console=console))
            self._task = self._bars.add_task(self._what, total=100, text="")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def begin(self, percent: float) -> None:
        """So much was spent by an earlier run: the time left is told from what is spent in this one."""
        self._began, self._first = time.monotonic(), percent
        if self._bars is not None:
            self._bars.reset(self._task, total=100, completed=int(percent), text="")

    def show(self, percent: float, text: str) -> None:
        """Say how far it is, 0 to 100, and what came of it so far."""
        self._artifact.show(percent, text)
        if self._bars is not None:
            self._bars.update(self._task, completed=percent, text=text)
            return
        now, spent = time.monotonic(), percent - self._first
        if now - self._said >= self._every or percent >= 100:
            self._said = now
            left = f", {in_words((now - self._began) * (100 - percent) / spent)} left" if spent > 0 and percent < 100 else ""
            self._log.info("%s: %.0f %% of the budget, %s%s", self._what, percent, text, left)
