"""Benchmarking: one model tried, and scored on a suite, or a merge that is scored in memory alone. No model is scored twice on the same suite,
and none is fetched for scores that are there."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal, Self

from ota_core.artifact import ArtifactRef, canonical_json, fingerprint
from ota_core.compute.stream import Progress
from tasks.artifacts.step import Stage, Step
from tasks.artifacts.store import BuildResult
from tasks.evaluation import smoke
from tasks.evaluation.answers import ANSWERS_FILE
from tasks.evaluation.harness import score_model
from tasks.evaluation.in_memory import MergedModel
from tasks.evaluation.kept import SCORES_FILE, SMOKE_FILE
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.subject import Subject, bring_data, bring_model
from tasks.evaluation.suites import (
    Suite,
    SuiteError,
    at_server,
    digest_data,
    kept_identity,
    load_suite,
    score_identity,
    suite_digest,
)
from tasks.evaluation.template import decided
from tasks.merge import MergeJob, merge_job
from tasks.merging.labels import merge_label
from tasks.merging.sources import Planned
from tasks.settings import Places, allow_server
from tasks.storage.models import is_s3

log = logging.getLogger(__name__)


class SmokeJob(Stage):
    """Try one model before anybody benchmarks it."""

    turn: ClassVar[Literal["engine", "benchmark"] | None] = "benchmark"
    kind: Literal["smoke"] = "smoke"
    subject: Subject

    @classmethod
    def of(cls, subject: Subject) -> Self:
        known = {"smoke": smoke.VERSION, "transformers": version("transformers")}  # what loads one day may not another
        return cls(step=Step.of("checks", known, {"model": subject.digest}), subject=subject)

    @property
    def name(self) -> str:
        return f"smoke-test {self.subject.name}"

    def abroad(self) -> Self:
        return self.model_copy(update={"subject": self.subject.model_copy(update={"path": None})})

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        def build(folder: Path) -> BuildResult:
            found = smoke.probe(self.subject.path or bring_model(self.subject, where), device)
            (folder / SMOKE_FILE).write_text(found.model_dump_json(indent=1), encoding="utf-8")
            return BuildResult(results={"problems": found.problems}, provenance={"model": self.subject.name})

        return self.produce(where, build)


class ScoreJob(Stage):
    """Score one model on a suite."""

    turn: ClassVar[Literal["engine", "benchmark"] | None] = "benchmark"
    kind: Literal["benchmark"] = "benchmark"
    subject: Subject
    suite: str
    """A name in deployments/suites, or a file that every machine sees."""
    data_dir: str | None
    """A folder that every machine sees, or ``s3://…``."""
    limit: int | None
    server: str | None = None
    """Where the model is asked, if not where the suite says."""
    chat_template: bool | None = None
    """Whether it is asked through its chat template, where the suite leaves that open."""

    @property
    def name(self) -> str:
        return f"benchmark {self.subject.name}"

    def abroad(self) -> Self:
        return self.model_copy(update={"subject": self.subject.model_copy(update={"path": None})})

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        benchmark = self.benchmark(where)

        def build(folder: Path) -> BuildResult:
            path = self.subject.path or bring_model(self.subject, where)
            scores = score_model(
                path, benchmark.tests, data_dir=benchmark.data, device=device, limit=self.limit, progress=progress,
                served_as=[self.subject.name, *([self.subject.location] if self.subject.location else [])],
                answers_to=folder / ANSWERS_FILE,
            )  # fmt: skip
            return self.kept(scores, folder)

        return self.produce(where, build)

    def benchmark(self, where: Places) -> "Benchmark":
        """What the model is scored on, as this machine has it. Raises SuiteError where that is not what was asked for."""
        benchmark = Benchmark.of(self.suite, self.data_dir, self.limit, where, self.server, self.chat_template)
        if benchmark.step(self.subject.digest).fingerprint != self.step.fingerprint:
            raise SuiteError(
                f"suite '{self.suite}' or its data ({self.data_dir or 'none'}) differ on this machine from those of the flow that asks for scores; "
                "install the same version of this package on all machines, and keep the data in s3://… or a shared folder"
            )
        return benchmark

    def kept(self, scores: ModelScores, folder: Path) -> BuildResult:
        """The artifact's file, and what its record says."""
        (folder / SCORES_FILE).write_text(scores.model_dump_json(indent=1), encoding="utf-8")
        return BuildResult(
            results={"capabilities": scores.by_capability()}, provenance={"model": self.subject.name, "seconds": scores.seconds}
        )  # fmt: skip


class TrialJob(Stage):
    """Merge into a model that is loaded, and score it there: no model is written.

    Trials of one process share the loaded model while it is within ``one_model``; a trial by itself, as on a worker that was sent no other,
    loads it anew. The scores are those of the merged folder, had it been written and loaded.
    """

    turn: ClassVar[Literal["engine", "benchmark"] | None] = "engine"
    kind: Literal["trial"] = "trial"
    merge: MergeJob
    score: ScoreJob

    @property
    def name(self) -> str:
        return f"{self.score.subject.name}: {merge_label(self.merge.recipe)}"[:200]

    def abroad(self) -> Self:
        return self.model_copy(update={"merge": self.merge.abroad(), "score": self.score.abroad()})

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        benchmark = self.score.benchmark(where)

        def build(folder: Path) -> BuildResult:
            with nullcontext(_kept.get()) if _kept.get() else one_model() as kept:
                assert kept is not None
                return self.score.kept(kept.scores(self, benchmark, where, device, progress), folder)

        return self.produce(where, build)


