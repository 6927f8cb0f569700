"""Bars below the log of a terminal, and durations in words."""

import logging

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.progress import BarColumn


def terminal() -> Console | None:
    """The log's own console, where it is a terminal: what is logged meanwhile appears above a bar on it. It knows none of rich's styles by name."""
    handlers = [*logging.getLogger("prefect").handlers, *logging.getLogger().handlers]
    console = next((one.console for one in handlers if isinstance(one, PrefectConsoleHandler)), Console(stderr=True))
    return console if console.is_terminal else None


def bar_column() -> BarColumn:
    """A bar that such a console can draw."""
    return BarColumn(style="grey23", complete_style="cyan", finished_style="green", pulse_style="grey50")


def in_words(seconds: float) -> str:
    """A duration, to the second below two minutes and to the minute above."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
