"""A merge in parts: compress → survey → thresholds → λ → merge file by file → assemble, each part wherever the runner runs it.

A flow that occupies a worker of a pool runs that pool's parts itself: flows that wait for each other's workers would wait for ever.
Parts that the store holds already are not sent anywhere, so that a run after a crash does only what is missing. ``part`` is the door
through which a worker takes one.
"""

import os
from collections.abc import Sequence

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger

from ota_core.artifact import ArtifactRef
from ota_core.frozen import Frozen
from tasks.artifacts.step import Stage
from tasks.artifacts.store import store_of
from tasks.compress import CompressJob, compress_jobs
from tasks.job import Job, run_here, run_jobs
from tasks.mask import mask_jobs
from tasks.merge import (
    MergeJob,
    assemble_job,
    counted,
    discard,
    facts_job,
    merge_job,
    scaled_facts_job,
    scales_jobs,
    shard_jobs,
    shards_of,
    sums_jobs,
    survey_jobs,
)  # fmt: skip
from tasks.merging.sources import Planned
from tasks.orchestration.deployed import pool_of
from tasks.orchestration.executors import Executor, Here, Pool, do_jobs
from tasks.orchestration.run_log import for_users
from tasks.orchestration.runners import Runner
from tasks.settings import Places
from tasks.storage.cache import locked


@for_users
@flow(name="part", persist_result=False)
def part(jobs: list[Job], where: Places, device: str = "auto") -> State:
    """Do what the parts say; their outputs go to the artifacts' root, errors' messages to the parent."""
    return do_jobs(jobs, where, device)


class SpreadResult(Frozen):
    """What a merge in parts left."""

    merged: ArtifactRef
    compressed: list[ArtifactRef]


def merge_in_parts(
    plan: Planned, file_size: int, where: Places, runner: Runner, device: str
) -> tuple[ArtifactRef, dict[str, list[ArtifactRef]]]:
    """The merged model, and what each stage before it left."""
    plan = plan if runner.kind == "threads" else plan.abroad()
    found = {i: job.find(where) for i, job in mask_jobs(plan).items()}
    masks = {i: ref for i, ref in found.items() if ref is not None}
    if len(masks) == len(found):
        plan = plan.with_artifacts(masks=masks)
    shared_out = spread_flow.with_options(task_runner=runner.task_runner())
    spread = shared_out(merge_job(plan, file_size), compress_jobs(plan), where, runner, device)
    return spread.merged, {"compress": spread.compressed} if spread.compressed else {}


@for_users
@flow(name="spread", flow_run_name="spread {merge.recipe.merge_method}", persist_result=False)
def spread_flow(merge: MergeJob, compress: list[CompressJob], where: Places, runner: Runner, device: str) -> SpreadResult:
    """A merge in parts, its second moments compressed before."""

    def run(jobs: Sequence[Stage]) -> list[ArtifactRef]:
        return run_jobs(jobs, where, _executor(jobs, runner, device))

    # A second run of the same merge on this machine waits here, and then finds everything.
    with locked(where.cache, f"spread {merge.step.fingerprint}"):
        compressed = run(compress)
        if merged := merge.find(where):
            return SpreadResult(merged=merged, compressed=compressed)
        merge = merge.model_copy(update={"sources": merge.sources.with_artifacts(compressed)})
        # Each part reads a part of every file, and cannot tell whether the whole is what was stored.
        sums = run(sums_jobs(merge))
        for note in (note for ref in sums for note in store_of(where).read_record(ref).results["notes"]):
            get_run_logger().warning("%s", note)
        merge = merge.model_copy(update={"sources": merge.sources.model_copy(update={"sums": tuple(sums)})})
        files, surveyed = shards_of(merge, where)
        get_run_logger().info("the merged model has %d weight files, each a part", len(files))
        facts = None
        if surveyed and not (facts := facts_job(merge).find(where)):
            # Thresholds of whole experts: the shards' histograms add up, in two rounds (docs/methods.md section 3).
            first = run(survey_jobs(merge, files))
            opened = counted(merge, where, first)
            second = run(survey_jobs(merge, files, opened)) if opened else []
            facts = run_here(facts_job(merge, first, second), where)
        if merge.recipe.auto:
            # λ of the merge is a mean over all its matrices (docs/methods.md section 8).
            facts = scaled_facts_job(merge).find(where) or run_here(
                scaled_facts_job(merge, facts, run(scales_jobs(merge, files, facts))), where
            )  # fmt: skip
        found = dict(zip(files, run(shard_jobs(merge, files, facts)), strict=True))
        merged = run_here(assemble_job(merge, found), where)
        discard(merge, where, files)
        return SpreadResult(merged=merged, compressed=compressed)


def _executor(jobs: Sequence[Stage], runner: Runner, device: str) -> Executor:
    """Where parts run: on workers of their pool, unless this flow itself occupies one of those; else wherever the task runner says.

    Runs that wait there for runs of the same pool could hold every one of its workers, and wait for ever.
    """
    if runner.kind == "workers" and jobs:
        deployment = runner.deployment_of(jobs[0].kind)
        own = os.environ.get("OTA_WORK_POOL")
        if not own or own != pool_of(deployment):
            return Pool(deployment, device, apart=True)
    return Here(device, shared=True)
