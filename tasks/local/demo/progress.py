"""How far trainings are: in a terminal a bar for each, else a line in the log for each, every 15 seconds."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from prefect.logging import get_run_logger
from rich.progress import MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tasks.pages.bars import bar_column, in_words, terminal

SECONDS_BETWEEN = 15.0
RECENT = 20
"""Steps that the loss shown is the mean of: that of a single batch jumps."""
_BARS: ContextVar[Progress | None] = ContextVar("bars", default=None)


@contextmanager
def training_bars() -> Iterator[None]:
    """Around trainings that run side by side: one display of bars for all of them, below the log, where there is a terminal."""
    console = terminal()
    if console is None:
        yield
        return
    columns = (
        TextColumn("{task.description}"),
        bar_column(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        token = _BARS.set(bars)
        try:
            yield
        finally:
            _BARS.reset(token)


class Training:
    """Shows one training, inside a run of Prefect. Call it after every step."""

    def __init__(self, name: str) -> None:
        self._name, self._log, self._bars = name, get_run_logger(), _BARS.get()
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._said = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._bar: TaskID | None = None
        if self._bars is None:
            self._log.info("%s begins", name)

    def __call__(self, done: int, total: int, loss: float) -> None:
        """``done`` of ``total`` steps; ``loss`` of the last one."""
        now = time.monotonic()
        self._losses.append(loss)
        # The time before the first step, in which libraries load, says nothing of the steps to come.
        begun, before = self._first = self._first or (now, done)
        mean = f"loss {sum(self._losses) / len(self._losses):.3f}"
        if self._bars is not None:
            if self._bar is None:
                self._bar = self._bars.add_task(self._name, total=total, loss=mean)
            self._bars.update(self._bar, completed=done, loss=mean)
        if done == total:
            self._log.info("%s: %d steps done in %s, %s", self._name, total, in_words(now - begun), mean)
        elif self._bars is None and now - self._said >= SECONDS_BETWEEN and done > before:
            self._said = now
            left = (now - begun) / (done - before) * (total - done)
            self._log.info("%s: step %d of %d, %s, %s left", self._name, done, total, mean, in_words(left))
