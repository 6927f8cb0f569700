"""λ and density of a study's tuned cells, by the same search that ``ota search`` runs, each with the same number of trials."""

from collections.abc import Callable
from pathlib import Path

from ota_core.recipe import MergeRecipe
from tasks.search import Budget, Range, Space, tune
from tasks.study import TuneConfig

Evaluate = Callable[[MergeRecipe, int], dict[str, float | None]]


def tuned(
    recipe: MergeRecipe, names: tuple[str, ...], config: TuneConfig, evaluate: Evaluate, *, storage: Path, identity: str
) -> tuple[MergeRecipe, dict[str, float]]:
    """(the recipe with what was best on the validation suite, those values by name) of ``names``: lambda, density.

    One density for all experts. ``evaluate``: a recipe's scores on the validation suite with so many documents a task. A search that
    is finished is read from ``storage``; ``identity`` names models, suite and data. Raises SearchError, and what ``evaluate`` raises.
    """
    space = Space.model_validate(
        {
            "per_expert": False,
            "density": Range(low=config.density[0], high=config.density[1], log=True) if "density" in names else None,
            "lambda": Range(low=config.lambda_[0], high=config.lambda_[1]) if "lambda" in names else None,
        }
    )
    # One rung: nothing is stopped early, every method has the same number of merges scored on the same documents.
    budget = Budget(trials=config.trials, rungs=(config.limit,))
    best = tune(recipe, space, budget, evaluate, seed=config.seed, storage=storage, identity=identity).best
    if best.origin != "recipe":
        return best.recipe, dict(best.values)
    kept = {name: recipe.setting(name, 0) for name in names}
    values = {name: 1.0 if value is None else float(value) for name, value in kept.items()}
    return recipe, values
