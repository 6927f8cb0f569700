"""λ and density of a study's tuned cells, by the same search that ``ota search`` runs, each with the same number of trials.

Methods that add up experts and methods that average them search the same lengths of the step: the range of λ, and the λ of a recipe that
names none, stand for an average and are divided by what the experts' weights add up to where they are summed.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ota_core.artifact import canonical_json
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import NEEDS_MOMENTS, MergeRecipe, parse_recipe
from tasks import stages
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import Suite, load_suite
from tasks.experiments.search.merge import TrialModels
from tasks.experiments.search.overlap import check_apart
from tasks.experiments.search.search import Budget, Range, Space, Tuned, tune
from tasks.experiments.study.found import Models
from tasks.experiments.study.study import TuneConfig
from tasks.settings import Places


def check_splits(models: Models) -> None:
    """Raises SearchError when the validation suite shares documents with the suite that judges, SuiteError for what cannot be loaded."""
    config = models.replicate.tune
    if config is not None:
        data = stages.bring_data(config.data_dir, models.where)
        tests = load_suite(config.suite)
        stages.check_suite(tests, data, config.limit)
        check_apart(tests, data, models.tests, models.data)


class Trials(Protocol):
    """Where trials are merged and scored: ``tasks.experiments.search.merge.TrialModels``, or a pool of workers."""

    def score(self, recipe: MergeRecipe, limit: int, name: str) -> ModelScores: ...


@dataclass(frozen=True)
class Tuning:
    """One tuned cell on one replicate, before its search."""

    recipe: MergeRecipe
    """As the search begins with it."""
    inputs: MergeInputs
    config: TuneConfig
    tests: Suite
    data: Path | None
    space: Space
    identity: str
    """What decides the trials' scores besides their values."""
    key: str
    """Names the merge that is tuned; for temporary folders."""

    def search(self, trials: AbstractContextManager[Trials], folder: Path) -> Tuned:
        """What the search found. One rung: nothing is stopped early, every method has the same number of merges scored on the same documents.

        ``folder`` keeps the trials: a search that is finished is read, one that was interrupted goes on. Raises OtaError.
        """
        config = self.config
        with trials as models:

            def evaluate(candidate: MergeRecipe, limit: int) -> dict[str, float | None]:
                return models.score(candidate, limit, "trial").objective()

            budget = Budget(trials=config.trials, rungs=(config.limit,))
            return tune(self.recipe, self.space, budget, evaluate, seed=config.seed, storage=folder, identity=self.identity)

    def here(self, where: Places, folder: Path, *, device: str, memory: str) -> TrialModels:
        """Trials in this process, with second moments that are compressed once for all of them."""
        return TrialModels(
            _compressed(self.recipe, self.inputs, where, memory), where, folder / f"study-{self.key}.model", suite=self.config.suite,
            tests=self.tests, data=self.data, device=device, memory=memory,
        )  # fmt: skip


def tuning(recipe: MergeRecipe, names: tuple[str, ...], models: Models) -> Tuning:
    """What tuning ``names`` (lambda, density; one density for all experts) of a cell's recipe takes. Raises OtaError."""
    config = models.replicate.tune
    assert config is not None, "checked with the study"
    tests, data = load_suite(config.suite), stages.bring_data(config.data_dir, models.where)
    start = _beginning(recipe) if "lambda" in names else recipe
    inputs = models.inputs_of(start)
    merge = stages.merge_step(start, inputs).fingerprint
    identity = {"merge": merge, "scores": stages.scores_wanted(tests, data, config.limit)}
    return Tuning(
        recipe=start, inputs=inputs, config=config, tests=tests, data=data, space=_space(config, names, recipe),
        identity=canonical_json(identity), key=merge,
    )  # fmt: skip


def chosen(found: Tuned, names: tuple[str, ...]) -> dict[str, float]:
    """The values of the winner; the recipe as given has no density where nothing is masked: that is 1."""
    values = {name: found.best.recipe.setting(name, 0) for name in names}
    return {name: 1.0 if value is None else float(value) for name, value in values.items()}


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
    return parse_recipe(raw, "the start of a search")


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


def _compressed(recipe: MergeRecipe, inputs: MergeInputs, where: Places, memory: str) -> MergeInputs:
    """The inputs with the second moments that all trials read, compressed once."""
    if recipe.merge_method not in NEEDS_MOMENTS:
        return inputs
    experts = []
    for expert in inputs.experts:
        step = stages.moments_step(recipe, expert)
        experts.append(stages.with_compressed(where, expert, stages.compress(where, step, expert, memory=memory)))
    return MergeInputs(base=inputs.base, experts=tuple(experts))
