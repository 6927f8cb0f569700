"""The main path, top to bottom: fetch → compress → mask → merge → benchmark → log, as cached Prefect tasks (flows/steps.py).

With several output files, or another runner than threads, compress, mask and merge are parts that machines share out (flows/spread.py).
With a GPU pool, merge and benchmark run there (flows/pools.py), also when this flow runs on a machine without a GPU.

An output whose files are gone is computed again, alone.
"""

from contextlib import ExitStack
from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict

from flows.pools import gpu_deployment
from flows.report import comparison, merge_label, merge_name, merge_run
from flows.report_page import MergePage, ReportKind, analysed, keeping_scores, page_of, put_beside_the_model, with_report
from flows.spread import results, spread_flow
from flows.steps import benchmark, compress, fetch, log, mask, merge, missing, send, several_at_once
from ota_core.artifact import ArtifactRef
from ota_core.compute.stream import parse_memory, parse_size
from ota_core.errors import OtaError
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import NEEDS_MOMENTS, MergeRecipe
from tasks import stages
from tasks.evaluation.suites import load_suite
from tasks.jobs import MergeJob, ScoreJob
from tasks.merging.inputs import fetch_all, model_sources
from tasks.merging.recipes import read_recipe
from tasks.merging.sources import MergeSources
from tasks.orchestration.credentials import block_credentials
from tasks.orchestration.deployed import cancel_children
from tasks.orchestration.run_log import for_users
from tasks.orchestration.runners import Runner, runner_of
from tasks.orchestration.shown import show_mlflow, show_scores
from tasks.parts import SpreadMerge
from tasks.settings import Device, Places, places
from tasks.stages import Subject
from tasks.storage.models import Fetched, is_s3
from tasks.storage.streaming.streams import Streams
from tasks.storage.watch import identity_of_source, is_intact
from tasks.tracking.merge import LoggedRun
from tasks.tracking.names import REGISTERED_MODEL


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
    page: MergePage | None
    """What its report is made of; None without one."""


def _run_name() -> str:
    given = flow_run.parameters["recipe"]
    try:
        if isinstance(given, str):
            with block_credentials():
                return merge_name(read_recipe(given)[0])
        return merge_name(given if isinstance(given, MergeRecipe) else MergeRecipe.model_validate(given))
    except OtaError:
        return f"merge {given}"  # the flow says what is wrong with it


@for_users
@flow(
    name="merge", flow_run_name=_run_name, task_runner=several_at_once(), persist_result=False,
    on_cancellation=[cancel_children], on_crashed=[cancel_children],
)  # fmt: skip
def merge_flow(
    recipe: MergeRecipe | str,
    suite: str | None = "public",
    data_dir: str | None = None,
    limit: int | None = None,
    device: Device = "auto",
    memory: str = "2GiB",
    shard_size: str = "5GB",
    recipe_dir: Path | None = None,
    home: Path | None = None,
    artifacts: str | None = None,
    tracking_uri: str | None = None,
    runner: Runner | None = None,
    gpu: str | None = None,
    registered_model: str | None = REGISTERED_MODEL,
    report: ReportKind = "full",
) -> MergeOutcome:
    """Merge the recipe's experts, benchmark base, experts and merge, log everything.

    Args:
        recipe: What to merge and how: a recipe, or where its YAML lies (s3://… or a file).
        suite: Benchmark suite: a name in deployments/suites or a file; none to skip the benchmark.
        data_dir: Data of a local suite: a folder or s3://….
        limit: Documents per task, for a quick look.
        device: What to compute on; auto: cuda where there is one.
        memory: Budget of the merge, or of each of its parts.
        shard_size: Largest weight file of the merged model, and so the number of parts.
        recipe_dir: Folder that relative paths of the recipe start from.
        home: Folder for artifacts, caches and the embedded MLflow; OTA_HOME or ~/.ota by default.
        artifacts: Root of the artifacts, a folder or s3://…, if not in home.
        tracking_uri: MLflow server; MLFLOW_TRACKING_URI or the embedded database by default.
        runner: Where the parts of the merge run; OTA_RUNNER or threads by default.
        gpu: Deployment that merges and benchmarks are sent to; OTA_GPU_DEPLOYMENT, or none: they run in this process.
        registered_model: The registered model in MLflow that gains a version; none: no version.
        report: The page beside the model; full: with the analysis of the experts, scores: without it, none: no page.
    """
    if isinstance(recipe, str):
        recipe, folder = read_recipe(recipe)
        recipe_dir = recipe_dir or folder
    tests = load_suite(suite) if suite else None
    where, runner, gpu = places(home, artifacts), runner or runner_of(), gpu or gpu_deployment()
    task_runner = runner.task_runner()
    here = "cpu" if gpu else _device(device) if tests or runner.kind == "threads" else device
    label = merge_label(recipe)
    parse_memory(memory)
    file_size = parse_size(shard_size, "shard size", "1KB")
    data = stages.bring_data(data_dir, where) if tests else None
    if tests:
        stages.check_suite(tests, data, limit)

    with ExitStack() as stack:
        streams = None
        if runner.kind != "threads" and not tests:  # nothing here reads a whole model: headers are enough
            streams = stack.enter_context(Streams(cache=where.cache, memory=parse_memory(memory)))
        fetched = fetch_models(recipe, recipe_dir, where, streams)
        inputs = stages.inputs_of(recipe, fetched, where, recipe_dir, streams)
        step = stages.merge_step(recipe, inputs, file_size)
        if runner.kind == "threads" and (gpu or len(stages.output_files(recipe, inputs, file_size)) == 1):
            ready, stage_refs, sources = _second_moments(recipe, inputs, fetched, where, memory, here)
            if gpu:
                job = MergeJob(step=step, label=label, recipe=recipe, sources=sources, shard_size=file_size, memory=memory)
                merged: ArtifactRef = missing(send, step, where)(step, where, job, device, gpu)
            else:
                merged = missing(merge, step, where)(step, where, recipe, ready, file_size, memory, here)
        else:
            spread = spread_flow.with_options(task_runner=task_runner)(
                SpreadMerge(
                    recipe=recipe, sources=MergeSources.of(recipe, inputs, fetched), step=step, shard_size=file_size, where=where,
                    memory=memory, device=device,
                ),
                runner,
            )  # fmt: skip
            merged, stage_refs = spread.merged, {"compress": spread.compressed} if spread.compressed else {}
        analysis, unanalysed = analysed(recipe, inputs, where, memory) if report == "full" else (None, "")
    stage_refs["merge"] = [merged]

    result = stages.merged_subject(where, label, merged, benchmark=bool(tests) and gpu is None)
    subjects = _subjects(inputs, fetched, result)
    scores: dict[str, ArtifactRef] = {}
    if suite and tests:
        scores = score_all(subjects, suite, data_dir, limit, where, device=device, gpu=gpu)
    found = {key: stages.read_scores(where, ref) for key, ref in scores.items()}
    run = merge_run(recipe, inputs, fetched, subjects, merged, scores, found, stage_refs, where, registered_model, data_dir)
    page = page_of(run, merged, found, subjects, analysis, unanalysed) if report != "none" else None
    run = with_report(run, page, where, tracking_uri) if page else run
    run = keeping_scores(run, merged)
    put_beside_the_model(run, merged, where)
    logged = log(run, where, tracking_uri)
    path = str(subjects["merged"].path or merged.uri)
    get_run_logger().info("merged model: %s; MLflow run %s", path, logged.url or logged.run_id)
    if found:
        show_scores(comparison(found, subjects), title=run.name)
    show_mlflow(run.name, logged.url)
    return MergeOutcome(
        name=label,
        merged=merged,
        path=path,
        digest=subjects["merged"].digest,
        scores=scores,
        capabilities={expert.name: expert.capability for expert in inputs.experts if expert.capability},
        densities={key.removeprefix("density/"): value for key, value in run.metrics.items() if key.startswith("density/")},
        logged=logged,
        page=page,
    )


