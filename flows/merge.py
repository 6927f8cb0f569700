"""The main path, top to bottom: fetch → compress → mask → merge → benchmark → log, as cached Prefect tasks.

With several output files, or another runner than threads, compress, mask and merge are parts that machines share out (flows/spread.py).

Every task's cache key is the fingerprint of its output; the task itself finds an output that is there. An output whose files
are gone is computed again, alone.
"""

import hashlib
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import BaseModel, ConfigDict

from flows.report import merge_label, merge_name, merge_run
from flows.run_log import Progress, hide_tracebacks_of_user_errors
from flows.runners import Runner, runner_of
from flows.spread import cancel_parts, results, spread_flow
from ota_core.artifact import ArtifactRef
from ota_core.inputs import ExpertInput, MergeInputs
from ota_core.recipe import NEEDS_MOMENTS, MergeRecipe
from ota_core.stream import parse_memory, parse_size
from tasks import stages, storage
from tasks.inputs import fetch_all, model_sources
from tasks.parts import SpreadMerge
from tasks.settings import Places, places
from tasks.sources import MergeSources
from tasks.stages import Step, Subject
from tasks.storage import Fetched
from tasks.streaming import Streams
from tasks.suites import load_suite
from tasks.tracking import LoggedRun, MergeRun, log_merge
from tasks.watch import identity_of_source, is_intact

hide_tracebacks_of_user_errors()


def _key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    """The cache key: the fingerprint of what the task makes, or for a fetch the identity of the source, and where the result lies.

    A cached result is a reference into one root of artifacts; a run with another root must not be given it.
    """
    step, where = parameters.get("step"), parameters["where"]
    if isinstance(step, Step):
        return f"ota-{step.kind}-{step.fingerprint}-{_place(where.artifacts)}"
    identity = parameters.get("identity")
    return f"ota-fetch-{identity}-{_place(where.cache)}" if identity else None


def _place(root: str | Path) -> str:
    return hashlib.sha256(str(root).encode()).hexdigest()[:8]


# A stage of the engine uses all cores by threads of its own; two at once in one process would each take the budget of memory.
ONE_AT_A_TIME = threading.Lock()
CACHED: dict[str, Any] = {
    "cache_policy": CacheKeyFnPolicy(cache_key_fn=_key),
    "persist_result": True,
    "result_serializer": "json",
}


@task(name="fetch", task_run_name="fetch {source}", **CACHED)
def fetch(source: str, identity: str | None, where: Places) -> Fetched:
    """Bring one checkpoint to this machine, verified."""
    progress = Progress()
    return storage.fetch(source, cache=where.cache, progress=lambda done, total: progress(f"fetch {source}", done, total))


@task(name="compress", task_run_name="compress {expert.name}", **CACHED)
def compress(step: Step, where: Places, expert: ExpertInput, memory: str) -> ArtifactRef:
    """Compress one expert's second moments."""
    with ONE_AT_A_TIME:
        return stages.compress(where, step, expert, memory=memory, progress=Progress())


@task(name="mask", task_run_name="mask {name}", **CACHED)
def mask(
    step: Step, where: Places, name: str, recipe: MergeRecipe, inputs: MergeInputs, index: int, memory: str, device: str
) -> ArtifactRef:
    """Fast Fisher Grafting: the mask of one expert."""
    with ONE_AT_A_TIME:
        return stages.mask(where, step, recipe, inputs, index, memory=memory, device=device, progress=Progress())


@task(name="merge", task_run_name="merge {recipe.merge_method}", **CACHED)
def merge(step: Step, where: Places, recipe: MergeRecipe, inputs: MergeInputs, memory: str, device: str) -> ArtifactRef:
    """Merge the experts into one model."""
    with ONE_AT_A_TIME:
        return stages.merge(where, step, recipe, inputs, memory=memory, device=device, progress=Progress())


@task(name="benchmark", task_run_name="benchmark {subject.name}", **CACHED)
def benchmark(
    step: Step, where: Places, subject: Subject, suite: str, data_dir: Path | None, limit: int | None, device: str
) -> ArtifactRef:
    """Score one model on the suite."""
    return stages.score(where, step, subject, suite, data_dir, limit, device=device, progress=Progress())


