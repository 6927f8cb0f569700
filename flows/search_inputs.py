"""What a search measures its trials by, and with: scores of base and experts, compressed second moments, where trials are merged."""

from pathlib import Path

from flows.merge import score_all
from flows.search_pool import PoolModels, pool_models
from flows.spread import results
from flows.steps import compress, missing
from ota_core.artifact import ArtifactRef, canonical_json
from ota_core.merge.engine import pick_device
from ota_core.plan.inputs import ExpertInput, MergeInputs
from ota_core.recipe.recipe import NEEDS_MOMENTS, MergeRecipe
from tasks import stages
from tasks.evaluation.suites import Suite
from tasks.experiments.search.config import SearchConfig, floors_of
from tasks.experiments.search.merge import TrialModels
from tasks.settings import Places
from tasks.stages import Subject
from tasks.storage.models import Fetched


class References:
    """Scores of base and experts, each measured once for every number of documents that is asked for."""

    def __init__(
        self, config: SearchConfig, tests: Suite, inputs: MergeInputs, fetched: list[Fetched], where: Places, *, device: str, gpu: str | None
    ) -> None:  # fmt: skip
        self._config, self._tests, self._where, self._device, self._gpu = config, tests, where, device, gpu
        models = [*([inputs.base] if inputs.base else []), *inputs.experts]
        self._subjects = [
            Subject(
                name=model.name, role="expert" if isinstance(model, ExpertInput) else "base", capability=getattr(model, "capability", None),
                path=one.path, digest=one.digest, location=one.resolved,
            )
            for model, one in zip(models, fetched, strict=True)
        ]  # fmt: skip

    def floors(self, limit: int) -> dict[str, float]:
        """The floors as measured on so many documents. On fewer than all, only those models are scored that floors refer to."""
        wanted, last = self._config.floors(), limit == self._config.budget.rungs[-1]
        kinds = {one.kind for one in wanted.values()}
        models = {f"{one.role}/{one.name}": one for one in self._subjects if last or one.role in kinds}
        refs = score_all(
            models, self._config.suite, self._config.data_dir, limit, self._where, device=self._device, gpu=self._gpu
        )
        found = {key: stages.read_scores(self._where, ref) for key, ref in refs.items()}
        experts = {one.name: (one.capability or one.name, found[key]) for key, one in models.items() if one.role == "expert"}
        return floors_of(wanted, self._tests.capabilities, found.get("base/base"), experts)


def compressed(recipe: MergeRecipe, inputs: MergeInputs, where: Places, memory: str) -> list[ArtifactRef]:
    """The experts' second moments, compressed, each a cached task: every trial reads these. Empty for a method without."""
    if recipe.merge_method not in NEEDS_MOMENTS:
        return []
    steps = [stages.moments_step(recipe, expert) for expert in inputs.experts]
    return results(
        missing(compress, step, where).submit(step, where, expert, memory) for step, expert in zip(steps, inputs.experts, strict=True)
    )  # fmt: skip


def models_of(
    config: SearchConfig, recipe: MergeRecipe, inputs: MergeInputs, fetched: list[Fetched], moments: list[ArtifactRef], where: Places, *,
    folder: Path, tests: Suite, data: Path | None, device: str, memory: str, gpu: str | None,
) -> TrialModels | PoolModels:  # fmt: skip
    """Where trials are merged and scored: in this process, in ``folder``, or on the GPU pool. ``moments``: of ``compressed``."""
    if gpu:
        return pool_models(
            recipe, inputs, fetched, moments, where, suite=config.suite, data_dir=config.data_dir, device=device, memory=memory, deployment=gpu
        )  # fmt: skip
    ready = inputs.experts
    if moments:
        ready = tuple(stages.with_compressed(where, expert, ref) for expert, ref in zip(inputs.experts, moments, strict=True))
    return TrialModels(
        MergeInputs(base=inputs.base, experts=ready), where, folder, suite=config.suite, tests=tests, data=data,
        device=pick_device(device), memory=memory,
    )  # fmt: skip


def identity_of(recipe: MergeRecipe, inputs: MergeInputs, tests: Suite, data: Path | None) -> str:
    """What decides a trial's scores besides its values: the models, the method's other settings, suite and data, and what of it counts."""
    identity = {"merge": stages.merge_step(recipe, inputs).fingerprint, "scores": stages.scores_wanted(tests, data, None)}
    # Trials that were measured by right answers alone do not compare.
    return canonical_json(identity | ({"objective": "likelihood of a byte"} if tests.losses else {}))
