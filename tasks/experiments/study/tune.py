"""λ and density of a study's tuned cells, by the same search that ``ota search`` runs, each with the same number of trials.

Methods that add up experts and methods that average them search the same lengths of the step: the range of λ, and the λ of a recipe that
names none, stand for an average and are divided by what the experts' weights add up to where they are summed.
"""

import math

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ota_core.artifact import canonical_json
from ota_core.recipe.recipe import MergeRecipe, parse_recipe
from tasks.benchmark import Benchmark
from tasks.compress import compress_jobs
from tasks.experiments.search.merge import Trials
from tasks.experiments.search.overlap import check_apart
from tasks.experiments.search.search import Budget, Range, Search, Space, tune
from tasks.experiments.study.cells import Cell
from tasks.experiments.study.found import Models
from tasks.experiments.study.study import TuneConfig
from tasks.merge import merge_step
from tasks.orchestration.executors import Executor, Here


@task(name="tune", task_run_name="tune {cell.label}", cache_policy=NO_CACHE, persist_result=False)
def tune_cell(
    cell: Cell, recipe: MergeRecipe, models: Models, executor: Executor, memory: str
) -> tuple[MergeRecipe, dict[str, float]]:
    """λ and density of one cell on one replicate, by the validation suite: (recipe with the best, their values).

    One rung: nothing is stopped early, every method has the same number of merges scored on the same documents. The trials are kept: a
    search that is finished is read, one that was interrupted goes on. Raises OtaError.
    """
    config, benchmark, where = models.replicate.tune, chooses(models), models.where
    assert config is not None, "checked with the study"
    plan = models.plan(_beginning(recipe) if "lambda" in cell.tune else recipe, memory, executor)
    merge = merge_step(plan.recipe, plan.inputs).fingerprint
    # Second moments are compressed once for all trials.
    plan = plan.with_artifacts([Here().run(one, where) for one in compress_jobs(plan)])
    folder = where.home / "searches"
    search = Search(
        plan.recipe, _space(config, cell.tune, recipe), Budget(trials=config.trials, rungs=(config.limit,)), seed=config.seed,
        storage=folder, identity=canonical_json({"merge": merge, "scores": benchmark.wanted}),
    )  # fmt: skip
    with Trials(plan, benchmark, where, executor) as trials:
        found = tune(search, lambda candidate, limit: trials.score(candidate, limit, "trial").objective())
    # The recipe as given has no density where nothing is masked: that is 1.
    best = {name: found.best.recipe.setting(name, 0) for name in cell.tune}
    values = {name: 1.0 if value is None else float(value) for name, value in best.items()}
    get_run_logger().info("%d trials; best: %s", len(found.trials), ", ".join(f"{k} {v:g}" for k, v in values.items()))
    return found.best.recipe, values


def check_splits(models: Models) -> None:
    """Raises SearchError when the validation suite shares documents with the suite that judges, SuiteError for what cannot be loaded."""
    if models.replicate.tune is not None:
        trials, judges = chooses(models), models.benchmark
        check_apart(trials.tests, trials.data, judges.tests, judges.data, models.replicate.tune.overlap)


def chooses(models: Models) -> Benchmark:
    """What trials are scored on, and scales are learned from."""
    config = models.replicate.tune
    assert config is not None, "checked with the study"
    return Benchmark.of(config.suite, config.data_dir, config.limit, models.where).check().asked_alike(models.subjects.values())


def _summed(recipe: MergeRecipe) -> float:
    """What the experts' weights add up to where a method sums what they weigh; 1 where it averages."""
    total = math.fsum(recipe.setting("weight", i) for i in range(len(recipe.models))) if recipe.adds_up else 1.0
    return total if total > 0 else 1.0


def _beginning(recipe: MergeRecipe) -> MergeRecipe:
    """The recipe with the λ of an average, where it adds up and names no λ."""
    summed = _summed(recipe)
    if summed == 1 or recipe.parameters.lambda_ is not None:
        return recipe
    raw = recipe.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    raw["parameters"] = {**raw.get("parameters", {}), "lambda": float(f"{1 / summed:.4g}")}
    return parse_recipe(raw, "the start of a search", strict=True)


def _space(config: TuneConfig, names: tuple[str, ...], recipe: MergeRecipe) -> Space:
    summed, step = _summed(recipe), config.lambda_
    scaled = Range(low=step.low / summed, high=step.high / summed, log=step.log)
    return Space.model_validate(
        {
            "per_expert": False,
            "density": config.density if "density" in names else None,
            "lambda": scaled if "lambda" in names else None,
        }
    )
