"""A process that runs one ``ota`` command and can be killed at any moment.

It is forked from one that has imported everything already (multiprocessing's fork server), so that the moments fall into the command's work
and not into seconds of imports, and hundreds of them take minutes. The command is the same: ``flows.cli``'s ``app`` with these words.
"""

import atexit
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.points import Death, counts_into, dies_at, install

LONGEST_SECONDS = 600.0


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """Its exit code; minus 9 for one that was killed."""
    seconds: float
    left: tuple[str, ...] = ()
    """Its children that live on."""

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def preload(modules: Sequence[str]) -> None:
    """Which modules every process begins with. Before the first ``run`` of this process."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["flows.cli.app", *modules])


def run(
    words: Sequence[str], folder: Path, log: Path, *, env: Mapping[str, str] | None = None, after: float | None = None,
    death: Death | None = None, calls: Path | None = None, modules: Sequence[str] = (),
) -> Ended:  # fmt: skip
    """Run ``ota`` with these words in the folder, to its end or until it is killed with its whole process group: ``after`` seconds, or at a ``death``.

    log: takes what it prints. calls: a file for the name of every point that is passed. modules: are there before the points are looked for.
    """
    context = multiprocessing.get_context("forkserver")
    begun, begins = context.Pipe(duplex=False)
    process = context.Process(
        target=_command, args=(tuple(words), folder, log, dict(env or {}), begins, death, calls, tuple(modules))
    )
    process.start()
    begins.close()
    with suppress(EOFError):  # it died before: the code says so
        begun.recv()
    assert process.pid is not None
    started = time.monotonic()
    multiprocessing.connection.wait([process.sentinel], LONGEST_SECONDS if after is None else after)
    family = _family(process.pid)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    seconds = time.monotonic() - started
    assert process.exitcode is not None
    _, alive = psutil.wait_procs(family, timeout=10)
    left = tuple(" ".join(one.cmdline())[:200] for one in alive if one.is_running())
    for one in alive:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    return Ended(process.exitcode, seconds, left)


def _family(pid: int) -> list[Any]:
    with suppress(psutil.NoSuchProcess):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def _command(
    words: tuple[str, ...], folder: Path, log: Path, env: dict[str, str], begins: Any, death: Death | None, calls: Path | None,
    modules: tuple[str, ...],
) -> None:  # fmt: skip
    """In the new process."""
    os.setsid()
    os.chdir(folder)
    os.environ.update(env)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 - for as long as it lives
    print("$ ota", *words, flush=True)
    sys.argv = ["ota", *words]
    for module in modules:
        importlib.import_module(module)
    if "prefect" in sys.modules:
        importlib.import_module("prefect.context").refresh_global_settings_context()
    if death is not None:
        install(dies_at(death), folder)
    if calls is not None:
        install(counts_into(calls), folder)
    app = importlib.import_module("flows.cli.app").app
    begins.send(True)
    begins.close()
    try:
        app(list(words), prog_name="ota")
    finally:
        atexit._run_exitfuncs()  # multiprocessing would leave them out: Prefect stops its server by one
