"""Where work is done: in this process, or by workers of a Prefect pool; and what such a worker does with what it is sent.

OTA_GPU_DEPLOYMENT    the deployment that merges and benchmarks are sent to, for example "stage/gpu" (deployments/prefect.yaml);
                      without it they run in the process of the flow
"""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import uuid4

from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from ota_core.compute.stream import pick_device
from ota_core.errors import ArtifactError, OtaError
from tasks.artifacts.step import Stage, Work
from tasks.orchestration.deployed import POLL_SECONDS, complaint, run_deployed
from tasks.orchestration.run_log import Progress
from tasks.settings import Places

TURNS = {"engine": threading.Lock(), "benchmark": threading.Lock()}
"""Of the engine's stages each uses all cores by threads of its own; two at once in one process would each take the budget of memory.
lm-eval takes turns anyway. Waiting here and not inside a stage keeps the wait out of what is noted of it: seconds, CPU, memory."""
TRIES_AFTER_A_LOST_WORKER = 3
"""What a worker died of is sent again; a machine that dies at every try is no accident."""


class WorkerLost(OtaError):
    """The worker that had taken a job died, or lost its connection for good."""


class Executor(Protocol):
    """Where jobs are done."""

    @property
    def place(self) -> str:
        """For names of task runs: where, unless it is here."""

    def together(self, jobs: Sequence[Stage], where: Places) -> "Executor":
        """Told of all before the first is run: what gives each of them. Call it in a flow or a task."""

    def run(self, job: Work, where: Places) -> Any:
        """What the job leaves. Call it in a flow or a task. Raises OtaError."""


@dataclass(frozen=True)
class Here:
    """The process that the task runs in."""

    device: str = "cpu"
    shared: bool = False
    """Whether the flow's task runner decides which process that is, and how many jobs it does at a time."""
    place: str = ""

    def together(self, jobs: Sequence[Stage], where: Places) -> "Here":
        return self

    def run(self, job: Work, where: Places) -> Any:
        turn = nullcontext() if self.shared or job.turn is None else TURNS[job.turn]
        with turn, Progress() as progress:
            return job.run(where.here() if self.shared else where, pick_device(self.device), progress)


@dataclass(frozen=True)
class Pool:
    """Workers of a deployment. Jobs that are asked for together travel in one run: starting one takes seconds."""

    deployment: str
    device: str = "auto"
    apart: bool = False
    """Each job in a run of its own, for several workers."""

    @property
    def place(self) -> str:
        return f" on {self.deployment}"

    def together(self, jobs: Sequence[Stage], where: Places) -> "Sent":
        """Sends what is not there yet, and waits for it. A job that fails there fails alone; of what a worker died of only what is missing
        is sent again, the job at which it died last."""
        problems: dict[str, OtaError] = {}
        todo = _missing(jobs, where)
        for tried in range(1 + TRIES_AFTER_A_LOST_WORKER):
            lost: list[Stage] = []
            try:
                ended = self._runs(todo, where)
            except OtaError as error:  # no such deployment
                return Sent(self, problems | {job.step.fingerprint: error for job in todo})
            for group, state in ended:
                if not state.is_crashed():
                    problems |= _problems(group, state, where)
                elif missing := _missing(group, where):
                    names, why = _together(missing), state.message or "no message"
                    lost += [*missing[1:], missing[0]]
                    if tried < TRIES_AFTER_A_LOST_WORKER:
                        get_run_logger().warning("%s: the worker is gone (%s); it is sent again", names, why)
                        continue
                    gone = f"the worker that ran it is gone ({why}); run again, finished stages are kept"
                    problems |= {job.step.fingerprint: WorkerLost(f"{job.name}: {gone}") for job in missing}
            todo = lost
        return Sent(self, problems)

    def run(self, job: Work, where: Places) -> Any:
        assert isinstance(job, Stage)
        return self.together([job], where).run(job, where)

    def _runs(self, jobs: Sequence[Stage], where: Places) -> list[tuple[list[Stage], Any]]:
        """Jobs and the state in which their run ended."""
        groups = [[job] for job in jobs] if self.apart else [list(jobs)] if jobs else []
        runs = [(group, self._options(group, where)) for group in groups]
        several = len(runs) > 1
        if several:
            get_run_logger().info("%d jobs sent to %s; they wait until a worker takes them", len(runs), self.deployment)
        for _, options in runs if several else []:
            run_deployed(self.deployment, **options, as_subflow=True, timeout=0)
        # The same key gives the run that was created above; asked for a second time, it is waited for.
        ended: list[tuple[list[Stage], State]] = []
        for group, options in runs:
            run = run_deployed(self.deployment, **options, as_subflow=not several, poll_interval=POLL_SECONDS)
            assert run.state is not None  # it was waited for
            ended.append((group, run.state))
        return ended

    def _options(self, jobs: Sequence[Stage], where: Places) -> dict[str, Any]:
        sent = [job.abroad().model_dump(mode="json", by_alias=True) for job in jobs]
        parameters = {"jobs": sent, "where": where.model_dump(mode="json"), "device": self.device}
        # A key of its own: who asks again must not be given the run of an earlier one. That may have failed, or what it made may have been
        # deleted since.
        return {"name": _together(jobs), "parameters": parameters, "key": str(uuid4())}


