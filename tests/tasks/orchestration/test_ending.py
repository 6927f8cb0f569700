"""A process that is told to end in the middle of a flow: its threads stop, and what does not stop is ended, with its children."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID

import psutil
import pytest
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelling

from tasks.artifacts.processes import wait_for_end
from tasks.orchestration import ending
from tests.servers import wait_until

DEAF = """
import signal, subprocess, sys, time
from tasks.orchestration import ending
ending.GRACE_SECONDS = 0.5
signal.signal(signal.SIGTERM, lambda *_: None)  # as a main thread that waits for others
child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(3600)"])
with ending.ends_soon():
    print(child.pid, flush=True)
    while True:
        time.sleep(1)
"""


def test_what_does_not_end_is_ended_with_its_children(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM and "0.5 s after it was told to end" in said
    wait_for_end(child, timeout=60)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


BY_HAND = """
import time
from prefect import flow
from prefect.runtime import flow_run
from tasks.orchestration import ending
ending.LOOK_SECONDS = 0.2
@flow
def endless():
    with ending.ends_soon():
        print(flow_run.id, flush=True)
        while True:
            time.sleep(0.1)
endless()
"""


def test_a_run_that_no_worker_ends_ends_itself_when_it_is_cancelled(prefect_server: None) -> None:
    """One that was started by hand, or whose worker no longer listens because the server was away."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    env = os.environ | {"PREFECT_API_URL": PREFECT_API_URL.value()}
    with subprocess.Popen(
        [sys.executable, "-c", BY_HAND], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        run = UUID(process.stdout.readline().strip())
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run, Cancelling())
            said = process.communicate(timeout=120)[1]
            assert client.read_flow_run(run).state_name == "Cancelled", said
    assert process.returncode != 0


def test_threads_stop_at_their_next_sign_of_progress() -> None:
    """By a signal that Prefect or Python makes an exception of in the main thread alone."""

    def handle(number: int, frame: object) -> None:
        """As if the main thread were busy elsewhere."""

    before = signal.signal(signal.SIGINT, handle)
    try:
        with ending.ends_soon(), ending.ends_soon():
            ending.go_on()
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(TerminationSignal):
                wait_until(ending.go_on, seconds=60)
        with ending.ends_soon():  # the next flow of this process, such as in a notebook
            ending.go_on()
    finally:
        signal.signal(signal.SIGINT, before)
        ending._ending.clear()


def test_who_listened_for_signals_before_hears_of_them_still() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.set_blocking(read, False)
    before, old = signal.signal(signal.SIGUSR1, lambda *_: None), signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        with ending.ends_soon():
            signal.raise_signal(signal.SIGUSR1)
            wait_until(lambda: _received(read) == bytes([signal.SIGUSR1]), seconds=60)
        signal.raise_signal(signal.SIGUSR1)
        assert _received(read) == bytes([signal.SIGUSR1]), "and afterwards"
    finally:
        assert signal.set_wakeup_fd(old) == write
        signal.signal(signal.SIGUSR1, before)
        os.close(read)
        os.close(write)


def _received(read: int) -> bytes:
    try:
        return os.read(read, 100)
    except BlockingIOError:
        time.sleep(0)
        return b""
