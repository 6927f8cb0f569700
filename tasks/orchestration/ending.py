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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import httpx
import psutil
from prefect._internal import control_listener
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException, TerminationSignal
from prefect.states import Cancelled

from tasks.orchestration.deployed import cancel_children

log = logging.getLogger(__name__)

GRACE_SECONDS = 5.0
"""Time to unwind: temporary folders go, MLflow is told. What is left after it is left as by a kill, which every stage survives."""
LOOK_SECONDS = 10.0
"""How often a run looks whether it was cancelled. Prefect's worker hears of it at once, and ends the run long before the second look; but once the
server was away for half a minute the worker no longer listens for the runs that it has started (Prefect 3.8), and nobody listens for a run that was
started by hand."""
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
        self._over = threading.Event()
        self._thread = _beside(self._read)
        _beside(self._look)
        _Watch.on = True

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._before)
        self._over.set()
        self._theirs.close()  # ends the thread
        self._thread.join(0.1)
        _Watch.on = False

    def _look(self) -> None:
        """End this run where the server calls it cancelled at two looks, so that nobody else seems to end it."""
        before = False
        while not self._over.wait(LOOK_SECONDS):
            now = (state := _Told().state()) is not None and state.is_cancelling()
            if now and before:
                log.warning("the run was cancelled on the Prefect server; it ends")
                _Told().end()
                control_listener._set_intent(
                    "cancel"
                )  # as a worker does before it sends SIGTERM: without it the run reads Crashed
                os.kill(os.getpid(), signal.SIGTERM)
                return
            before = now

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
        _beside(told.ask)  # a server that is away must not make the end later
        time.sleep(max(0.0, began + GRACE_SECONDS - time.monotonic()))
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        os.write(2, f"still at work {GRACE_SECONDS:g} s after it was told to end: ended\n".encode())
        # By any other code Prefect's worker takes the run for crashed, and what sent it sends it again.
        os._exit(0 if told.cancelled else 128 + signal.SIGTERM)


def _beside(work: Callable[[], None]) -> threading.Thread:
    """A thread that knows which server and which run this is, and keeps no process alive."""
    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True, name="ending")
    thread.start()
    return thread


class _Told:
    """What the server is told, and tells, of the run that this process is for."""

    cancelled = False

    def __init__(self) -> None:
        context = FlowRunContext.get()
        self.flow, self.run = (context.flow, context.flow_run) if context is not None else (None, None)

    def state(self) -> State | None:
        """As the server has it; None where this is no run, or nobody answers."""
        if self.run is None:
            return None
        try:
            with get_client(sync_client=True) as client:
                return client.read_flow_run(self.run.id).state
        except (httpx.HTTPError, PrefectException):
            return None

    def ask(self) -> None:
        """Cancel what the run has sent elsewhere; note whether it was cancelled itself."""
        if self.run is None:
            return
        try:
            cancel_children(self.flow, self.run, None)
        except (httpx.HTTPError, PrefectException) as error:
            log.warning("runs that were sent elsewhere may go on: %s", error or type(error).__name__)
        state = self.state()
        self.cancelled = state is not None and (state.is_cancelling() or state.is_cancelled())

    def end(self) -> None:
        """What Prefect's worker says on the server of a run that it has ended."""
        self.ask()
        with suppress(httpx.HTTPError, PrefectException), get_client(sync_client=True) as client:
            assert self.run is not None
            client.set_flow_run_state(self.run.id, Cancelled(message="Ended by the run itself: no worker did."), force=True)
