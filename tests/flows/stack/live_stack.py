"""A stack that really runs (`ota stack up`), its user, and what a test asks of it: runs, their processes, their states."""

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, FlowRunFilterParentFlowRunId
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from tasks.local.stack import control as stack_control
from tasks.local.stack.credentials import secret_of
from tasks.local.stack.layout import ROOT, Stack, load_stack
from tasks.settings import environment
from tests.servers import wait_until

SETTINGS = ("AWS_", "OTA_", "PREFECT_", "MLFLOW_")


@dataclass
class Live:
    """The stack, and a folder that its flows may read."""

    home: Path
    folder: Path
    stack: Stack

    def start(self, deployment: str, *, env: dict[str, str] | None = None, **parameters: Any) -> UUID:
        """A run of a deployment, as somebody starts it who does not wait for it; ``env`` comes on top of the deployment's own."""
        with get_client(sync_client=True) as client:
            own = (client.read_deployment_by_name(deployment).job_variables or {}).get("env", {})
        variables = {"env": {**own, **(env or {})}}
        run: Any = run_deployment(deployment, parameters=parameters, timeout=0, as_subflow=False, job_variables=variables)
        return UUID(str(run.id))

    def state(self, run: UUID) -> str:
        with get_client(sync_client=True) as client:
            return str(client.read_flow_run(run).state_name)

    def ended(self, run: UUID, seconds: float = 300) -> Any:
        """The run at its end."""

        def final() -> Any:
            with get_client(sync_client=True) as client:
                found = client.read_flow_run(run)
            return found if found.state and found.state.is_final() else None

        return wait_until(final, self.logs, seconds=seconds)

    def below(self, run: UUID) -> list[Any]:
        """The runs below a run, and below those, by the server."""
        found: list[Any] = []
        above = [run]
        with get_client(sync_client=True) as client:
            while above:
                wanted = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=above))
                new = client.read_flow_runs(flow_run_filter=wanted, limit=200)
                found += new
                above = [one.id for one in new]
        return found

    def runs(self, ids: list[UUID]) -> list[Any]:
        found: list[Any] = []
        with get_client(sync_client=True) as client:
            for first in range(0, len(ids), 100):
                wanted = FlowRunFilter(id=FlowRunFilterId(any_=ids[first : first + 100]))
                found += client.read_flow_runs(flow_run_filter=wanted, limit=200)
        return found

    def processes(self, run: UUID) -> list[psutil.Process]:
        """The live processes of a run, of the runs below it, and what they have started."""
        wanted = {str(run), *(str(one.id) for one in self.below(run))}
        return [one for one in psutil.process_iter() if _run_of(one) in wanted]

    def cancel(self, run: UUID) -> float:
        """Press Cancel on its page; the seconds until its last process is gone."""
        family = self.processes(run)
        assert family, "nothing runs that could be cancelled"
        began = time.monotonic()
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run, Cancelling(message="pressed Cancel"))
        wait_until(lambda: not self.processes(run) and not any(map(_lives, family)), self.logs, seconds=120)
        return time.monotonic() - began

    def stop(self, name: str) -> None:
        """Stop one process of the stack, with all that it has started."""
        stack_control._call(self.home, "stopProcess", name)

    def start_again(self, name: str) -> None:
        stack_control.start(self.stack, name)
        stack_control.wait_healthy(self.stack, name)

    def logs(self) -> str:
        return "\n".join(self.stack.log(name).read_text(errors="replace")[-4000:] for name in ("worker-cpu", "worker-gpu"))

    def leftovers(self) -> list[str]:
        """Temporary folders and half outputs in the workers' homes."""
        homes = [self.stack.worker_home(worker.name) for worker in self.stack.workers]
        return sorted(str(path.relative_to(home)) for home in homes for path in home.rglob(".*.tmp"))


def _run_of(process: psutil.Process) -> str | None:
    """Not of what Prefect's worker starts once the run is gone, to call the flow's hooks."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE or "hook" in process.cmdline():
            return None
        return process.environ().get("PREFECT__FLOW_RUN_ID")
    except (psutil.Error, OSError):
        return None


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def stack_up(root: Path) -> Iterator[Live]:
    """A stack without experts, and this process as its user. Everything ends with it."""
    pytest.importorskip("supervisor", reason="supervisor is not installed: pip install 'ota-merging[demo]'")
    home, folder = root / "home", root / "folder"
    folder.mkdir(parents=True)
    plain = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)} | {
        "OTA_ALLOWED_ROOTS": str(folder)
    }
    command = [sys.executable, "-m", "flows.cli", "stack", "up", "--free-ports", "--experts", "none", "--home", str(home)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        stack = load_stack(home)
        assert stack is not None
        with (
            environment({**stack.client_environment(secret_of(stack)), "OTA_HOME": str(root / "client")}),
            temporary_settings({PREFECT_API_URL: stack.api}),  # another test's server may stand in the settings
        ):
            yield Live(home=home, folder=folder, stack=stack)
    finally:
        stack_control.stop(home)
        shutil.rmtree(home, ignore_errors=True)


def tasks_at_work(run: UUID, below: list[Any]) -> list[str]:
    """Names of the tasks of these runs that have begun and not ended, as the server knows."""
    from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterState, TaskRunFilterStateName

    running = TaskRunFilter(state=TaskRunFilterState(name=TaskRunFilterStateName(any_=["Running"])))
    with get_client(sync_client=True) as client:
        of = FlowRunFilter(id=FlowRunFilterId(any_=[run, *(one.id for one in below)]))
        return [one.name for one in client.read_task_runs(flow_run_filter=of, task_run_filter=running, limit=200)]


def made(runs: list[Any]) -> Counter[str]:
    """What these runs have computed, by kind and fingerprint, as their logs on the server say."""
    from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId

    found: Counter[str] = Counter()
    with get_client(sync_client=True) as client:
        for run in runs:
            for line in client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])), limit=200):
                if line.message.startswith("made "):
                    found[" ".join(line.message.split()[1:3])] += 1
    return found


def until(holds: Callable[[], Any], live: Live, seconds: float = 240) -> Any:
    return wait_until(holds, live.logs, seconds=seconds)
