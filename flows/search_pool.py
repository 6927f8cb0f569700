"""Trials whose merges and benchmarks run on the GPU pool. The same interface as ``tasks.experiments.search.merge.TrialModels``."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from flows.merge import score_all
from flows.report import merge_label
from flows.steps import missing, send
from ota_core.artifact import ArtifactRef
from ota_core.files.writer import MAX_SHARD_BYTES
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import MergeRecipe
from tasks import stages
from tasks.evaluation.scores import ModelScores
from tasks.jobs import MergeJob
from tasks.merging.sources import MergeSources
from tasks.settings import Places
from tasks.stages import Subject
from tasks.storage.models import Fetched


class PoolModels:
    """Has recipes of one set of inputs merged and scored. Merged models lie among the artifacts, where every worker finds them.

    A model that this search had made is deleted when another recipe is asked for, or at the end; one that was there before stays.
    """

    def __init__(
        self, inputs: MergeInputs, sources: MergeSources, where: Places, *, suite: str, data_dir: str | None, device: str, memory: str,
        deployment: str,
    ) -> None:  # fmt: skip
        self._inputs, self._sources, self._where = inputs, sources, where
        self._suite, self._data_dir, self._device, self._memory, self._deployment = suite, data_dir, device, memory, deployment
        self._recipe: MergeRecipe | None = None
        self._subject: Subject | None = None
        self._made: ArtifactRef | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._drop()

    def score(self, recipe: MergeRecipe, limit: int, name: str, progress: Any = None) -> ModelScores:
        """The merged model's scores on so many documents of each task; those that are known are read. Raises OtaError."""
        subject = self._merged(recipe, name)
        refs = score_all(
            {"merged": subject}, self._suite, self._data_dir, limit, self._where, device=self._device, gpu=self._deployment
        )  # fmt: skip
        return stages.read_scores(self._where, refs["merged"])

    def _merged(self, recipe: MergeRecipe, name: str) -> Subject:
        if self._subject is None or self._recipe != recipe:
            self._drop()
            step = stages.merge_step(recipe, self._inputs)
            ref = stages.store_of(self._where).find("merged", step.fingerprint)
            if ref is None:
                job = MergeJob(
                    step=step, label=merge_label(recipe), recipe=recipe, sources=self._sources, shard_size=MAX_SHARD_BYTES,
                    memory=self._memory,
                )  # fmt: skip
                made: ArtifactRef = missing(send, step, self._where)(step, self._where, job, self._device, self._deployment)
                self._made = ref = made
            self._recipe, self._subject = recipe, stages.merged_subject(self._where, name, ref, benchmark=False)
        return self._subject

    def _drop(self) -> None:
        if self._made is not None:
            stages.store_of(self._where).delete(self._made)
        self._recipe = self._subject = self._made = None


def pool_models(
    recipe: MergeRecipe, inputs: MergeInputs, fetched: Sequence[Fetched], moments: Sequence[ArtifactRef], where: Places, *, suite: str,
    data_dir: str | None, device: str, memory: str, deployment: str,
) -> PoolModels:  # fmt: skip
    """Trials of this recipe on the pool. ``moments``: the experts' second moments as they are merged; empty for a method without."""
    sources = MergeSources.of(recipe, inputs, fetched)
    if moments:
        experts = [one.model_copy(update={"compressed": ref}) for one, ref in zip(sources.experts, moments, strict=True)]
        sources = sources.model_copy(update={"experts": tuple(experts)})
    return PoolModels(
        inputs, sources, where, suite=suite, data_dir=data_dir, device=device, memory=memory, deployment=deployment
    )  # fmt: skip
