"""What a study's merges led to, read from the artifacts: a cell that is there needs no flow run to be known."""

import math
from pathlib import Path
from statistics import fmean

from ota_core.artifact import ArtifactRef
from ota_core.errors import ArtifactError
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import NEEDS_MOMENTS, MergeRecipe
from tasks.artifacts.store import store_of
from tasks.benchmark import Benchmark
from tasks.compress import moments_step
from tasks.evaluation.gradients.job import EstimateJob, estimate_jobs
from tasks.evaluation.kept import read_scores
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.subject import merged_subject, subjects_of
from tasks.experiments.study.scores import CellResult
from tasks.experiments.study.study import Replicate
from tasks.merge import merge_step
from tasks.merging.composed import locate
from tasks.merging.inputs import assemble, fetch_all
from tasks.merging.sources import Planned, planned
from tasks.orchestration.executors import Executor
from tasks.settings import Places
from tasks.storage.models import Fetched


class Models:
    """One replicate's base and experts on this machine, and its suite: fetched and hashed once for all cells."""

    def __init__(self, replicate: Replicate, limit: int | None, where: Places, recipe_dir: Path | None) -> None:
        """Raises OtaError for models, suite or data that cannot be had."""
        self.replicate, self.limit, self.where, self.recipe_dir = replicate, limit, where, recipe_dir
        self.benchmark = Benchmark.of(replicate.suite, replicate.data_dir, limit, where).check()
        whole = MergeRecipe(merge_method="linear", base_model=replicate.base_model, models=replicate.models)
        fetched = fetch_all(whole, cache=where.cache, recipe_dir=recipe_dir)
        self._fetched = {one.source: one for one in fetched}
        self.inputs = assemble(whole, fetched, cache=where.cache, recipe_dir=recipe_dir)
        self.subjects = subjects_of(self.inputs, fetched)
        """Base and experts as something to benchmark."""
        self.benchmark = self.benchmark.asked_alike(self.subjects.values())

    def fetched(self, recipe: MergeRecipe) -> list[Fetched]:
        """Base and experts of a merge of some of these models, as they lie on this machine."""
        named = [*([recipe.base_model] if recipe.base_model else []), *(entry.model for entry in recipe.models)]
        return [self._fetched[self._source(source)] for source in named]

    def inputs_of(self, recipe: MergeRecipe) -> MergeInputs:
        """The inputs of a merge of some of these models; second moments that are yet to be estimated are missing."""
        fetched = self.fetched(recipe)
        estimated = {
            i: job.located(ref, self.where) if ref else None for i, (job, ref) in self._estimates(recipe, fetched).items()
        }
        return assemble(recipe, fetched, cache=self.where.cache, recipe_dir=self.recipe_dir, estimated=estimated)

    def plan(self, recipe: MergeRecipe, memory: str, executor: Executor) -> Planned:
        """A merge of some of these models, with second moments estimated where the recipe asks for it: in a task. Raises OtaError."""
        fetched = self.fetched(recipe)
        estimated = {
            i: job.located(ref or executor.run(job, self.where), self.where)
            for i, (job, ref) in self._estimates(recipe, fetched).items()
        }
        return planned(recipe, fetched, self.where, self.recipe_dir, memory=memory, estimated=estimated)

    def _estimates(self, recipe: MergeRecipe, fetched: list[Fetched]) -> dict[int, tuple[EstimateJob, ArtifactRef | None]]:
        jobs = estimate_jobs(recipe, fetched, self.where, self.recipe_dir)
        return {i: (job, job.find(self.where)) for i, job in jobs.items()}

    def find(self, recipe: MergeRecipe) -> tuple[str, ModelScores] | None:
        """(fingerprint of the merge, its scores) where both are there. The merged model must be there as well: its digest names the scores."""
        store = store_of(self.where)
        inputs = self.inputs_of(recipe)
        if recipe.estimates is not None and any(expert.moments is None for expert in inputs.experts):
            return None
        merged = store.find("merged", merge_step(recipe, inputs).fingerprint)
        if merged is None:
            return None
        digest = merged_subject(self.where, "", merged, benchmark=False).digest
        scores = store.find("scores", self.benchmark.step(digest).fingerprint)
        return None if scores is None else (merged.fingerprint, read_scores(self.where, scores))

    def result(self, label: str, recipe: MergeRecipe, chosen: dict[str, float] | None = None) -> CellResult:
        """A cell that was merged and scored. Raises ArtifactError when it was not, or is gone again."""
        found = self.find(recipe)
        if found is None:
            raise ArtifactError(f"{label}: its scores are not among the artifacts at {self.where.artifacts}; run the study again")
        bytes_per_param, sqrt_error = self._moments(recipe)
        return CellResult(
            label=label, replicate=self.replicate.name, scores=found[1], merge=found[0], bytes_per_param=bytes_per_param, sqrt_error=sqrt_error,
            chosen=chosen or {},
        )  # fmt: skip

    def _moments(self, recipe: MergeRecipe) -> tuple[float, float]:
        """(mean bytes per parameter, largest relative error of √v) of the second moments as merged; NaN without any."""
        if recipe.merge_method not in NEEDS_MOMENTS:
            return math.nan, math.nan
        store = store_of(self.where)
        steps = [moments_step(recipe, expert) for expert in self.inputs_of(recipe).experts]
        refs = [store.find("moments", step.fingerprint) for step in steps]
        records = [store.read_record(ref).results for ref in refs if ref is not None]
        if len(records) < len(refs):
            return math.nan, math.nan
        return fmean(record["bytes_per_param"] for record in records), max(record["sqrt_error"] for record in records)

    def _source(self, source: str) -> str:
        return source if source in self._fetched else locate(source, self.recipe_dir)
