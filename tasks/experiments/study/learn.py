"""Learned scales of a study's cells, as ``ota tune`` learns them, on the validation suite of the study's tune section."""

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.step import Step
from tasks.artifacts.store import BuildResult, store_of
from tasks.compress import compress_jobs
from tasks.experiments.study.cells import Cell
from tasks.experiments.study.found import Models
from tasks.experiments.study.tune import chooses
from tasks.experiments.tune.steps import learn_scales
from tasks.merge import merge_step
from tasks.orchestration.executors import Here

SCALES = "scales.safetensors"
_VERSION = 1
"""Raised when the learning changes, so that what was learned before counts as stale."""


@task(name="learn cell", task_run_name="learn {cell.label}", cache_policy=NO_CACHE, persist_result=False)
def learn_cell(cell: Cell, recipe: MergeRecipe, models: Models, memory: str, device: str) -> tuple[MergeRecipe, dict[str, float]]:
    """One cell on one replicate with its scales: (the recipe that names them, the losses before and after on what was held out).

    What was learned is an artifact: it is read where it is there. Raises OtaError.
    """
    tune, benchmark, where = models.replicate.tune, chooses(models), models.where
    assert tune is not None and cell.learn is not None, "checked with the study"
    config = tune.scales(cell.learn, recipe)
    plan = models.plan(recipe, memory)
    decides = config.model_dump(mode="json", exclude={"recipe", "suite", "data_dir", "test", "test_data_dir", "overlap"})
    inputs = {"merge": merge_step(plan.recipe, plan.inputs).fingerprint, "suite": benchmark.wanted}
    step = Step.of("scales", {"learning": decides, "version": _VERSION}, inputs)

    def build(folder: Path) -> BuildResult:
        # Second moments are compressed once for all steps.
        ready = plan.with_artifacts([Here().run(one, where) for one in compress_jobs(plan)])
        found = learn_scales(ready, config, benchmark, where, device, lambda step: None)
        found.file(recipe).save(folder / SCALES)
        start, kept = found.learned.start.value, found.learned.kept.value
        return BuildResult(results={"step": found.learned.best, "held_out_before": start, "held_out": kept})

    store = store_of(where)
    ref = step.produce(where, build)
    told = store.read_record(ref).results
    get_run_logger().info(
        "step %d: %.4f on what was held out, %.4f before", told["step"], told["held_out"], told["held_out_before"]
    )
    values = {name: float(told[name]) for name in ("step", "held_out_before", "held_out")}
    return recipe.model_copy(update={"scales": str(store.local_path(ref) / SCALES)}), values
