"""The stages as cached Prefect tasks. Every task's cache key is the fingerprint of its output; the task itself finds an output that is there.

Stages for a GPU run here, or on a worker of the GPU pool (flows/pools.py).
"""

import hashlib
import threading
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import TaskRunContext
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from flows.pools import TRIES_AFTER_A_LOST_WORKER, on_pool, worker_lost
from ota_core.artifact import ArtifactRef
from ota_core.plan.inputs import ExpertInput, MergeInputs
from ota_core.recipe.recipe import MergeRecipe
from tasks import stages
from tasks.jobs import Job
from tasks.orchestration.run_log import Progress
from tasks.settings import Places
from tasks.stages import Step, Subject
from tasks.storage import models as storage
from tasks.storage.models import Fetched
from tasks.tracking.merge import LoggedRun, MergeRun, log_merge

# A stage of the engine uses all cores by threads of its own; two at once in one process would each take the budget of memory.
ONE_AT_A_TIME = threading.Lock()
# lm-eval takes turns anyway. Waiting here and not inside a stage keeps the wait out of what is noted of the stage: seconds, CPU, memory.
ONE_BENCHMARK = threading.Lock()


def _key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """The cache key: the fingerprint of what the task makes, or for a fetch the identity of the source, and where the result lies.

    A cached result is a reference into one root of artifacts; a run with another root must not be given it.
    """
    step, where = parameters.get("step"), parameters["where"]
    if isinstance(step, Step):
        return f"ota-{step.kind}-{step.fingerprint}-{_place(where.artifacts)}"
    identity = parameters.get("identity")
    return f"ota-fetch2-{identity}-{_place(where.cache)}" if identity else None


def _place(root: str | Path) -> str:
    return hashlib.sha256(str(root).encode()).hexdigest()[:8]


CACHED: dict[str, Any] = {
    "cache_policy": CacheKeyFnPolicy(cache_key_fn=_key),
    "persist_result": True,
    "result_serializer": "json",
}


def several_at_once() -> TaskRunner[Any]:
    """The task runner of the flows: tasks that wait, for downloads or for other machines, do so side by side."""
    return ThreadPoolTaskRunner(max_workers=4)


@task(name="fetch", task_run_name="fetch {source}", **CACHED)
def fetch(source: str, identity: str | None, where: Places) -> Fetched:
    """Bring one checkpoint to this machine, verified."""
    with Progress() as progress:
        return storage.fetch(
            source, cache=where.cache, progress=lambda done, total: progress(f"fetch {source}", done, total)
        )  # fmt: skip


@task(name="compress", task_run_name="compress {expert.name}", **CACHED)
def compress(step: Step, where: Places, expert: ExpertInput, memory: str) -> ArtifactRef:
    """Compress one expert's second moments."""
    with ONE_AT_A_TIME, Progress() as progress:
        return stages.compress(where, step, expert, memory=memory, progress=progress)


@task(name="mask", task_run_name="mask {name}", **CACHED)
def mask(
    step: Step, where: Places, name: str, recipe: MergeRecipe, inputs: MergeInputs, index: int, memory: str, device: str
) -> ArtifactRef:
    """Fast Fisher Grafting: the mask of one expert."""
    with ONE_AT_A_TIME, Progress() as progress:
        return stages.mask(where, step, recipe, inputs, index, memory=memory, device=device, progress=progress)


@task(name="merge", task_run_name="merge {recipe.merge_method}", **CACHED)
def merge(
    step: Step, where: Places, recipe: MergeRecipe, inputs: MergeInputs, shard_size: int, memory: str, device: str
) -> ArtifactRef:
    """Merge the experts into one model."""
    with ONE_AT_A_TIME, Progress() as progress:
        return stages.merge(
            where, step, recipe, inputs, shard_size=shard_size, memory=memory, device=device, progress=progress
        )  # fmt: skip


@task(name="benchmark", task_run_name="benchmark {subject.name}", **CACHED)
def benchmark(
    step: Step, where: Places, subject: Subject, suite: str, data: Path | None, limit: int | None, device: str
) -> ArtifactRef:
    """Score one model on the suite."""
    with ONE_BENCHMARK, Progress() as progress:
        return stages.score(where, step, subject, suite, data, limit, device=device, progress=progress)


@task(
    name="gpu", task_run_name="{job.name} on {deployment}", retries=TRIES_AFTER_A_LOST_WORKER, retry_delay_seconds=1,
    retry_condition_fn=worker_lost, **CACHED,
)  # fmt: skip
def send(step: Step, where: Places, job: Job, device: str, deployment: str) -> ArtifactRef:
    """One GPU stage on a worker of the GPU pool. When the worker dies the stage is sent again."""
    return on_pool(job, where, device, deployment)


@task(name="log", task_run_name="log {run.name}", retries=2, retry_delay_seconds=10)
def log(run: MergeRun, where: Places, tracking_uri: str | None) -> LoggedRun:
    """Log the merge to MLflow. Finds the run that an earlier try or an equal merge logged, so that it can be repeated."""
    return log_merge(run, tracking_uri=tracking_uri, root=where.tracking)


def missing(stage: Any, step: Step, where: Places) -> Any:
    """The task, told to ignore Prefect's cached result when the artifact that it points to is not there any more."""
    present = stages.store_of(where).find(step.kind, step.fingerprint)
    return stage if present else stage.with_options(refresh_cache=True)
