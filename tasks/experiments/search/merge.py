"""Merges and scores of a search's trials: one merged model at a time on the disk, its second moments compressed once for all of them."""

import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from ota_core.compute.stream import Progress
from ota_core.merge import engine
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import MergeRecipe
from tasks import stages
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import Suite
from tasks.settings import Places
from tasks.stages import Subject
from tasks.storage.models import digest_folder


class TrialModels:
    """Merges recipes of one set of inputs and scores them. The merged model of one recipe stays until another is asked for, or the end.

    A context manager. ``folder`` is its own: what a process that was killed has left there is removed.
    """

    def __init__(
        self, inputs: MergeInputs, where: Places, folder: Path, *, suite: str, tests: Suite, data: Path | None, device: str, memory: str
    ) -> None:  # fmt: skip
        self._inputs, self._where, self._folder = inputs, where, folder
        self._suite, self._tests, self._data, self._device, self._memory = suite, tests, data, device, memory
        self._recipe: MergeRecipe | None = None
        self._subject: Subject | None = None

    def __enter__(self) -> Self:
        self._drop()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._drop()

    def score(self, recipe: MergeRecipe, limit: int, name: str, progress: Progress | None = None) -> ModelScores:
        """The merged model's scores on so many documents of each task; those that are known are read. Raises OtaError."""
        subject = self._merged(recipe, name, progress)
        step = stages.score_step(subject, self._tests, self._data, limit)
        ref = stages.score(
            self._where, step, subject, self._suite, self._data, limit, device=self._device, progress=progress
        )  # fmt: skip
        return stages.read_scores(self._where, ref)

    def _merged(self, recipe: MergeRecipe, name: str, progress: Progress | None) -> Subject:
        if self._subject is None or self._recipe != recipe:
            self._drop()
            self._folder.mkdir(parents=True)
            engine.merge_into(
                self._folder, recipe, self._inputs, memory=self._memory, device=self._device, progress=progress
            )  # fmt: skip
            digest, _ = digest_folder(self._folder, cache=self._where.cache)
            self._recipe, self._subject = recipe, Subject(name=name, role="merge", path=self._folder, digest=digest)
        return self._subject

    def _drop(self) -> None:
        self._recipe = self._subject = None
        if self._folder.exists():
            shutil.rmtree(self._folder)
