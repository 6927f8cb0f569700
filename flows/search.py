"""A search for the densities and λ of a recipe: base and experts scored once, then trial by trial merged, scored, reported, logged.

What is searched, how, and how far: tasks/experiments/search/config.py. An interrupted run goes on with the trial that it had begun.
"""

from contextlib import ExitStack
from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.merge import merge_flow
from ota_core.compute.stream import parse_memory
from ota_core.errors import OtaError
from ota_core.frozen import Frozen
from tasks.benchmark import Benchmark
from tasks.evaluation.in_memory import few_threads
from tasks.evaluation.subject import subjects_of
from tasks.experiments.live import Live
from tasks.experiments.search.config import SearchConfig, load_search, recipe_of
from tasks.experiments.search.log import search_run, whole, with_trials
from tasks.experiments.search.merge import Trials
from tasks.experiments.search.overlap import check_apart
from tasks.experiments.search.references import floors_at, identity_of
from tasks.experiments.search.result import files, markdown, recipe_text, verdict
from tasks.experiments.search.search import Budget, Search, Tuned
from tasks.experiments.search.steps import run_trial
from tasks.job import estimates, fetch_models, second_moments
from tasks.merge import output_files
from tasks.merging.labels import merge_label, merge_name
from tasks.merging.sources import Planned, planned
from tasks.orchestration.budget_bar import BudgetBar
from tasks.orchestration.deployed import cancel_children
from tasks.orchestration.executors import executor_of, gpu_deployment
from tasks.orchestration.run_log import for_users
from tasks.orchestration.runners import several_at_once
from tasks.orchestration.shown import show_markdown, show_mlflow
from tasks.pages.outcome import MergeOutcome
from tasks.settings import Address, Device, places
from tasks.storage.models import write_note
from tasks.tracking.merge import LoggedRun
from tasks.tracking.store import resolve_store
from tasks.tracking.write import fails_with


class SearchOutcome(Frozen):
    """What a search led to."""

    tuned: Tuned
    recipe: str
    """The winner's recipe as YAML."""
    test: MergeOutcome | None
    """The winner on the suite that judges it."""
    logged: LoggedRun


def _run_name() -> str:
    given = flow_run.parameters["search"]
    try:
        if isinstance(given, str):
            return f"search {Path(given).stem}"
        recipe = SearchConfig.model_validate(given).recipe
        return f"search {Path(recipe).stem if isinstance(recipe, str) else merge_name(recipe)}"
    except (OtaError, ValueError):
        return "search"  # the flow says what is wrong with it