@dataclass(frozen=True)
class Sent:
    """What became of jobs that were sent."""

    pool: Pool
    problems: dict[str, OtaError] = field(default_factory=dict)
    """By fingerprint, what failed."""

    @property
    def place(self) -> str:
        return self.pool.place

    def together(self, jobs: Sequence[Stage], where: Places) -> "Sent":
        return self

    def run(self, job: Work, where: Places) -> Any:
        assert isinstance(job, Stage)
        if error := self.problems.get(job.step.fingerprint):
            raise error
        return job.find(where) or self.pool.run(job, where)  # gone again since


def executor_of(gpu: str | None, device: str) -> Executor:
    """The GPU pool's deployment, or this process. Raises OtaError for a device that is not here."""
    return Pool(gpu, device) if gpu else Here(pick_device(device))


def gpu_deployment(environment: Mapping[str, str] = os.environ) -> str | None:
    """The deployment for GPU stages, where one is configured."""
    return environment.get("OTA_GPU_DEPLOYMENT") or None


def do_jobs(jobs: Sequence[Work], where: Places, device: str) -> State:
    """What a worker does, in the flow that it was sent: each job, also after one that failed.

    Outputs go to the artifacts' root, the errors' messages to who sent the jobs: of one job as it is, of several as JSON.
    """
    problems: dict[str, str] = {}
    for job in jobs:
        try:
            Here(device, shared=True).run(job, where)
        except OtaError as error:
            problems[_named(job)] = str(error)
        except Exception as error:
            get_run_logger().exception("%s failed", job.name)
            problems[_named(job)] = f"{type(error).__name__}: {error}"
    if not problems:
        return Completed(message=where.artifacts)
    told = next(iter(problems.values())) if len(jobs) == 1 else json.dumps(problems, ensure_ascii=False, indent=1)
    return Failed(message=told)


def missing_after(name: str, where: Places) -> ArtifactError:
    """What to say when a machine reports a job done and the root of this machine does not hold its output."""
    return ArtifactError(
        f"{name} is done, but {where.artifacts} does not hold its output as this machine sees it; all machines need one root: "
        "OTA_ARTIFACTS, or --artifacts, must be s3://… or a shared folder"
    )


def _missing(jobs: Sequence[Stage], where: Places) -> list[Stage]:
    return [job for job in jobs if job.find(where) is None]


def _problems(jobs: Sequence[Stage], state: State, where: Places) -> dict[str, OtaError]:
    """By fingerprint, why jobs of a run that ended in this state left nothing."""
    told: dict[str, str] | None = None
    if state.is_failed() and len(jobs) > 1:
        try:
            told = json.loads(state.message or "")
        except ValueError:  # the run itself failed, not its jobs
            told = None
    found: dict[str, OtaError] = {}
    for job in _missing(jobs, where):
        if told and _named(job) in told:
            found[job.step.fingerprint] = OtaError(f"{job.name}: {told[_named(job)]}")
        elif told or state.is_completed():
            found[job.step.fingerprint] = missing_after(job.name, where)
        else:
            found[job.step.fingerprint] = OtaError(complaint(job.name, state))
    return found


def _named(job: Work) -> str:
    """A job's name, unlike those of others in one run."""
    return f"{job.name} ({job.step.fingerprint[:8]})" if isinstance(job, Stage) else job.name


def _together(jobs: Sequence[Work]) -> str:
    """The name of a run of these jobs, such as ``benchmark base, math``."""
    first, *rest = [job.name.partition(" ") for job in jobs]
    same = all(verb == first[0] for verb, _, _ in rest)
    return ", ".join(["".join(first), *(what if same else f"{verb} {what}" for verb, _, what in rest)])[:200]