@task(name="log", task_run_name="log {run.name}", retries=2, retry_delay_seconds=10)
def log(run: MergeRun, where: Places, tracking_uri: str | None) -> LoggedRun:
    """Log the merge to MLflow. Finds the run that an earlier try or an equal merge logged, so that it can be repeated."""
    return log_merge(run, tracking_uri=tracking_uri, root=where.tracking)


class MergeOutcome(BaseModel):
    """What a merge led to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """How it was merged, for the row of a table."""
    merged: ArtifactRef
    path: str
    """The merged model's folder: on this machine, or in S3 where it was made there and nothing here needs it."""
    digest: str
    scores: dict[str, ArtifactRef]
    """``base``, the experts' names and ``merged`` to their scores; empty without a benchmark."""
    capabilities: dict[str, str]
    """Expert's name to its own capability, where known."""
    densities: dict[str, float]
    logged: LoggedRun


def _run_name() -> str:
    recipe = flow_run.parameters["recipe"]
    return merge_name(recipe if isinstance(recipe, MergeRecipe) else MergeRecipe.model_validate(recipe))


@flow(
    name="merge", flow_run_name=_run_name, task_runner=ThreadPoolTaskRunner(max_workers=4), persist_result=False,
    on_cancellation=[cancel_parts], on_crashed=[cancel_parts],
)  # fmt: skip
def merge_flow(
    recipe: MergeRecipe,
    recipe_dir: Path | None = None,
    suite: str | None = "public",
    data_dir: Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    memory: str = "2GiB",
    home: Path | None = None,
    artifacts: str | None = None,
    tracking_uri: str | None = None,
    runner: Runner | None = None,
    shard_size: str = "5GB",
) -> MergeOutcome:
    """Merge the recipe's experts, benchmark base, experts and merge, log everything.

    Args:
        recipe: What to merge and how.
        recipe_dir: Folder that relative paths of the recipe start from.
        suite: Benchmark suite: a name in deployments/suites or a file; none to skip the benchmark.
        data_dir: Data of a local suite.
        limit: Documents per task, for a quick look.
        device: cpu, cuda or auto.
        memory: Budget of the merge, or of each of its parts.
        home: Folder for artifacts, caches and the embedded MLflow; OTA_HOME or ~/.ota by default.
        artifacts: Root of the artifacts, a folder or s3://…, if not in home.
        tracking_uri: MLflow server; MLFLOW_TRACKING_URI or the embedded database by default.
        runner: Where the parts of the merge run; OTA_RUNNER or threads by default.
        shard_size: Largest weight file of the merged model, and so the number of parts.
    """
    tests = load_suite(suite) if suite else None
    where, runner = places(home, artifacts), runner or runner_of()
    task_runner = runner.task_runner()
    here = _device(device) if tests or runner.kind == "threads" else device
    parse_memory(memory)
    file_size = parse_size(shard_size, "shard size", "1KB")
    if tests:
        stages.check_suite(tests, data_dir, limit)

    with ExitStack() as stack:
        streams = None
        if runner.kind != "threads" and not tests:  # nothing here reads a whole model: headers are enough
            streams = stack.enter_context(Streams(cache=where.cache, memory=parse_memory(memory)))
        fetched = _fetch_all(recipe, recipe_dir, where, streams)
        inputs = stages.inputs_of(recipe, fetched, where, recipe_dir, streams)
        step = stages.merge_step(recipe, inputs, file_size)
        if runner.kind == "threads" and len(stages.output_files(recipe, inputs, file_size)) == 1:
            ready, stage_refs = _second_moments(recipe, inputs, where, memory, here)
            merged: ArtifactRef = _missing(merge, step, where)(step, where, recipe, ready, memory, here)
        else:
            spread = spread_flow.with_options(task_runner=task_runner)(
                SpreadMerge(
                    recipe=recipe, sources=MergeSources.of(recipe, inputs, fetched), step=step, shard_size=file_size, where=where,
                    memory=memory, device=device,
                ),
                runner,
            )  # fmt: skip
            merged, stage_refs = spread.merged, {"compress": spread.compressed} if spread.compressed else {}
    stage_refs["merge"] = [merged]

    label = merge_label(recipe)
    subjects = _subjects(recipe, inputs, fetched, stages.merged_subject(where, label, merged, benchmark=bool(tests)))
    scores: dict[str, ArtifactRef] = {}
    if suite and tests:
        steps = {key: stages.score_step(subject, tests, data_dir, limit) for key, subject in subjects.items()}
        futures = {
            key: _missing(benchmark, steps[key], where).submit(steps[key], where, subject, suite, data_dir, limit, here)
            for key, subject in subjects.items()
        }
        scores = dict(zip(futures, results(futures.values()), strict=True))
    run = merge_run(recipe, inputs, fetched, subjects, merged, scores, stage_refs, where)
    logged = log(run, where, tracking_uri)
    path = str(subjects["merged"].path or merged.uri)
    get_run_logger().info("merged model: %s; MLflow run %s", path, logged.url or logged.run_id)
    return MergeOutcome(
        name=label,
        merged=merged,
        path=path,
        digest=subjects["merged"].digest,
        scores=scores,
        capabilities={expert.name: expert.capability for expert in inputs.experts if expert.capability},
        densities={key.removeprefix("density/"): value for key, value in run.metrics.items() if key.startswith("density/")},
        logged=logged,
    )