@for_users
@flow(
    name="search", flow_run_name=_run_name, task_runner=several_at_once(), persist_result=False,
    on_cancellation=[cancel_children], on_crashed=[cancel_children],
)  # fmt: skip
def search_flow(
    search: SearchConfig | str,
    out: str | None = None,
    device: Device = "auto",
    memory: str = "2GiB",
    recipe_dir: Path | None = None,
    home: Path | None = None,
    artifacts: str | None = None,
    tracking_uri: Address | None = None,
    gpu: str | None = None,
) -> SearchOutcome:
    """Find the densities and λ with the best average under a floor for each capability, within a budget of evaluations.

    Args:
        search: The search, or where its YAML lies (s3://… or a file).
        out: Where to write the winner's recipe, a file or s3://…; it is kept in MLflow in any case.
        device: What to compute on; auto: cuda where there is one.
        memory: Budget of each merge.
        recipe_dir: Folder that relative paths of a recipe start from that is given as such.
        home: Folder for artifacts, caches, trials and the embedded MLflow; OTA_HOME or ~/.ota by default.
        artifacts: Root of the artifacts, a folder or s3://…, if not in home.
        tracking_uri: MLflow server; MLFLOW_TRACKING_URI or the embedded database by default.
        gpu: Deployment that merges and benchmarks are sent to; OTA_GPU_DEPLOYMENT, or none: they run in this process.
    """
    config = load_search(search) if isinstance(search, str) else search
    recipe, folder = recipe_of(config)
    recipe_dir = recipe_dir or folder
    where, gpu = places(home, artifacts), gpu or gpu_deployment()
    executor = executor_of(gpu, device)
    parse_memory(memory)
    benchmark = Benchmark.of(config.suite, config.data_dir, None, where).check()
    test_data_dir = config.test_data_dir or config.data_dir
    if config.test:
        judge = Benchmark.of(config.test, test_data_dir, None, where).check()
        check_apart(benchmark.tests, benchmark.data, judge.tests, judge.data, config.overlap)

    fetched = fetch_models(recipe, recipe_dir, where)
    estimated, _ = estimates(recipe, fetched, where, recipe_dir, executor)
    plan = planned(recipe, fetched, where, recipe_dir, memory=memory, estimated=estimated)
    output_files(recipe, plan.inputs, 2**62)  # what is wrong with the checkpoints, before anything is scored
    plan, _ = second_moments(plan, where, device, masks=False)  # every trial reads these
    subjects = subjects_of(plan.inputs, fetched)
    benchmark = benchmark.asked_alike(subjects.values())

    searches = where.home / "searches"
    tried = Search(
        recipe, config.space, config.budget, floors=lambda limit: floors_at(limit, config, benchmark, subjects, where, executor), seed=config.seed, storage=searches,
        identity=identity_of(plan, benchmark), names=[expert.name for expert in plan.inputs.experts],
    )  # fmt: skip
    store = resolve_store(tracking_uri=tracking_uri, root=where.tracking)
    with ExitStack() as stack:
        stack.enter_context(tried)
        stack.enter_context(few_threads(plan.inputs.models[0].path))
        trials = stack.enter_context(Trials(plan, benchmark, where, executor))
        run_id = str(flow_run.id) if flow_run.id else None
        known = search_run(_run_name(), tried.name, _params(config, plan, tried, benchmark), run_id)
        live = Live(known.name, store)
        # With the trials of an earlier process, which may have ended between a trial and its run in MLflow.
        live.log(with_trials(known, tried.result(), tried.trials) if tried.trials else known)
        stack.push(fails_with(live.fail))
        bar = stack.enter_context(BudgetBar("search"))
        if tried.trials:
            bar.begin(_spent(config.budget, tried.result())[0])
        while (point := tried.ask()) is not None:
            trial = run_trial.with_options(task_run_name=f"trial {point.number}: {merge_label(point.recipe)}"[:200])(
                tried, point, trials
            )
            found = tried.result()
            live.log_patiently(with_trials(known, found, [trial]), f"trial {trial.number}")
            bar.show(*_spent(config.budget, found))
        tuned = tried.result().model_copy(update={"likelihoods": tuple(benchmark.tests.losses)})
        text = recipe_text(tuned, config, recipe_dir, out or "")
        if out:
            write_note(out, text)
        show_markdown("search", markdown(tuned), "Best trials")
        (get_run_logger().info if tuned.feasible else get_run_logger().warning)(verdict(tuned))
        logged = live.finish(whole(known, tuned, files(tuned, tried.dimensions, text, known.name)), where, tracking_uri)

    show_mlflow(known.name, logged.url)
    test = None
    if config.test:
        test = merge_flow(
            tuned.best.recipe, suite=config.test, data_dir=test_data_dir, device=device, memory=memory, recipe_dir=recipe_dir, home=home,
            artifacts=artifacts, tracking_uri=tracking_uri, gpu=gpu,
        )  # fmt: skip
    return SearchOutcome(tuned=tuned, recipe=text, test=test, logged=logged)


def _spent(budget: Budget, found: Tuned) -> tuple[float, str]:
    """Percent of the budget that is spent, and what came of it so far."""
    parts = [found.evaluations / budget.evaluations if budget.evaluations else 0.0]
    parts.append(len(found.trials) / budget.trials if budget.trials else 0.0)
    text = f"{len(found.trials)} trials; best average {100 * found.best.average:.1f} (trial {found.best.number})"
    return 100 * min(max(parts), 1.0), text


def _params(config: SearchConfig, plan: Planned, tried: Search, benchmark: Benchmark) -> dict[str, str | int | float]:
    recipe = plan.recipe
    params: dict[str, str | int | float] = {
        "merge_method": recipe.merge_method, "base_model": recipe.base_model or "none", "suite": config.suite, "seed": config.seed,
        "experts": ",".join(expert.name for expert in plan.inputs.experts), "rungs": ",".join(map(str, tried.rungs)),
        "space": ", ".join(f"{one.name} {one.within}" for one in tried.dimensions) or "nothing",
        "floor": ", ".join(f"{key} {value}" for key, value in config.floor.items()),
    }  # fmt: skip
    if benchmark.tests.losses:  # what score/… of this run and of its trials is then
        params["likelihood_of_a_byte"] = ",".join(benchmark.tests.losses)
    return params
