"""The merge shared out: compress → survey → thresholds → merge shard by shard → assemble, each part wherever the runner runs it.

A flow that occupies a worker of a pool runs that pool's parts itself: flows that wait for each other's workers would wait for ever.
Parts that the store holds already are not sent anywhere, so that a run after a crash does only what is missing.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as this_run
from pydantic import BaseModel, ConfigDict

from ota_core.artifact import ArtifactRef
from ota_core.errors import OtaError, raise_all
from tasks import parts
from tasks.orchestration.deployed import POLL_SECONDS, complaint, pool_of, run_deployed
from tasks.orchestration.run_log import Progress
from tasks.orchestration.runners import Runner
from tasks.parts import Part, SpreadMerge
from tasks.storage.cache import locked

T = TypeVar("T")
Run = Callable[[list[Part]], list[ArtifactRef]]


class SpreadResult(BaseModel):
    """What a merge in parts left."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    merged: ArtifactRef
    compressed: list[ArtifactRef]


@task(name="part", task_run_name="{part.name}", cache_policy=NO_CACHE, persist_result=False)
def run_part(part: Part) -> ArtifactRef:
    """One part of the merge. The store is its cache: an output that is there is not computed again."""
    with Progress() as progress:
        return parts.run_part(part, progress)


@task(name="thresholds", cache_policy=NO_CACHE, persist_result=False)
def thresholds(merge: SpreadMerge, first: list[ArtifactRef], second: list[ArtifactRef]) -> ArtifactRef:
    """Facts of whole experts from the sums of the surveys."""
    return parts.settle_facts(merge, first, second)


@task(name="assemble", cache_policy=NO_CACHE, persist_result=False)
def assemble(merge: SpreadMerge, shards: dict[str, ArtifactRef]) -> ArtifactRef:
    """The merged model from its shards; none of their bytes pass through this machine."""
    return parts.assemble(merge, shards)


@flow(name="spread", flow_run_name="spread {merge.recipe.merge_method}", persist_result=False)
def spread_flow(merge: SpreadMerge, runner: Runner) -> SpreadResult:
    """A merge in parts. Call it as ``spread_flow.with_options(task_runner=runner.task_runner())``."""

    def run(todo: list[Part]) -> list[ArtifactRef]:
        elsewhere = runner.kind == "workers" and not _own_pool_runs(todo, runner)
        return _by_workers(todo, runner) if elsewhere else _by_tasks(todo)

    # A second run of the same merge on this machine waits here, and then finds everything.
    with locked(merge.where.cache, f"spread {merge.step.fingerprint}"):
        compressed = _missing(parts.compress_parts(merge), run)
        merge = parts.with_moments(merge, compressed)
        merged = merge.store().find("merged", merge.step.fingerprint)
        return SpreadResult(merged=merged or _merged(merge, run), compressed=compressed)


def _merged(merge: SpreadMerge, run: Run) -> ArtifactRef:
    merge = parts.with_masks(merge)
    shards, surveyed = parts.shards_of(merge)
    get_run_logger().info("the merged model has %d weight files, each a part", len(shards))
    facts = _facts(merge, shards, run) if surveyed else None
    found = _missing(parts.shard_parts(merge, "merge", shards, facts=facts), run)
    merged = assemble(merge, dict(zip(shards, found, strict=True)))
    parts.discard(merge, shards)
    return merged


def _facts(merge: SpreadMerge, shards: list[str], run: Run) -> ArtifactRef:
    """Thresholds of whole experts: the shards' histograms add up, in two rounds (docs/methods.md section 3)."""
    known = parts.known_facts(merge)
    if known:
        return known
    first = _missing(parts.shard_parts(merge, "survey", shards), run)
    opened = parts.counted(merge, first)
    second = _missing(parts.shard_parts(merge, "recount", shards, opened=opened), run) if opened else []
    return thresholds(merge, first, second)


def _missing(wanted: Sequence[Part], run: Run) -> list[ArtifactRef]:
    """What the parts leave, those that the store lacks run first. Raises the errors of all of them together."""
    todo = [part for part in wanted if not parts.present(part)]
    if len(todo) < len(wanted):
        get_run_logger().info("%d of %d parts are there already", len(wanted) - len(todo), len(wanted))
    made = dict(zip((part.step.fingerprint for part in todo), run(todo), strict=True))
    found = [made.get(part.step.fingerprint) or parts.present(part) for part in wanted]
    raise_all([str(parts.missing_after(part)) for part, ref in zip(wanted, found, strict=True) if ref is None], OtaError)
    return [ref for ref in found if ref is not None]


def _own_pool_runs(todo: Sequence[Part], runner: Runner, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether workers of the pool that this flow itself occupies a worker of would run the parts.

    Runs that wait there for runs of the same pool could hold every one of its workers, and wait for ever.
    """
    own = environment.get("OTA_WORK_POOL")
    return bool(own) and own in {pool_of(name) for name in {runner.deployment_of(part.kind) for part in todo}}


def _by_tasks(todo: list[Part]) -> list[ArtifactRef]:
    """Through the flow's task runner: threads, Dask or Ray."""
    return results([run_part.submit(part) for part in todo])


def results(futures: Iterable[PrefectFuture[T]]) -> list[T]:
    """What the tasks return, once all have ended. The users' errors of all of them are raised together."""
    found, errors = [], []
    for future in list(futures):  # all are submitted before the first is waited for
        try:
            found.append(future.result())
        except OtaError as error:
            errors.append(error)
    kinds = {type(error) for error in errors}
    raise_all([problem for error in errors for problem in error.problems], kinds.pop() if len(kinds) == 1 else OtaError)
    return found


def _by_workers(todo: list[Part], runner: Runner) -> list[ArtifactRef]:
    """Each part as a run of its deployed flow, taken by whichever Prefect worker is free. Raises OtaError with what the workers say."""
    sent = [_deployed(part, runner, as_subflow=True, timeout=0) for part in todo]
    if todo:
        names = ", ".join(sorted({runner.deployment_of(part.kind) for part in todo}))
        get_run_logger().info("%d parts sent to %s; they wait until a worker takes them", len(sent), names)
    # The same key gives the run that was created above; asked for a second time, it is waited for.
    ended = [_deployed(part, runner, as_subflow=False, poll_interval=POLL_SECONDS) for part in todo]
    states: list[Any] = [run.state for run in ended]
    raise_all([complaint(part.name, state) for part, state in zip(todo, states, strict=True) if not state.is_completed()])
    found = [parts.present(part) for part in todo]
    raise_all([str(parts.missing_after(part)) for part, ref in zip(todo, found, strict=True) if ref is None])
    return [ref for ref in found if ref is not None]


def _deployed(part: Part, runner: Runner, **options: Any) -> FlowRun:
    # A new run of the parent, or its retry, must not be given the failed parts of an earlier one.
    key = f"{this_run.id}-{this_run.run_count}-{part.step.fingerprint}"
    parameters = {"part": part.model_dump(mode="json", by_alias=True)}
    return run_deployed(runner.deployment_of(part.kind), name=part.name, parameters=parameters, key=key, **options)
