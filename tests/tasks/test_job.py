"""Stages as another machine is told of them: through JSON, with caches of its own, over one root of artifacts in S3."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from ota_core.artifact import RECORD, ArtifactRef, read_record
from ota_core.errors import OtaError, StorageError
from ota_core.files.writer import MAX_SHARD_BYTES
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.step import Stage
from tasks.artifacts.store import store_of
from tasks.benchmark import Benchmark, ScoreJob
from tasks.compress import compress_jobs
from tasks.evaluation.kept import read_scores
from tasks.evaluation.subject import Subject, merged_subject
from tasks.evaluation.suites import SuiteError
from tasks.job import Job
from tasks.mask import mask_jobs
from tasks.merge import MergeJob, merge_job
from tasks.merging.inputs import fetch_all
from tasks.merging.sources import planned
from tasks.orchestration.executors import missing_after
from tasks.settings import Places, places
from tasks.storage import models as storage
from tests.flows.merge_fixture import EXPERTS, RUN, upload, write_experts
from tests.servers import S3Test
from tests.tiny_models import perturb
from tests.tiny_suite import write_tiny_suite

MEMORY = "256MiB"
JOB: TypeAdapter[Any] = TypeAdapter(Job)


@dataclass(frozen=True)
class Machines:
    """A base and experts in S3, a root of artifacts beside them, and two machines that share nothing else."""

    uri: str
    models: Path
    sender: Places
    other: Places

    def recipe(self, method: str = "ota", **parameters: Any) -> MergeRecipe:
        models = [{"model": f"{self.uri}/experts/{name}/{RUN}"} for name in EXPERTS]
        raw = {"merge_method": method, "base_model": f"{self.uri}/models/base", "models": models, "parameters": parameters}
        return MergeRecipe.model_validate(raw)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("models"))


@pytest.fixture
def machines(models: Path, s3_server: S3Test, tmp_path: Path) -> Iterator[Machines]:
    upload(models, s3_server.uri)
    root = f"{s3_server.uri}/artifacts"
    yield Machines(s3_server.uri, models, places(tmp_path / "sender", root), places(tmp_path / "other", root))


def sent(job: Stage) -> Stage:
    """What arrives of a job."""
    return JOB.validate_json(job.abroad().model_dump_json(by_alias=True))


def merge_job_of(machines: Machines, recipe: MergeRecipe, shard_size: int = MAX_SHARD_BYTES) -> MergeJob:
    """The job with second moments and masks made on the sender."""
    where = machines.sender
    plan = planned(recipe, fetch_all(recipe, cache=where.cache, recipe_dir=None), where, memory=MEMORY)
    plan = plan.with_artifacts([job.run(where) for job in compress_jobs(plan)])
    plan = plan.with_artifacts(masks={i: job.run(where) for i, job in mask_jobs(plan).items()})
    return merge_job(plan, shard_size)


@pytest.mark.parametrize(
    ("method", "parameters", "shard_size"),
    [
        ("ota", {"density": 0.4, "compression": "rank1"}, MAX_SHARD_BYTES),
        ("ota", {"density": 0.4, "compression": "log8", "mask_curvature": "full", "lambda": 0.5}, 5_000),
        ("linear", {}, 5_000),
    ],
)
def test_a_merge_elsewhere_gives_the_bytes_of_one_here(
    machines: Machines, tmp_path: Path, method: str, parameters: dict[str, Any], shard_size: int
) -> None:
    recipe = machines.recipe(method, **parameters)
    job = merge_job_of(machines, recipe, shard_size)
    assert job.sources.base and job.sources.base.path, "the sender reads its own copy"
    ref = sent(job).run(machines.other, "cpu")
    assert ref.uri.startswith(f"{machines.uri}/artifacts/merged/") and ref.fingerprint == job.step.fingerprint
    there = store_of(machines.sender).local_path(ref)
    local = places(tmp_path / "alone")
    alone = Path(job.run(local).uri)
    record, own = read_record(there), read_record(alone)
    weights = sorted(path.name for path in alone.glob("*.safetensors"))
    assert len(weights) > 1 if shard_size < MAX_SHARD_BYTES else weights == ["model.safetensors"]
    assert sorted(record.files) == sorted(own.files) and record.results == own.results
    assert record.provenance["digest"] == own.provenance["digest"]
    for name in own.files:
        assert name == RECORD or (alone / name).read_bytes() == (there / name).read_bytes(), name


def test_a_merge_that_is_there_is_found(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    from ota_core.engine import engine

    job = merge_job_of(machines, machines.recipe("linear"))
    first = sent(job).run(machines.other, "cpu")
    monkeypatch.setattr(engine, "merge_into", None)
    assert sent(job).run(machines.sender, "cpu") == first


def test_an_expert_that_was_replaced_meanwhile_is_refused(machines: Machines, tmp_path: Path) -> None:
    job = merge_job_of(machines, machines.recipe("linear"))
    storage.upload_folder(perturb(machines.models / "base", tmp_path / "new", seed=9), f"{machines.uri}/experts/math/{RUN}")
    with pytest.raises(OtaError, match=r"experts/math.* is not what it was when the merge began; run the merge again"):
        sent(job).run(machines.other, "cpu")
    assert job.find(machines.other) is None


@pytest.fixture
def suite(tmp_path: Path) -> tuple[Path, Path]:
    return write_tiny_suite(tmp_path / "suite", n=4)


def score_job(machines: Machines, suite: tuple[Path, Path], **changes: Any) -> ScoreJob:
    """Score the base; by what the sender knows of it."""
    fetched = storage.fetch(f"{machines.uri}/models/base", cache=machines.sender.cache)
    known = {"name": "base", "role": "base", "path": fetched.path, "digest": fetched.digest, "location": fetched.resolved}
    subject = Subject.model_validate(known | changes)
    file, data = suite
    return Benchmark.of(str(file), str(data), None, machines.sender).job(subject)


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts fetches by the cache that they go into."""
    calls: Counter[str] = Counter()
    whole = storage.fetch

    def fetch(source: str, *, cache: Path, **options: Any) -> Any:
        calls[cache.parent.name] += 1
        return whole(source, cache=cache, **options)

    monkeypatch.setattr(storage, "fetch", fetch)
    return calls


