"""λ and density of a study's tuned cells, by the same search that ``ota search`` runs, each with the same number of trials."""

from pathlib import Path

from ota_core.artifact import canonical_json
from ota_core.inputs import MergeInputs
from ota_core.recipe import NEEDS_MOMENTS, MergeRecipe
from tasks import stages
from tasks.search import Budget, Space, Tuned, tune
from tasks.search_merge import TrialModels
from tasks.search_overlap import check_apart
from tasks.settings import Places
from tasks.study import TuneConfig
from tasks.study_found import Models
from tasks.suites import load_suite


def check_splits(models: Models) -> None:
    """Raises SearchError when the validation suite shares documents with the suite that judges, SuiteError for what cannot be loaded."""
    config = models.replicate.tune
    if config is not None:
        data = stages.bring_data(config.data_dir, models.where)
        tests = load_suite(config.suite)
        stages.check_suite(tests, data, config.limit)
        check_apart(tests, data, models.tests, models.data)


def tuned(recipe: MergeRecipe, names: tuple[str, ...], models: Models, folder: Path, *, device: str, memory: str) -> Tuned:
    """What a search for ``names`` (lambda, density; one density for all experts) found on the validation suite of the replicate.

    One rung: nothing is stopped early, every method has the same number of merges scored on the same documents. ``folder`` keeps the
    trials: a search that is finished is read, one that was interrupted goes on. Raises OtaError.
    """
    config = models.replicate.tune
    assert config is not None, "checked with the study"
    tests, data = load_suite(config.suite), stages.bring_data(config.data_dir, models.where)
    inputs = models.inputs_of(recipe)
    identity = {
        "merge": stages.merge_step(recipe, inputs).fingerprint,
        "scores": stages.scores_wanted(tests, data, config.limit),
    }
    ready = _compressed(recipe, inputs, models.where, memory)
    with TrialModels(
        ready, models.where, folder / f"study-{identity['merge']}.model", suite=config.suite, tests=tests, data=data, device=device,
        memory=memory,
    ) as trials:  # fmt: skip

        def evaluate(candidate: MergeRecipe, limit: int) -> dict[str, float | None]:
            return trials.score(candidate, limit, "trial").objective()

        budget = Budget(trials=config.trials, rungs=(config.limit,))
        return tune(
            recipe, _space(config, names), budget, evaluate, seed=config.seed, storage=folder, identity=canonical_json(identity)
        )  # fmt: skip


def chosen(found: Tuned, names: tuple[str, ...]) -> dict[str, float]:
    """The values of the winner; the recipe as given has no density where nothing is masked: that is 1."""
    values = {name: found.best.recipe.setting(name, 0) for name in names}
    return {name: 1.0 if value is None else float(value) for name, value in values.items()}


def _space(config: TuneConfig, names: tuple[str, ...]) -> Space:
    return Space.model_validate(
        {
            "per_expert": False,
            "density": config.density if "density" in names else None,
            "lambda": config.lambda_ if "lambda" in names else None,
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
