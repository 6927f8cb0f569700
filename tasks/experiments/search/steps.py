"""A trial of a search as a Prefect task."""

from statistics import fmean

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from ota_core.recipe.recipe import MergeRecipe
from tasks.experiments.search.merge import Trials
from tasks.experiments.search.search import Point, Search, Trial


@task(name="trial", cache_policy=NO_CACHE, persist_result=False)
def run_trial(tried: Search, point: Point, trials: Trials) -> Trial:
    """Merge one point and score it, on more and more documents while it is good."""
    log = get_run_logger()

    def evaluate(recipe: MergeRecipe, limit: int) -> dict[str, float | None]:
        found = trials.score(recipe, limit, f"trial {point.number}").objective()
        values = {name: value for name, value in found.items() if value is not None}
        shown = ", ".join(f"{name} {100 * value:.1f}" for name, value in values.items())
        log.info("%d documents a task: average %.1f (%s)", limit, 100 * fmean(values.values() or [0.0]), shown)
        return found

    trial = tried.run(point, evaluate)
    below = f", below the floor: {', '.join(trial.shortfall)}" if trial.shortfall else ""
    log.info("%s%s", "complete" if trial.complete else "stopped early", below)
    return trial