def test_scores_made_elsewhere_and_scores_that_are_there(
    machines: Machines, suite: tuple[Path, Path], fetches: Counter[str], tmp_path: Path
) -> None:
    job = score_job(machines, suite)
    ref = sent(job).run(machines.other, "cpu")
    assert fetches["other"] == 1  # the sender's folder is of no use there
    scores = read_scores(machines.sender, ref)
    assert set(scores.by_capability()) == {"math", "knowledge"} and scores.capabilities["math"].n_samples == 4
    third = places(tmp_path / "third", machines.other.artifacts)
    assert sent(job).run(third, "cpu") == ref and fetches["third"] == 0


def test_a_merged_model_is_found_by_its_artifact(machines: Machines, suite: tuple[Path, Path]) -> None:
    merging = merge_job_of(machines, machines.recipe("linear"))
    merged: ArtifactRef = sent(merging).run(machines.sender, "cpu")
    subject = merged_subject(machines.sender, "linear", merged, benchmark=False)
    assert subject.path is None
    job = score_job(machines, suite, **subject.model_dump())
    assert read_scores(machines.sender, sent(job).run(machines.other, "cpu")).average is not None


@pytest.mark.parametrize("change", ["task", "data"])
def test_a_suite_that_differs_on_this_machine_is_refused(machines: Machines, suite: tuple[Path, Path], change: str) -> None:
    job, (file, data) = score_job(machines, suite), suite
    if change == "task":
        path = file.parent / "tiny" / "sums.yaml"
        path.write_text(path.read_text().replace("max_gen_toks: 4", "max_gen_toks: 5"))
    else:
        (data / "sums.jsonl").write_text((data / "sums.jsonl").read_text().replace("Q: 1", "Q: 2"))
    with pytest.raises(SuiteError, match=r"differ on this machine from those of the flow that asks for scores"):
        sent(job).run(machines.other, "cpu")


def test_a_model_that_changed_meanwhile_is_refused(machines: Machines, suite: tuple[Path, Path], tmp_path: Path) -> None:
    job = score_job(machines, suite)
    storage.upload_folder(perturb(machines.models / "base", tmp_path / "new", seed=9), f"{machines.uri}/models/base")
    with pytest.raises(StorageError, match=r"models/base \(base\) is not what it was when the run began: its digest is"):
        sent(job).run(machines.other, "cpu")
    assert job.find(machines.other) is None


def test_a_model_that_only_the_sender_has_is_refused(machines: Machines, suite: tuple[Path, Path]) -> None:
    with pytest.raises(StorageError, match="base: the model lies in a folder of another machine"):
        sent(score_job(machines, suite, location=None)).run(machines.other, "cpu")


def test_names_and_what_is_said_of_an_output_that_is_nowhere(machines: Machines, suite: tuple[Path, Path]) -> None:
    job = score_job(machines, suite)
    assert job.name == "benchmark base"
    assert "benchmark base is done, but s3://" in str(missing_after(job.name, machines.sender))
    assert merge_job_of(machines, machines.recipe("linear")).name == "merge linear"
