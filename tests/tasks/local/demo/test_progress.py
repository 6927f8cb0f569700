"""How far a training is reaches the process that waits for it, and is shown there as lines of a log or as bars."""

import io
import logging
import os
import re
import signal
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool

import pytest
from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.theme import Theme

from tasks.local.demo import progress
from tasks.local.demo.process import in_process


def count(total: int, *, progress: Callable[..., None]) -> int:
    for step in range(total):
        progress(step + 1, total, os.getpid())
    return total


def count_and_die(total: int, *, progress: Callable[..., None]) -> None:
    count(total, progress=progress)
    os.kill(os.getpid(), signal.SIGKILL)


def count_and_fail(total: int, *, progress: Callable[..., None]) -> None:
    count(total, progress=progress)
    raise ValueError("diverged")


def test_what_a_process_tells_is_heard_while_it_runs() -> None:
    heard: list[tuple[int, int, int]] = []
    assert in_process(count, 3, progress=lambda *said: heard.append(said)) == 3
    assert [said[:2] for said in heard] == [(1, 3), (2, 3), (3, 3)]
    assert os.getpid() not in {said[2] for said in heard}


@pytest.mark.parametrize("function, error", [(count_and_die, BrokenProcessPool), (count_and_fail, ValueError)])
def test_a_process_that_ends_otherwise_is_not_waited_for(function: Callable[..., None], error: type[Exception]) -> None:
    heard: list[tuple[int, int, int]] = []
    with pytest.raises(error):
        in_process(function, 2, progress=lambda *said: heard.append(said))
    assert len(heard) == 2


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The log of a run."""
    monkeypatch.setattr(progress, "get_run_logger", lambda: logging.getLogger("run"))
    caplog.set_level(logging.INFO, logger="run")
    return caplog


@pytest.mark.parametrize("between, middle", [(0.0, ["step 2 of 3, loss 2.500, 0 s left"]), (15.0, [])])
def test_lines_in_a_log(
    between: float, middle: list[str], log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN", between)
    with progress.training_bars():
        training = progress.Training("training of x")
        for step, loss in enumerate((3.0, 2.0, 1.0), 1):
            training(step, 3, loss)
    begins, *lines, done = log.messages
    assert begins == "training of x begins" and done == "training of x: 3 steps done in 0 s, loss 2.000"
    assert lines == [f"training of x: {line}" for line in middle]


def test_bars_in_a_terminal(log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the console of Prefect's log, whose theme knows none of rich's styles."""
    handler, screen = PrefectConsoleHandler(), io.StringIO()
    handler.console = Console(file=screen, theme=Theme(inherit=False), force_terminal=True, width=100)
    monkeypatch.setattr(logging.getLogger("prefect"), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler, *logging.getLogger().handlers])
    with progress.training_bars():
        one, other = progress.Training("training of x"), progress.Training("training of y")
        one(1, 3, 3.0)
        other(2, 2, 0.5)
    last = "\n".join(screen.getvalue().splitlines()[-3:])
    for name, steps, loss in (("x", "1/3", "3.000"), ("y", "2/2", "0.500")):
        assert re.search(f"training of {name} .*{steps} loss {loss}", last), last
    assert log.messages == ["training of y: 2 steps done in 0 s, loss 0.500"]
