"""Scales of a recipe learned by gradient on validation documents: one coefficient for each expert and tensor, layer, role, or for all.

What is learned, from what and towards what: tasks/experiments/tune/config.py and docs/methods.md. Everything runs in this flow's own
process; its deployment is one of the GPU pool.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.merge import merge_flow
from ota_core.compute.stream import parse_memory, pick_device
from ota_core.errors import OtaError
from ota_core.frozen import Frozen
from tasks.benchmark import Benchmark
from tasks.evaluation.subject import subjects_of
from tasks.experiments.live import Live
from tasks.experiments.search.overlap import check_apart
from tasks.experiments.tune.config import ScalesConfig, load_tuning, recipe_of
from tasks.experiments.tune.learn import Learned
from tasks.experiments.tune.log import tune_run, whole, with_steps
from tasks.experiments.tune.result import files, markdown, verdict, write_result
from tasks.experiments.tune.steps import learn_scales
from tasks.job import estimates, fetch_models, second_moments
from tasks.merge import output_files
from tasks.merging.labels import merge_name
from tasks.merging.recipes import read_recipe
from tasks.merging.sources import Planned, planned
from tasks.orchestration.deployed import cancel_children
from tasks.orchestration.executors import Here
from tasks.orchestration.run_log import for_users
from tasks.orchestration.runners import several_at_once
from tasks.orchestration.shown import show_markdown, show_mlflow
from tasks.pages.outcome import MergeOutcome
from tasks.settings import Address, Device, places
from tasks.tracking.merge import LoggedRun
from tasks.tracking.store import resolve_store
from tasks.tracking.write import fails_with


class TuneOutcome(Frozen):
    """What a tuning led to."""

    learned: Learned
    recipe: str
    """The recipe with its scales as YAML."""
    test: MergeOutcome | None
    """The merge with them on the suite that judges it."""
    logged: LoggedRun


def _run_name() -> str:
    given = flow_run.parameters["tune"]
    try:
        if isinstance(given, str):
            return f"tune {Path(given).stem}"
        recipe = ScalesConfig.model_validate(given).recipe
        return f"tune {Path(recipe).stem if isinstance(recipe, str) else merge_name(recipe)}"
    except (OtaError, ValueError):
        return "tune"  # the flow says what is wrong with it


@for_users
@flow(
    name="tune", flow_run_name=_run_name, task_runner=several_at_once(), persist_result=False,
    on_cancellation=[cancel_children], on_crashed=[cancel_children],
)  # fmt: skip
def tune_flow(
    tune: ScalesConfig | str,
    out: str,
    device: Device = "auto",
    memory: str = "2GiB",
    recipe_dir: Path | None = None,
    home: Path | None = None,
    artifacts: str | None = None,
    tracking_uri: Address | None = None,
) -> TuneOutcome:
    """Learn by what each expert's part of a merged edit is to be multiplied, by gradient on validation documents.

    Args:
        tune: The tuning, or where its YAML lies (s3://… or a file).
        out: Where to write the recipe with the scales, a file or s3://…; the file of scales goes beside it.
        device: What to compute on; auto: cuda where there is one.
        memory: Budget of the merge, and as much again for the parts of the edit that are kept between steps; the model comes on top.
        recipe_dir: Folder that relative paths of a recipe start from that is given as such.
        home: Folder for artifacts, caches and the embedded MLflow; OTA_HOME or ~/.ota by default.
        artifacts: Root of the artifacts, a folder or s3://…, if not in home.
        tracking_uri: MLflow server; MLFLOW_TRACKING_URI or the embedded database by default.
    """
    config = load_tuning(tune) if isinstance(tune, str) else tune
    recipe, folder = recipe_of(config)
    recipe_dir = recipe_dir or folder
    where, log = places(home, artifacts), get_run_logger()
    parse_memory(memory)
    pick_device(device)
    benchmark = Benchmark.of(config.suite, config.data_dir, None, where).check()
    test_data_dir = config.test_data_dir or config.data_dir
    if config.test:
        judge = Benchmark.of(config.test, test_data_dir, None, where).check()
        check_apart(benchmark.tests, benchmark.data, judge.tests, judge.data, config.overlap)

    fetched = fetch_models(recipe, recipe_dir, where)
    estimated, _ = estimates(recipe, fetched, where, recipe_dir, Here(device))
    plan = planned(recipe, fetched, where, recipe_dir, memory=memory, estimated=estimated)
    output_files(recipe, plan.inputs, 2**62)  # what is wrong with the checkpoints, before anything is computed
    plan, _ = second_moments(plan, where, device, masks=False)
    benchmark = benchmark.asked_alike(subjects_of(plan.inputs, fetched).values())
    store = resolve_store(tracking_uri=tracking_uri, root=where.tracking)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ota-tune-")))
        known = tune_run(_run_name(), _params(config, plan), str(flow_run.id) if flow_run.id else None)
        live = Live(known.name, store)
        live.log(known)
        stack.push(fails_with(live.fail))
        found = learn_scales(plan, config, benchmark, where, device, lambda step: live.log(with_steps(known, [step])))
        text = write_result(found, recipe, config, recipe_dir, out, scratch)
        for note in found.notes:
            log.info("%s", note)
        show_markdown("tune", markdown(found.learned), "Learned scales")
        (log.info if found.learned.best else log.warning)(verdict(found.learned))
        held = files(found, text, known.name) | {"scales.safetensors": (scratch / "scales.safetensors").read_bytes()}
        logged = live.finish(whole(known, found.learned, held, out), where, tracking_uri)

    show_mlflow(known.name, logged.url)
    test = None
    if config.test:
        tuned, beside = read_recipe(out)
        test = merge_flow(
            tuned, suite=config.test, data_dir=test_data_dir, device=device, memory=memory, recipe_dir=beside, home=home, artifacts=artifacts,
            tracking_uri=tracking_uri,
        )  # fmt: skip
    return TuneOutcome(learned=found.learned, recipe=text, test=test, logged=logged)


def _params(config: ScalesConfig, plan: Planned) -> dict[str, str | int | float]:
    recipe = plan.recipe
    said = config.model_dump(
        mode="json",
        include={"per", "objective", "suite", "steps", "batch", "blocks", "held_out", "length", "rate", "penalty", "seed"},
    )
    names = ",".join(expert.name for expert in plan.inputs.experts)
    return said | {"merge_method": recipe.merge_method, "base_model": recipe.base_model or "none", "experts": names}
