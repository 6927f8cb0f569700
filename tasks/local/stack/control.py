"""supervisord, which keeps the stack's processes running: start it, ask it, stop it. No Prefect here."""

import subprocess
import sys
import time
from datetime import timedelta
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from xmlrpc.client import Fault

import psutil

from tasks.artifacts.processes import tail
from tasks.local.s3_command import remove_sockets
from tasks.local.stack.health import problem_of
from tasks.local.stack.layout import Stack, StackError, folder_of, load_stack, socket_of
from tasks.local.stack.processes import end, marked
from tasks.local.stack.programs import config_file, supervisor_environment

POLL_SECONDS = 0.3
HEALTH_SECONDS = 240.0
"""On a busy machine of two cores a Prefect server takes a minute."""
GRACE_SECONDS = 10.0
MOST_STARTS = 5
_GIVEN_UP = {"FATAL", "UNKNOWN"}


class Process(NamedTuple):
    """What supervisord knows of a process."""

    name: str
    state: str
    """RUNNING, STARTING, BACKOFF (ended while starting; tried again), FATAL (given up), STOPPED, EXITED, STOPPING."""
    pid: int | None
    started: float
    """Seconds since 1970; 0 before the first start."""
    uptime: timedelta | None


def check_installed() -> None:
    """Raise StackError where supervisor is not installed."""
    if find_spec("supervisor") is None:
        raise StackError(f"supervisor is not installed for {sys.executable}; install it with: pip install 'ota-merging[demo]'")


def supervisor_pid(home: Path) -> int | None:
    """Process id of the supervisord of this home, None when none answers."""
    check_installed()
    try:
        return int(_rpc(home).getPID()) if socket_of(home).exists() else None
    except (OSError, HTTPException):
        return None  # the socket of one that was killed


def start_supervisor(stack: Stack, secret_key: str) -> None:
    """Start supervisord in the background, and with it the servers; returns when it answers.

    Raises StackError with the end of its log when it does not come up.
    """
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(config_file(stack.folder))]
    environ = supervisor_environment(stack, secret_key)
    done = subprocess.run(command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    # It goes to the background once its socket listens.
    if done.returncode or supervisor_pid(stack.home) is None:
        said = done.stderr.strip() or tail(stack.log("supervisord"))
        raise StackError(f"supervisord did not come up (exit code {done.returncode}): {said}")


def processes(home: Path) -> dict[str, Process]:
    """What supervisord says of every process. Raises StackError when it does not answer."""
    return {info["name"]: _process(info) for info in _call(home, "getAllProcessInfo")}


def _process(info: dict[str, Any]) -> Process:
    running = info["statename"] in ("RUNNING", "STARTING")
    uptime = timedelta(seconds=max(0, info["now"] - info["start"])) if running else None
    return Process(info["name"], info["statename"], info["pid"] or None, float(info["start"]), uptime)


def start(stack: Stack, name: str) -> None:
    """Have a process started unless it runs; does not wait for it."""
    _call(stack.home, "startProcess", name, False, unless="ALREADY_STARTED")


def restart(stack: Stack, name: str) -> None:
    """Stop a process with all that it started, and have it started again. Raises StackError on an unknown name."""
    if name not in stack.names:
        raise StackError(f"the stack has no process {name!r}; it has: {', '.join(stack.names)}")
    _call(stack.home, "stopProcess", name, unless="NOT_RUNNING")
    start(stack, name)


def wait_healthy(stack: Stack, name: str, *, seconds: float = HEALTH_SECONDS) -> None:
    """Wait until a process does its work. Raises StackError, with the end of its log, when it is given up or takes too long."""
    deadline = time.monotonic() + seconds
    starts = set()
    while True:
        process = processes(stack.home)[name]
        starts.add(process.started)
        problem = problem_of(stack, name, process.started) if process.pid else process.state
        if problem is None:
            return
        # On a slow machine it lives longer than supervisord asks of a start, and is never given up there.
        given_up = process.state in _GIVEN_UP or len(starts) > MOST_STARTS
        if given_up or time.monotonic() > deadline:
            what = "ends again and again" if given_up else f"did not come up within {seconds:g} s ({problem})"
            raise StackError(f"{name} {what}; {tail(stack.log(name))}")
        time.sleep(POLL_SECONDS)


def stop(home: Path) -> int:
    """End every process of the home's stack, and nothing else; returns how many there were. Its data stay.

    First supervisord ends them in order, then what is left is ended: flow runs in sessions of their own, or all of them where
    supervisord itself was killed.
    """
    folder = folder_of(home)
    known = marked(folder)
    pid = supervisor_pid(home)
    if pid is not None:
        _call(home, "shutdown")
        psutil.wait_procs([process for process in known if process.pid == pid], timeout=60)
    end(lambda: marked(folder), grace=GRACE_SECONDS)
    stack = _readable(home)
    if stack is not None:
        remove_sockets(stack.ports.s3)
    for left in (socket_of(home), folder / "supervisord.pid"):
        left.unlink(missing_ok=True)
    return len(known)


def _readable(home: Path) -> Stack | None:
    try:
        return load_stack(home)
    except StackError:
        return None


def _rpc(home: Path) -> Any:
    from supervisor.childutils import getRPCInterface

    return getRPCInterface({"SUPERVISOR_SERVER_URL": f"unix://{socket_of(home)}"}).supervisor


def _call(home: Path, method: str, *arguments: object, unless: str = "") -> Any:
    """What supervisord answers; None where it names the fault ``unless``."""
    try:
        return getattr(_rpc(home), method)(*arguments)
    except Fault as fault:
        if not unless or not fault.faultString.startswith(unless):
            raise
    except (OSError, HTTPException):
        left = len(marked(folder_of(home)))
        also = f"; its supervisord is gone, {left} processes are left: `ota stack down` ends them" if left else ""
        raise StackError(f"the stack in {folder_of(home)} does not run; start it with `ota stack up`{also}") from None
