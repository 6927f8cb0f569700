"""How much of a budget is spent: a bar in a terminal, lines in a log, an artifact for the server in both."""

import io
import logging
from typing import Any

import pytest
from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.theme import Theme

from tasks.orchestration import budget_bar, run_log
from tasks.orchestration.budget_bar import BudgetBar


@pytest.fixture
def artifacts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[tuple[float, str]]:
    """What the server is told; a run's log is an ordinary one."""
    told: list[tuple[float, str]] = []
    for module in (budget_bar, run_log):
        monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("run"))
    monkeypatch.setattr(run_log, "create_progress_artifact", lambda progress, description: told.append((progress, description)))
    caplog.set_level(logging.INFO, logger="run")
    return told


def test_lines_in_a_log_say_how_much_is_left(artifacts: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    with BudgetBar("search", every=0) as bar:
        bar.show(25, "3 trials")
        bar.show(100, "12 trials")
    first, last = caplog.messages
    assert first == "search: 25 % of the budget, 3 trials, 0 s left" and last == "search: 100 % of the budget, 12 trials"
    assert artifacts[0] == (25, "3 trials")


def test_lines_come_now_and_then_and_at_the_end(artifacts: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    with BudgetBar("search", every=3600) as bar:
        for percent in (10, 20, 30, 100):
            bar.show(percent, "so far")
    assert [line.split(",")[0] for line in caplog.messages] == ["search: 10 % of the budget", "search: 100 % of the budget"]


def test_what_an_earlier_run_spent_says_nothing_of_the_time_left(
    artifacts: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(budget_bar.time, "monotonic", lambda: now[0])
    with BudgetBar("search", every=0) as bar:
        bar.begin(50)
        now[0] += 60
        bar.show(60, "so far")
    assert caplog.messages == ["search: 60 % of the budget, so far, 4 min left"]


def test_a_bar_in_a_terminal(artifacts: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the console of Prefect's log, whose theme knows none of rich's styles."""
    handler, screen = PrefectConsoleHandler(), io.StringIO()
    handler.console = Console(file=screen, theme=Theme(inherit=False), force_terminal=True, width=100)
    monkeypatch.setattr(logging.getLogger("prefect"), "handlers", [])
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler, *logging.getLogger().handlers])
    with BudgetBar("search") as bar:
        bar.show(40, "best average 34.0 (trial 2)")
    last = "\n".join(screen.getvalue().splitlines()[-3:])
    assert "search" in last and "40%" in last and "best average 34.0 (trial 2)" in last and not caplog.messages