def score_all(
    subjects: dict[str, Subject],
    suite: str,
    data_dir: str | None,
    limit: int | None,
    where: Places,
    *,
    device: str,
    gpu: str | None,
) -> dict[str, ArtifactRef]:
    """The scores of these models, each a task: here, or on the workers of the GPU pool. Raises OtaError."""
    tests, data = load_suite(suite), stages.bring_data(data_dir, where)
    here = device if gpu else _device(device)  # the worker knows its own
    futures = {}
    for key, subject in subjects.items():
        step = stages.score_step(subject, tests, data, limit)
        if gpu:
            job = ScoreJob(step=step, subject=subject, suite=suite, data_dir=_for_others(data_dir), limit=limit)
            futures[key] = missing(send, step, where).submit(step, where, job, device, gpu)
        else:
            futures[key] = missing(benchmark, step, where).submit(step, where, subject, suite, data, limit, here)
    return dict(zip(futures, results(futures.values()), strict=True))


def _for_others(folder: str | None) -> str | None:
    """A folder's name as other machines, or this one in another working directory, understand it."""
    return folder if folder is None or is_s3(folder) else str(Path(folder).expanduser().resolve())


def _device(device: str) -> str:
    from ota_core.merge.engine import pick_device

    return pick_device(device)


def fetch_models(recipe: MergeRecipe, recipe_dir: Path | None, where: Places, streams: Streams | None) -> list[Fetched]:
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
    recipe: MergeRecipe, inputs: MergeInputs, fetched: list[Fetched], where: Places, memory: str, device: str
) -> tuple[MergeInputs, dict[str, list[ArtifactRef]], MergeSources]:
    """Compressed moments and masks of every expert, each a task; the inputs that refer to them, and the same for another machine."""
    sources = MergeSources.of(recipe, inputs, fetched)
    if recipe.merge_method not in NEEDS_MOMENTS:
        return inputs, {}, sources
    steps = [stages.moments_step(recipe, expert) for expert in inputs.experts]
    moments = [
        missing(compress, step, where).submit(step, where, expert, memory)
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
            masks[i] = missing(mask, step, where).submit(step, where, expert.name, recipe, ready, i, memory, device)
    found: dict[int, ArtifactRef] = {}
    if masks:
        found = dict(zip(masks, results(masks.values()), strict=True))
        refs["mask"] = list(found.values())
        ready = stages.with_masks(where, ready, found)
    made = [
        one.model_copy(update={"compressed": ref, "masks": found.get(i)})
        for i, (one, ref) in enumerate(zip(sources.experts, refs["compress"], strict=True))
    ]
    return ready, refs, sources.model_copy(update={"experts": tuple(made)})


def _subjects(inputs: MergeInputs, fetched: list[Fetched], merged: Subject) -> dict[str, Subject]:
    """Everything that is scored: base, experts, merged."""
    models = list(fetched)
    subjects = {}
    if inputs.base is not None:
        base = models.pop(0)
        subjects["base"] = Subject(name="base", role="base", path=base.path, digest=base.digest, location=base.resolved)
    for expert, one in zip(inputs.experts, models, strict=True):
        subjects[f"expert/{expert.name}"] = Subject(
            name=expert.name, role="expert", capability=expert.capability, path=one.path, digest=one.digest, location=one.resolved
        )
    return subjects | {"merged": merged}