def trial_job(plan: Planned, benchmark: "Benchmark", limit: int | None, name: str) -> TrialJob:
    """The scores of a plan's merge. They are known by the merge, not by the digest of files that nobody writes."""
    merge = merge_job(plan)
    subject = Subject(name=name, role="merge", path=None, digest=f"merge:{merge.step.fingerprint}")
    score = benchmark.job(subject, limit)
    return TrialJob(step=score.step, merge=merge, score=score)


class KeptModel:
    """The model of the trials of one process, kept as long as they are of one architecture, suite and device."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._like, self._holds = stack, "", ""

    def scores(
        self, trial: TrialJob, benchmark: "Benchmark", where: Places, device: str, progress: Progress | None
    ) -> ModelScores:  # fmt: skip
        """The trial's scores, of the kept model where that is like it. Raises OtaError."""
        merge, recipe = trial.merge, trial.merge.recipe
        # Second moments decide what is merged, not what a merge looks like.
        models = {name: digest for name, digest in merge.step.inputs.items() if not name.startswith("moments")}
        asked = replace(benchmark, limit=None).wanted
        like = canonical_json([models, recipe.output_dtype, recipe.tokenizer_source, recipe.token_rows(), asked, device])
        if self._like != like:
            self._stack.close()
            self._model = self._stack.enter_context(MergedModel(benchmark.tests, benchmark.data, device, where.cache))
            self._like, self._holds = like, ""
        if self._holds != merge.step.fingerprint:
            self._holds = ""
            with merge.opened(where) as inputs:
                self._model.become(recipe, inputs, memory=merge.memory, progress=progress)
            self._holds = merge.step.fingerprint
        return self._model.score(trial.score.limit, progress)


_kept: ContextVar[KeptModel | None] = ContextVar("kept_model", default=None)


@contextmanager
def one_model() -> Iterator[KeptModel]:
    """The trials within, in this process, share one loaded model."""
    with ExitStack() as stack:
        kept = KeptModel(stack)
        token = _kept.set(kept)
        try:
            yield kept
        finally:
            _kept.reset(token)


@dataclass(frozen=True)
class Benchmark:
    """What models are scored on: a suite, its data as they lie on this machine, and how much of them."""

    suite: str
    """As it was asked for: a name in deployments/suites, or a file."""
    data_dir: str | None
    limit: int | None
    tests: Suite
    data: Path | None
    server: str | None = None
    """Where models are asked, if not where the suite says."""

    @classmethod
    def of(
        cls, suite: str, data_dir: str | None, limit: int | None, where: Places, server: str | None = None,
        chat_template: bool | None = None,
    ) -> Self:  # fmt: skip
        """``chat_template``: what was decided, where the suite says ``auto``. Raises SuiteError, StorageError for a suite or data that
        cannot be had."""
        if server:
            allow_server(server, "server", None)
        tests = at_server(load_suite(suite), server) if server else load_suite(suite)
        found = cls(suite, data_dir, limit, tests, bring_data(data_dir, where), server)
        return found.asked(chat_template)

    def asked_alike(self, subjects: Iterable[Subject]) -> Self:
        """With it decided for all these models together whether they are asked through their chat templates; as it was where the suite says.

        A merge has the template of its base or of an expert, so that those decide where it lies elsewhere. Raises SuiteError.
        """
        if not self.open:
            return self
        tests, why = decided(self.tests, {one.name: one.path for one in subjects if one.path})
        log.info("suite %s: %s", self.tests.name, why)
        return replace(self, tests=tests)

    @property
    def open(self) -> bool:
        """Whether the models are yet to decide how they are asked."""
        return self.tests.apply_chat_template == "auto"

    @property
    def chat_template(self) -> bool | None:
        """Whether models are asked through their chat templates; None as long as that is open."""
        return None if self.open else bool(self.tests.apply_chat_template)

    def asked(self, chat_template: bool | None) -> Self:
        """With what was decided for other models, where the suite leaves it to the models."""
        return self if chat_template is None or not self.open else replace(self, tests=self.tests.asked(chat_template))

    def asked_as(self, scores: ModelScores) -> Self:
        """With what was decided for models that these scores are one's of; known by the digest, for the scores may be older than the record
        of it."""
        return self.asked(scores.suite_digest == suite_digest(self.tests.asked(True), limit=scores.limit))

    def check(self) -> Self:
        """Raises SuiteError for what would stop the benchmark only after the merge: a limit below one, data that are missing."""
        if self.limit is not None and self.limit < 1:
            raise SuiteError(f"limit is {self.limit}; expected at least one document per task, or no limit")
        self.wanted  # noqa: B018 - raises
        return self

    def job(self, subject: Subject, limit: int | None = None) -> ScoreJob:
        """What scores a model; ``limit`` instead of the benchmark's own."""
        limit = limit or self.limit
        folder = self.data_dir
        if folder is not None and not is_s3(folder):  # as other machines, or this one in another working directory, understand it
            folder = str(Path(folder).expanduser().resolve())
        assert not self.open, "asked_alike decides for all models of a comparison, before the first is scored"
        return ScoreJob(
            step=self.step(subject.digest, limit), subject=subject, suite=self.suite, data_dir=folder, limit=limit, server=self.server,
            chat_template=self.chat_template,
        )  # fmt: skip

    def step(self, digest: str, limit: int | None = None) -> Step:
        """Scores of the model with this digest."""
        config, inputs = kept_identity(digest, self.tests, self.data_digest, limit=limit or self.limit)
        return Step.of("scores", config, inputs)

    @property
    def wanted(self) -> str:
        """What decides the scores of any model: by this a search knows the trials that it kept. Raises SuiteError for missing data."""
        return fingerprint("scores", *score_identity("", self.tests, self.data_digest, limit=self.limit))

    @cached_property
    def data_digest(self) -> str | None:
        """Of all files of the data."""
        return digest_data(self.data) if self.data else None
