"""Merges and scores of a search's trials: into one loaded model, of which no copy is ever written."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Self

from ota_core.recipe.recipe import MergeRecipe
from tasks.benchmark import Benchmark, one_model, trial_job
from tasks.evaluation.kept import read_scores
from tasks.evaluation.scores import ModelScores
from tasks.merging.sources import Planned
from tasks.orchestration.executors import Executor
from tasks.settings import Places


class Trials:
    """Has recipes of one plan merged and scored. A context manager: within it, this process keeps the model that trials are merged into.

    On a pool each measurement is a run of its own, whose worker loads the model, merges into it and sends the scores back.
    """

    def __init__(self, plan: Planned, benchmark: Benchmark, where: Places, executor: Executor) -> None:
        self._plan, self._benchmark, self._where, self._executor = plan, benchmark, where, executor
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(one_model())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def score(self, recipe: MergeRecipe, limit: int, name: str) -> ModelScores:
        """The merged model's scores on so many documents of each task; those that are known are read. Raises OtaError."""
        job = trial_job(replace(self._plan, recipe=recipe), self._benchmark, limit, name)
        return read_scores(self._where, job.find(self._where) or self._executor.run(job, self._where))
