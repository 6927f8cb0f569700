"""A store with a past: merges by the real stages on tiny models, logged to a real MLflow, with champion, challenger and leftovers."""

import os
import shutil
import sqlite3
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ota_core.artifact import RECORD, ArtifactRef, read_record
from ota_core.recipe.recipe import MergeRecipe
from tasks import benchmark
from tasks.artifacts.store import ArtifactStore, store_of
from tasks.benchmark import Benchmark
from tasks.compress import compress_jobs
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.subject import Subject, merged_subject
from tasks.mask import mask_jobs
from tasks.merge import merge_job
from tasks.merging.inputs import model_sources
from tasks.merging.sources import planned
from tasks.registry.retention.plan import Plan
from tasks.registry.retention.references import TAG_REPLACED, Tracking
from tasks.registry.retention.retention import DEFAULT_KINDS, Retention
from tasks.settings import Places, places
from tasks.storage import models as storage
from tasks.tracking.merge import InputRef, log_merge
from tasks.tracking.names import REGISTERED_MODEL
from tests.flows.merge_fixture import write_v
from tests.servers import S3Test
from tests.tasks.tracking.made_up import a_merge
from tests.tiny_models import perturb, write_tiny_llama
from tests.tiny_suite import write_tiny_suite

TEAMS = ("red", "blue", "green", "grey")
"""Each has two experts of its own; all have one base."""


def empty_database(folder: Path) -> Path:
    """MLflow's tables without a row; making them takes seconds, copying them does not."""
    MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder / "mlflow.db"


def write_models(folder: Path) -> Path:
    """``base`` and two experts of every team, with second moments; ``suite`` and its data."""
    write_tiny_llama(folder / "base")
    for i, name in enumerate(f"{team}{j}" for team in TEAMS for j in range(2)):
        write_v(perturb(folder / "base", folder / name, seed=i + 1), seed=i + 1)
    write_tiny_suite(folder / "suite")
    return folder


@dataclass
class Shop:
    """A store, its MLflow, and what was made in it."""

    models: Path
    where: Places
    made: dict[str, dict[str, ArtifactRef]] = field(default_factory=dict)
    """By merge: ``merged`` and every artifact that belongs to it, the base's scores excepted."""
    versions: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    base_scores: ArtifactRef | None = None

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=f"sqlite:///{self.where.tracking / 'mlflow.db'}")

    @property
    def store(self) -> ArtifactStore:
        return store_of(self.where)

    def merge(self, team: str, *, log: bool = True, **changes: Any) -> ArtifactRef:
        """Fetch, compress, mask, merge and score, as the flow does; then log it."""
        names = [f"{team}{j}" for j in range(2)]
        raw = {
            "merge_method": "ota", "base_model": str(self.models / "base"),
            "models": [{"model": str(self.models / name)} for name in names], "parameters": {"density": 0.4, "compression": "rank1"},
        }  # fmt: skip
        recipe = MergeRecipe.model_validate(raw | changes)
        fetched = [storage.fetch(source, cache=self.where.cache) for source in model_sources(recipe, None)]
        plan = planned(recipe, fetched, self.where)
        moments = {job.expert.name: job.run(self.where) for job in compress_jobs(plan)}
        plan = plan.with_artifacts(list(moments.values()))
        masks = {i: job.run(self.where) for i, job in mask_jobs(plan).items()}
        refs = {f"moments {name}": ref for name, ref in moments.items()} | {f"mask {names[i]}": ref for i, ref in masks.items()}
        merged = merge_job(plan.with_artifacts(masks=masks)).run(self.where)
        subject = merged_subject(self.where, team, merged)
        base = Subject(name="base", role="base", path=fetched[0].path, digest=fetched[0].digest)
        own = [
            Subject(name=n, role="expert", path=one.path, digest=one.digest) for n, one in zip(names, fetched[1:], strict=True)
        ]
        for one in (subject, *own):
            refs[f"scores {one.name}"] = self.score(one)
        self.base_scores = self.score(base)
        label = f"{team} {recipe.merge_method}"
        self.made[label] = {"merged": merged, **refs}
        if log:
            self.log(label, merged, subject.digest, [base, *own])
        return merged

    def score(self, subject: Subject) -> ArtifactRef:
        suite, data = self.models / "suite" / "tiny.yaml", self.models / "suite" / "data"
        return Benchmark.of(str(suite), str(data), None, self.where).job(subject).run(self.where)

    def log(self, label: str, merged: ArtifactRef, digest: str, models: list[Subject]) -> None:
        inputs = [
            InputRef(name=one.name, source=str(one.path), digest=one.digest, role="base" if one.role == "base" else "expert")
            for one in models
        ]
        run = a_merge(
            label, tags={"recipe_fingerprint": merged.fingerprint}, model_uri=merged.uri, model_digest=digest, inputs=inputs, children=[],
            table=[],
        )  # fmt: skip
        logged = log_merge(run, root=self.where.tracking)
        assert logged.model_version is not None
        self.versions[label], self.runs[label] = logged.model_version, logged.run_id

    def crown(self, champion: str, *, replaced: str | None = None, challenger: str | None = None) -> None:
        """Give the aliases as a gate does."""
        client = self.client
        client.set_registered_model_alias(REGISTERED_MODEL, "champion", self.versions[champion])
        if replaced:
            client.set_model_version_tag(REGISTERED_MODEL, self.versions[champion], TAG_REPLACED, self.versions[replaced])
        client.delete_registered_model_alias(REGISTERED_MODEL, "challenger")
        if challenger:
            client.set_registered_model_alias(REGISTERED_MODEL, "challenger", self.versions[challenger])

    def end_run(self, label: str, when: datetime) -> None:
        """A run that ended then."""
        self.client.set_terminated(self.runs[label], end_time=int(when.timestamp() * 1000))

    def retention(self, *, later: float = 30, days: int = 14, kinds: Any = DEFAULT_KINDS) -> Retention:
        """The rule as it will be in force ``later`` days from now: a server's clock cannot be turned back."""
        tracking = Tracking(tracking_uri=None, root=self.where.tracking)
        return Retention(self.store, tracking, days, kinds, datetime.now(UTC) + timedelta(days=later))

    def there(self, refs: Iterable[ArtifactRef]) -> set[bool]:
        """Whether these artifacts are complete."""
        return {self.store.find(ref.kind, ref.fingerprint) is not None for ref in refs}

    def age(self, days: float) -> None:
        """Make every local artifact look as if it was made then and not used since."""
        when = time.time() - days * 86400
        for folder in Path(self.where.artifacts).glob("*/*"):
            record = folder / RECORD
            if record.is_file():
                known = read_record(folder)
                text = datetime.fromtimestamp(when, UTC).isoformat(timespec="seconds")
                aged = known.model_copy(update={"provenance": known.provenance | {"produced_at": text}})
                record.write_text(aged.model_dump_json(indent=2) + "\n")
            for path in folder.rglob("*"):
                os.utime(path, (when, when))


