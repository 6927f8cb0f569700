"""Whether a process that left something behind still lives, and what it said last. An id alone does not tell: ids are used again."""

from pathlib import Path

import psutil

# The start time is computed from the boot time, which moves a little when the clock is set.
CLOCK_SLACK_SECONDS = 5.0


def start_time(pid: int) -> float:
    """When the process started, in seconds since 1970."""
    return float(psutil.Process(pid).create_time())


def is_alive(pid: int, started: float) -> bool:
    """Whether the process of this id is still the one that started then."""
    try:
        process = psutil.Process(pid)
        same = abs(float(process.create_time()) - started) < CLOCK_SLACK_SECONDS
        return same and process.status() != str(psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for_end(pid: int, *, timeout: float) -> None:
    """Wait until the process is gone, at most ``timeout`` seconds."""
    try:
        process = psutil.Process(pid)
    except psutil.NoSuchProcess:
        return
    psutil.wait_procs([process], timeout=timeout)


def tail(log: Path, lines: int = 15) -> str:
    """The end of a log, to be put into a message."""
    if not log.is_file():
        return f"{log} was not written"
    return f"the end of {log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
