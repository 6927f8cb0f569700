"""How a flow run ends that is cancelled, or whose process is told to end: at once where it can, after a few seconds in any case.

Prefect's worker, or the job of a cluster, sends SIGTERM to the run's process group, and SIGKILL half a minute later. Prefect raises an exception in the
main thread; that waits for the threads of the tasks, which know of nothing and compute on. So threads ask here whether they are to go on.
"""

import contextvars
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import psutil
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException, TerminationSignal

from tasks.orchestration.deployed import cancel_children

log = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""Time to unwind: temporary folders go, MLflow is told. What is left after it is left as by a kill, which every stage survives."""
_ending = threading.Event()


def go_on() -> None:
    """Raise TerminationSignal, as in the main thread, where this process is told to end. Stages call it with their progress."""
    if _ending.is_set():
        raise TerminationSignal(signal=signal.SIGTERM)


@contextmanager
def ends_soon() -> Iterator[None]:
    """Around the body of a flow: its tasks' threads end with it, runs that it has sent elsewhere are cancelled at once, and what does not
    end within ``GRACE_SECONDS`` of SIGTERM is ended, with its child processes.

    After SIGINT the threads end, too; how long that may take is for who presses the keys to say.
    """
    if threading.current_thread() is not threading.main_thread() or _Watch.on:
        yield
        return
    _ending.clear()
    with _Watch():
        yield


class _Watch:
    """Reads what signals arrive, in a thread of its own: the main thread may be inside a long computation, and handle them late."""

    on = False

    def __enter__(self) -> None:
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs, self._before = theirs, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        context = contextvars.copy_context()  # which server, which run
        self._thread = threading.Thread(target=context.run, args=(self._read,), daemon=True, name="ending")
        self._thread.start()
        _Watch.on = True

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        self._theirs.close()  # ends the thread
        self._thread.join(0.1)
        _Watch.on = False

    def _read(self) -> None:
        with self._ours:
            while received := self._ours.recv(1):
                if self._before != -1:  # somebody else's, who listened before
                    os.write(self._before, received)
                if received[0] in (signal.SIGTERM, signal.SIGINT):
                    _ending.set()
                if received[0] == signal.SIGTERM:
                    self._end()
                    return

    def _end(self) -> None:
        began, told = time.monotonic(), _Told()
        # In a thread of its own: a server that is away must not make the end later.
        threading.Thread(target=contextvars.copy_context().run, args=(told.ask,), daemon=True).start()
        time.sleep(max(0.0, began + GRACE_SECONDS - time.monotonic()))
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        os.write(2, f"still at work {GRACE_SECONDS:g} s after it was told to end: ended\n".encode())
        # By any other code Prefect's worker takes the run for crashed, and what sent it sends it again.
        os._exit(0 if told.cancelled else 128 + signal.SIGTERM)


class _Told:
    """What the server is told, and tells, at the end of the run that this process is for."""

    cancelled = False

    def ask(self) -> None:
        context = FlowRunContext.get()
        if context is None or context.flow_run is None:
            return
        try:
            cancel_children(context.flow, context.flow_run, None)
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(context.flow_run.id).state
            self.cancelled = state is not None and (state.is_cancelling() or state.is_cancelled())
        except (httpx.HTTPError, PrefectException) as error:
            log.warning("runs that were sent elsewhere may go on: %s", error or type(error).__name__)
