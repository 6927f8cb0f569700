"""Merges and scores of a search's trials: one merged model at a time, its second moments compressed once for all of them."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from ota_core.artifact import ArtifactRef
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.store import store_of
from tasks.benchmark import Benchmark
from tasks.evaluation.kept import read_scores
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.subject import Subject, merged_subject
from tasks.merge import merge_job
from tasks.merging.sources import Planned
from tasks.orchestration.executors import Executor, Here
from tasks.settings import Places


class Trials:
    """Has recipes of one plan merged and scored. The merged model of one recipe stays until another is asked for, or the end.

    A context manager. In this process the model lies in ``folder``, which is its own: what a process that was killed has left there is
    removed. On a pool it lies among the artifacts, where every worker finds it; one that was there before the search stays.
    """

    def __init__(self, plan: Planned, benchmark: Benchmark, where: Places, executor: Executor, folder: Path) -> None:
        self._plan, self._benchmark, self._where, self._executor = plan, benchmark, where, executor
        self._own = folder if isinstance(executor, Here) else None
        self._at = where.model_copy(update={"artifacts": str(folder)}) if self._own else where
        self._recipe: MergeRecipe | None = None
        self._subject: Subject | None = None
        self._made: ArtifactRef | None = None

    def __enter__(self) -> Self:
        self._drop()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._drop()

    def score(self, recipe: MergeRecipe, limit: int, name: str) -> ModelScores:
        """The merged model's scores on so many documents of each task; those that are known are read. Raises OtaError."""
        if self._subject is None or self._recipe != recipe:
            self._drop()
            job = merge_job(replace(self._plan, recipe=recipe))
            there = job.find(self._at)
            merged = there or self._executor.run(job, self._at)
            self._made = None if there else merged
            self._recipe, self._subject = recipe, merged_subject(self._at, name, merged, benchmark=self._own is not None)
        ref = self._executor.run(self._benchmark.job(self._subject, limit), self._where)
        return read_scores(self._where, ref)

    def _drop(self) -> None:
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)
        elif self._made is not None:
            store_of(self._at).delete(self._made)
        self._recipe = self._subject = self._made = None
