"""An end to waiting: a server that stalls, or answers byte by byte, must not hold up what is done already."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import TypeVar

from ota_core.errors import StorageError

T = TypeVar("T")

LOGGING_SECONDS = 300.0
"""For everything that MLflow is told of one merge. A single request ends after 15 seconds and is asked three times (``CLIENT_DEFAULTS``)."""
ASKING_SECONDS = 60.0
"""For a question whose answer a run can do without."""
MARKING_SECONDS = 10.0
"""For the note that a run has failed: mostly because the server is away."""


def within(seconds: float, doing: str, call: Callable[[], T]) -> T:
    """What ``call`` returns or raises. Raises StorageError after so many seconds; the call is left behind and ends by its own limits."""
    done: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            done.append(call())
        except BaseException as error:  # raised where it is waited for
            failed.append(error)

    thread = threading.Thread(target=copy_context().run, args=(work,), daemon=True, name=doing)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise StorageError(f"{doing} did not end within {seconds:g} s; the server stalls, or is too slow", reason="unavailable")
    return done[0]
