"""Finding and ending the processes of a stack: they carry its folder in their environment, whoever their parent is by now."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from tasks.local.stack.programs import NAME, OURS


def marked(folder: Path, name: str | None = None) -> list[psutil.Process]:
    """The live processes of the stack in this folder, or of one of its parts; never this process or an ancestor of it."""
    here = psutil.Process()
    spared = {here.pid, *(parent.pid for parent in here.parents())}
    found = []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
        except (psutil.Error, OSError):
            continue  # of another user, or gone
        if process.pid not in spared and environ.get(OURS) == str(folder) and (name is None or environ.get(NAME) == name):
            found.append(process)
    return found


def end(find: Callable[[], Iterable[psutil.Process]], *, grace: float) -> int:
    """SIGTERM to what ``find`` finds, SIGKILL to what it still finds after the grace. Returns how many it found at first."""
    first = list(find())
    for process in first:
        _signal(process.terminate)
    psutil.wait_procs(first, timeout=grace)
    last = list(find())
    for process in last:
        _signal(process.kill)
    psutil.wait_procs(last, timeout=grace)
    return len(first)


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        send()
