"""What a study's merges led to, read from the artifacts: a cell that is there needs no flow run to be known."""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from ota_core.artifact import ArtifactRef, fingerprint
from ota_core.errors import ArtifactError
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import NEEDS_MOMENTS, MergeRecipe
from tasks import stages
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import digest_data, kept_identity, load_suite
from tasks.experiments.study.scores import CellResult
from tasks.experiments.study.study import Replicate
from tasks.merging.inputs import fetch_all, locate
from tasks.settings import Places
from tasks.stages import Subject
from tasks.storage.models import Fetched


class Models:
    """One replicate's base and experts on this machine, and its suite: fetched and hashed once for all cells."""

    def __init__(self, replicate: Replicate, limit: int | None, where: Places, recipe_dir: Path | None) -> None:
        """Raises OtaError for models, suite or data that cannot be had."""
        self.replicate, self.limit, self.where, self.recipe_dir = replicate, limit, where, recipe_dir
        self.tests = load_suite(replicate.suite)
        self.data = stages.bring_data(replicate.data_dir, where)
        stages.check_suite(self.tests, self.data, limit)
        whole = MergeRecipe(merge_method="linear", base_model=replicate.base_model, models=replicate.models)
        fetched = fetch_all(whole, cache=where.cache, recipe_dir=recipe_dir)
        self._fetched = {one.source: one for one in fetched}
        self.inputs = stages.inputs_of(whole, fetched, where, recipe_dir)
        self._data_digest = digest_data(self.data) if self.data else None

    def subjects(self) -> dict[str, Subject]:
        """Base and experts as something to benchmark, as the merge flow calls them."""
        assert self.inputs.base is not None
        models: list[tuple[str, str, Any]] = [("base", "base", self.inputs.base)]
        models += [(f"expert/{one.name}", "expert", one) for one in self.inputs.experts]
        return {
            key: Subject(
                name=one.name, role=role, capability=getattr(one, "capability", None), path=one.path, digest=one.digest,
                location=self._fetched[self._source(one.source)].resolved,
            )
            for key, role, one in models
        }  # fmt: skip

    def fetched(self, recipe: MergeRecipe) -> list[Fetched]:
        """Base and experts of a merge of some of these models, as they lie on this machine."""
        named = [*([recipe.base_model] if recipe.base_model else []), *(entry.model for entry in recipe.models)]
        return [self._fetched[self._source(source)] for source in named]

    def inputs_of(self, recipe: MergeRecipe) -> MergeInputs:
        """The inputs of a merge of some of these models."""
        return stages.inputs_of(recipe, self.fetched(recipe), self.where, self.recipe_dir)

    def find(self, recipe: MergeRecipe) -> tuple[str, ModelScores] | None:
        """(fingerprint of the merge, its scores) where both are there. The merged model must be there as well: its digest names the scores."""
        store = stages.store_of(self.where)
        merged = store.find("merged", stages.merge_step(recipe, self.inputs_of(recipe)).fingerprint)
        if merged is None:
            return None
        digest = stages.merged_subject(self.where, "", merged, benchmark=False).digest
        scores = store.find("scores", self._scores(digest))
        return None if scores is None else (merged.fingerprint, stages.read_scores(self.where, scores))

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
        store = stages.store_of(self.where)
        steps = [stages.moments_step(recipe, expert) for expert in self.inputs_of(recipe).experts]
        refs = [store.find("moments", step.fingerprint) for step in steps]
        records = [store.read_record(ref).results for ref in refs if ref is not None]
        if len(records) < len(refs):
            return math.nan, math.nan
        return fmean(record["bytes_per_param"] for record in records), max(record["sqrt_error"] for record in records)

    def _scores(self, digest: str) -> str:
        config, inputs = kept_identity(digest, self.tests, self._data_digest, limit=self.limit)
        return fingerprint("scores", config, inputs)

    def _source(self, source: str) -> str:
        return source if source in self._fetched else locate(source, self.recipe_dir)


def read_all(where: Places, refs: dict[str, ArtifactRef]) -> dict[str, ModelScores]:
    """The scores that these artifacts hold."""
    return {key: stages.read_scores(where, ref) for key, ref in refs.items()}
