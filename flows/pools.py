"""GPU stages on the GPU pool: the flow that its workers run, and the task that sends a stage there and waits for it.

OTA_GPU_DEPLOYMENT    the deployment that merges and benchmarks are sent to, for example "stage/gpu" (deployments/prefect.yaml);
                      without it they run in the process of the flow
"""

import os
from collections.abc import Mapping
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as this_run
from prefect.states import Completed, Failed

from ota_core.artifact import ArtifactRef
from ota_core.errors import OtaError
from tasks import stages
from tasks.jobs import Job, MergeJob, ScoreJob, missing_after
from tasks.orchestration.deployed import POLL_SECONDS, complaint, run_deployed
from tasks.orchestration.run_log import Progress, for_users
from tasks.settings import Places

# A stage whose worker died is sent again; a machine that dies at every try is no accident.
TRIES_AFTER_A_LOST_WORKER = 3
Work = MergeJob | ScoreJob


class WorkerLost(OtaError):
    """The worker that had taken a stage died, or lost its connection for good."""


def gpu_deployment(environment: Mapping[str, str] = os.environ) -> str | None:
    """The deployment for GPU stages, where one is configured."""
    return environment.get("OTA_GPU_DEPLOYMENT") or None


@for_users
@flow(name="stage", flow_run_name="{job.name}", persist_result=False)
def stage(job: Job, where: Places, device: str = "auto") -> State:
    """Merge or benchmark on the machine that takes this run. The output goes to the artifacts' root, an error's message to the parent."""
    from ota_core.merge.engine import pick_device

    try:
        with Progress() as progress:
            ref = job.run(where.here(), pick_device(device), progress)
    except OtaError as error:
        return Failed(message=str(error))
    return Completed(message=ref.uri)


def worker_lost(task: Any, task_run: Any, state: Any) -> bool:
    """Whether a task failed because its worker died (a ``retry_condition_fn``)."""
    return isinstance(state.result(raise_on_failure=False), WorkerLost)


def on_pool(job: Work, where: Places, device: str, deployment: str) -> ArtifactRef:
    """What the job leaves, made by whichever worker of the pool takes it. Call it in a task. Raises OtaError with what the worker says.

    Raises WorkerLost when the worker died: send it again, as a run of its own.
    """
    context = TaskRunContext.get()
    asked = f"{context.task_run.id}-{context.task_run.run_count}" if context else "0"
    ended = run_deployed(
        deployment,
        name=job.name,
        parameters={"job": job.model_dump(mode="json", by_alias=True), "where": where.model_dump(mode="json"), "device": device},
        # A new run of the parent, its retry, or another task of it that wants the same must not be given the run of an earlier one: that may
        # have failed, or what it made may have been deleted since.
        key=f"{this_run.id}-{this_run.run_count}-{asked}-{job.step.fingerprint}",
        as_subflow=True,
        poll_interval=POLL_SECONDS,
    )
    state = ended.state
    assert state is not None  # it was waited for
    if state.is_crashed():
        get_run_logger().warning("%s: the worker is gone (%s); the stage is sent again", job.name, state.message)
        raise WorkerLost(
            f"{job.name}: the worker that ran it is gone ({state.message or 'no message'}); run again, finished stages are kept"
        )
    if not state.is_completed():
        raise OtaError(complaint(job.name, state))
    found = stages.store_of(where).find(job.step.kind, job.step.fingerprint)
    if found is None:
        raise missing_after(job.name, where)
    return found