def _device(device: str) -> str:
    from ota_core.engine import pick_device

    return pick_device(device)


def _missing(stage: Any, step: Step, where: Places) -> Any:
    """The task, told to ignore Prefect's cached result when the artifact that it points to is not there any more."""
    present = stages.store_of(where).find(step.kind, step.fingerprint)  # type: ignore[arg-type]
    return stage if present else stage.with_options(refresh_cache=True)


def _fetch_all(recipe: MergeRecipe, recipe_dir: Path | None, where: Places, streams: Streams | None) -> list[Fetched]:
    """All checkpoints, in parallel, base first. Every source that fails is reported, not only the first.

    With ``streams``, only outlines of what lies in S3: whoever needs its tensors reads them there.
    """
    if streams is not None:
        return fetch_all(recipe, cache=where.cache, recipe_dir=recipe_dir, streams=streams)
    sources = model_sources(recipe, recipe_dir)
    fetched: list[Fetched] = results(fetch.submit(source, identity_of_source(source), where) for source in sources)
    again = fetch.with_options(refresh_cache=True)
    damaged = {
        i: again.submit(sources[i], identity_of_source(sources[i]), where) for i, one in enumerate(fetched) if not is_intact(one)
    }
    repaired = dict(zip(damaged, results(damaged.values()), strict=True))
    return [repaired.get(i, one) for i, one in enumerate(fetched)]


def _second_moments(
    recipe: MergeRecipe, inputs: MergeInputs, where: Places, memory: str, device: str
) -> tuple[MergeInputs, dict[str, list[ArtifactRef]]]:
    """Compressed moments and masks of every expert, each a task, and the inputs that refer to them."""
    if recipe.merge_method not in NEEDS_MOMENTS:
        return inputs, {}
    steps = [stages.moments_step(recipe, expert) for expert in inputs.experts]
    moments = [
        _missing(compress, step, where).submit(step, where, expert, memory)
        for step, expert in zip(steps, inputs.experts, strict=True)
    ]  # fmt: skip
    refs: dict[str, list[ArtifactRef]] = {"compress": results(moments)}
    experts = tuple(
        stages.with_compressed(where, expert, ref) for expert, ref in zip(inputs.experts, refs["compress"], strict=True)
    )
    ready = MergeInputs(base=inputs.base, experts=experts)
    masks = {}
    for i, expert in enumerate(experts):
        if recipe.ffg(i):
            step = stages.mask_step(recipe, inputs, i)
            masks[i] = _missing(mask, step, where).submit(step, where, expert.name, recipe, ready, i, memory, device)
    if masks:
        found = dict(zip(masks, results(masks.values()), strict=True))
        refs["mask"] = list(found.values())
        ready = stages.with_masks(where, ready, found)
    return ready, refs


def _subjects(recipe: MergeRecipe, inputs: MergeInputs, fetched: list[Fetched], merged: Subject) -> dict[str, Subject]:
    """Everything that is scored: base, experts, merged."""
    models = list(fetched)
    subjects = {}
    if inputs.base is not None:
        base = models.pop(0)
        subjects["base"] = Subject(name="base", role="base", path=base.path, digest=base.digest)
    for expert, one in zip(inputs.experts, models, strict=True):
        subjects[f"expert/{expert.name}"] = Subject(
            name=expert.name, role="expert", capability=expert.capability, path=one.path, digest=one.digest
        )
    return subjects | {"merged": merged}
