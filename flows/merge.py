"""The main path, top to bottom: fetch → compress → mask → merge → smoke test → benchmark → log; every stage a job that is cached (tasks/job.py).
Second moments that training did not keep are estimated after the fetch, where the recipe asks for it.

With several output files, or another runner than threads, compress, mask and merge are parts that machines share out (flows/part.py).
With a GPU pool, merge and benchmark run there, also when this flow runs on a machine without a GPU.

An output whose files are gone is computed again, alone.
"""

from contextlib import ExitStack
from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.part import merge_in_parts
from ota_core.artifact import ArtifactRef
from ota_core.compute.stream import parse_memory, parse_size
from ota_core.errors import OtaError
from ota_core.recipe.recipe import MergeRecipe
from tasks.analyse import analyse_job, analysis_options, preflight_job
from tasks.benchmark import Benchmark
from tasks.evaluation.subject import merged_subject, subjects_of
from tasks.job import estimates, fetch_models, run_here, run_jobs, score_all, second_moments, smoke_test
from tasks.log import Merged, finish
from tasks.merge import merge_job, output_files
from tasks.merging.labels import merge_label, merge_name
from tasks.merging.recipes import read_recipe
from tasks.merging.sources import Planned, planned
from tasks.orchestration.credentials import block_credentials
from tasks.orchestration.deployed import cancel_children
from tasks.orchestration.executors import Executor, Here, executor_of, gpu_deployment
from tasks.orchestration.run_log import for_users
from tasks.orchestration.runners import Runner, runner_of, several_at_once
from tasks.pages.outcome import MergeOutcome
from tasks.pages.report_page import ReportKind
from tasks.settings import Address, Device, Places, places
from tasks.storage.streaming.streams import Streams
from tasks.tracking.names import REGISTERED_MODEL
from tasks.tracking.registered import check_model_name


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
    tracking_uri: Address | None = None,
    runner: Runner | None = None,
    gpu: str | None = None,
    registered_model: str | None = REGISTERED_MODEL,
    report: ReportKind = "full",
    chat_template: bool | None = None,
    smoke: bool = True,
    ignore_config_differences: list[str] | None = None,
    allow_nonfinite: bool = False,
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
        chat_template: How models are asked where the suite leaves it to them, if that was decided for more models than these.
        ignore_config_differences: Settings of config.json that may differ between the models, beside those that the recipe names.
        smoke: Try the merged model first; one that does not load, generate and end as the base does is not benchmarked.
        allow_nonfinite: Merge infinite numbers and NaN as they are, instead of refusing them.
    """
    if isinstance(recipe, str):
        recipe, folder = read_recipe(recipe)
        recipe_dir = recipe_dir or folder
    recipe = recipe.ignoring(ignore_config_differences).allowing_nonfinite(allow_nonfinite)
    where, runner, gpu = places(home, artifacts), runner or runner_of(), gpu or gpu_deployment()
    runner.task_runner()  # says what is not installed
    if registered_model is not None:
        check_model_name(registered_model)
    budget, file_size = parse_memory(memory), parse_size(shard_size, "shard size", "1KB")
    benchmark = Benchmark.of(suite, data_dir, limit, where, chat_template=chat_template).check() if suite else None
    heavy = executor_of(gpu, device) if benchmark or runner.kind == "threads" else Here(device)

    with ExitStack() as stack:
        # Where nothing here reads a whole model, headers are enough.
        outlines = runner.kind != "threads" and benchmark is None and recipe.estimates is None
        streams = stack.enter_context(Streams(cache=where.cache, memory=budget)) if outlines else None
        fetched = fetch_models(recipe, recipe_dir, where, streams)
        estimated, left = estimates(recipe, fetched, where, recipe_dir, heavy)
        plan = planned(recipe, fetched, where, recipe_dir, memory=memory, streams=streams, estimated=estimated)
        if runner.kind == "threads" and (gpu or len(output_files(recipe, plan.inputs, file_size)) == 1):
            merged, stages = merge_at_once(plan, file_size, where, heavy)
        else:
            merged, stages = merge_in_parts(plan, file_size, where, runner, device)
        stages |= {"estimate": left} if left else {}
        analysis, unanalysed = analysed(plan, where) if report == "full" else (None, "")
        before = preflighted(plan, where) if report == "full" else None

    subjects = subjects_of(plan.inputs, fetched)
    subjects["merged"] = merged_subject(where, merge_label(recipe), merged, benchmark=benchmark is not None and gpu is None)
    tried = smoke_test(subjects, where, heavy) if benchmark and smoke else None
    scores = score_all(subjects, benchmark, where, heavy) if benchmark and (tried is None or tried.passed) else {}
    done = Merged(
        plan=plan, fetched=fetched, subjects=subjects, merged=merged, stages=stages, smoke=tried, scores=scores, documents=benchmark is not None and benchmark.tests.documents, data_dir=data_dir,
        where=where, preflight=before,
    )  # fmt: skip
    return finish(done, report, analysis, unanalysed, registered_model, tracking_uri)


def merge_at_once(
    plan: Planned, file_size: int, where: Places, heavy: Executor
) -> tuple[ArtifactRef, dict[str, list[ArtifactRef]]]:
    """In one job, its second moments compressed and its masks made here before: the merged model, and what each stage before it left."""
    plan, stages = second_moments(plan, where, heavy.device if isinstance(heavy, Here) else "cpu")
    (merged,) = run_jobs([merge_job(plan, file_size)], where, heavy)
    return merged, stages


def analysed(plan: Planned, where: Places) -> tuple[ArtifactRef | None, str]:
    """The analysis of the recipe's experts, or why there is none; of compressions only the recipe's own.

    Comparing all compressions is half of ``ota analyse``'s work, and says nothing of this merge. The merge is valid without an analysis,
    so that one that cannot be made does not end the run.
    """
    own = plan.recipe.setting("compression") if plan.recipe.needs_moments else None
    try:
        options = analysis_options(compressions="-" if own in {None, "none"} else own)
        found = run_here(analyse_job(plan, options), where)
    except OtaError as error:
        get_run_logger().warning("the report goes without an analysis of the experts: %s", error)
        return None, str(error)
    return found, ""


def preflighted(plan: Planned, where: Places) -> ArtifactRef | None:
    """What can be measured of a merge before it is made: MLflow keeps it beside the scores, and later predictions learn from both."""
    if plan.inputs.base is None:
        return None
    try:
        return run_here(preflight_job(plan), where)
    except OtaError as error:
        get_run_logger().warning("the merge is logged without the measures of a preflight: %s", error)
        return None
