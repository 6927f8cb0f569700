"""Benchmarking: one model tried, and scored on a suite. No model is scored twice on the same suite, and none is fetched for scores that are there."""

from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal, Self

from ota_core.artifact import ArtifactRef, fingerprint
from ota_core.compute.stream import Progress
from tasks.artifacts.step import Stage, Step
from tasks.artifacts.store import BuildResult
from tasks.evaluation import smoke
from tasks.evaluation.harness import score_model
from tasks.evaluation.kept import SCORES_FILE, SMOKE_FILE
from tasks.evaluation.subject import Subject, bring_model
from tasks.evaluation.suites import Suite, SuiteError, digest_data, kept_identity, load_suite, score_identity
from tasks.settings import Places
from tasks.storage.models import download_folder, is_s3


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

    @property
    def name(self) -> str:
        return f"benchmark {self.subject.name}"

    def abroad(self) -> Self:
        return self.model_copy(update={"subject": self.subject.model_copy(update={"path": None})})

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> ArtifactRef:
        benchmark = Benchmark.of(self.suite, self.data_dir, self.limit, where)
        if benchmark.step(self.subject.digest).fingerprint != self.step.fingerprint:
            raise SuiteError(
                f"suite '{self.suite}' or its data ({self.data_dir or 'none'}) differ on this machine from those of the flow that asks for scores; "
                "install the same version of this package on all machines, and keep the data in s3://… or a shared folder"
            )

        def build(folder: Path) -> BuildResult:
            path = self.subject.path or bring_model(self.subject, where)
            scores = score_model(
                path, benchmark.tests, data_dir=benchmark.data, device=device, limit=self.limit, progress=progress
            )  # fmt: skip
            (folder / SCORES_FILE).write_text(scores.model_dump_json(indent=1), encoding="utf-8")
            return BuildResult(
                results={"capabilities": scores.by_capability()}, provenance={"model": self.subject.name, "seconds": scores.seconds}
            )  # fmt: skip

        return self.produce(where, build)


@dataclass(frozen=True)
class Benchmark:
    """What models are scored on: a suite, its data as they lie on this machine, and how much of them."""

    suite: str
    """As it was asked for: a name in deployments/suites, or a file."""
    data_dir: str | None
    limit: int | None
    tests: Suite
    data: Path | None

    @classmethod
    def of(cls, suite: str, data_dir: str | None, limit: int | None, where: Places) -> Self:
        """Raises SuiteError, StorageError for a suite or data that cannot be had."""
        return cls(suite, data_dir, limit, load_suite(suite), bring_data(data_dir, where))

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
        return ScoreJob(step=self.step(subject.digest, limit), subject=subject, suite=self.suite, data_dir=folder, limit=limit)

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


def bring_data(data: str | None, places: Places) -> Path | None:
    """A suite's data as a folder of this machine. Raises StorageError."""
    if data is None or not is_s3(data):
        return Path(data).expanduser() if data else None
    return download_folder(data, cache=places.cache)[0]