def names(plan: Plan, *, going: bool) -> set[tuple[str, str]]:
    """(kind, fingerprint) of what goes or stays."""
    return {(item.stored.kind, item.stored.name) for item in (plan.going if going else plan.kept)}


def keys(refs: Iterable[ArtifactRef]) -> set[tuple[str, str]]:
    return {(ref.kind, ref.fingerprint) for ref in refs}


def why(plan: Plan) -> dict[tuple[str, str], str]:
    return {(item.stored.kind, item.stored.name): item.why for item in plan.items}


def open_shop(home: Path, artifacts: str | None, models: Path, database: Path) -> Shop:
    """An empty store with an MLflow that knows nothing yet."""
    where = places(home, artifacts)
    where.tracking.mkdir(parents=True)
    shutil.copy(database, where.tracking / "mlflow.db")
    return Shop(models, where)


def usual_past(shop: Shop) -> None:
    """Champion red, which replaced blue; challenger red by linear; green in a run of late; grey of old, in the registry without an alias."""
    for team in TEAMS:
        shop.merge(team)
    shop.merge("red", merge_method="linear", parameters={})
    shop.crown("red ota", replaced="blue ota", challenger="red linear")
    shop.end_run("green ota", datetime.now(UTC) + timedelta(days=29))


def quick_scores(patch: pytest.MonkeyPatch) -> None:
    """Scores without lm-eval: what is kept and deleted are the artifacts, not the numbers."""
    from tasks.evaluation.scores import CapabilityScore

    def score(path: Path, suite: Any, **_: Any) -> ModelScores:
        capabilities = {name: CapabilityScore(score=0.5, stderr=None, n_samples=1, tasks={}) for name in suite.capabilities}
        return ModelScores(
            suite=suite.name, suite_digest="made up", capabilities=capabilities, samples={}, limit=None, lm_eval_version="0", seconds=0.0
        )  # fmt: skip

    patch.setattr(benchmark, "score_model", score)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a suite and an empty database, for all tests of a file."""
    folder = tmp_path_factory.mktemp("ground")
    empty_database(folder)
    return write_models(folder)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lm-eval, and the embedded MLflow."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    quick_scores(monkeypatch)


@pytest.fixture
def shop(ground: Path, tmp_path: Path) -> Shop:
    """An empty one."""
    return open_shop(tmp_path / "home", None, ground, ground / "mlflow.db")


@pytest.fixture(scope="module")
def lived(ground: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shop, Path]:
    """A shop with the usual past, and a copy of its home as it was then."""
    folder = tmp_path_factory.mktemp("lived")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        quick_scores(patch)
        shop = open_shop(folder / "home", None, ground, ground / "mlflow.db")
        usual_past(shop)
    return shop, shutil.copytree(folder / "home", folder / "copy")


@pytest.fixture
def settled(lived: tuple[Shop, Path]) -> Shop:
    """The shop with the usual past, in the place that its MLflow names."""
    shop, copy = lived
    for name in ("artifacts", "cache"):
        shutil.rmtree(shop.where.cache.parent / name)
        shutil.copytree(copy / name, shop.where.cache.parent / name)
    # MLflow keeps its connections: the database must stay the same file.
    with (
        closing(sqlite3.connect(copy / "tracking" / "mlflow.db")) as source,
        closing(sqlite3.connect(shop.where.tracking / "mlflow.db")) as target,
    ):
        source.backup(target)
    return replace(shop, made=dict(shop.made), versions=dict(shop.versions), runs=dict(shop.runs))


@pytest.fixture(params=["folder", "s3"])
def either(request: pytest.FixtureRequest, ground: Path, tmp_path: Path) -> Shop:
    """The usual past on either kind of root."""
    if request.param == "folder":
        settled: Shop = request.getfixturevalue("settled")
        return settled
    server: S3Test = request.getfixturevalue("s3_server")
    shop = open_shop(tmp_path / "home", f"{server.uri}/deep/artifacts", ground, ground / "mlflow.db")
    usual_past(shop)
    return shop
