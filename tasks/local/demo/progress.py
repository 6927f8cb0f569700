"""How far trainings are: in a terminal a bar for each, else a line in the log for each, every 15 seconds."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from prefect.logging import get_run_logger
from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN = 15.0
RECENT = 20
"""Steps that the loss shown is the mean of: that of a single batch jumps."""
_BARS: ContextVar[Progress | None] = ContextVar("bars", default=None)


@contextmanager
def training_bars() -> Iterator[None]:
    """Around trainings that run side by side: one display of bars for all of them, below the log, where there is a terminal."""
    handlers = [*logging.getLogger("prefect").handlers, *logging.getLogger().handlers]
    # On the log's own console: what is logged meanwhile appears above the bars. It knows none of rich's styles by name.
    console = next((one.console for one in handlers if isinstance(one, PrefectConsoleHandler)), Console(stderr=True))
    if not console.is_terminal:
        yield
        return
    bar = BarColumn(style="grey23", complete_style="cyan", finished_style="green", pulse_style="grey50")
    columns = (
        TextColumn("{task.description}"),
        bar,
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


def in_words(seconds: float) -> str:
    """A duration, to the second below two minutes and to the minute above."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
