"""A registry in an embedded database with three registered merges, whose weights are small folders; copied for each test."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ota_core.artifact import Record, folder_files, write_record
from tasks.evaluation.gate import Check, GateDecision
from tasks.registry.history import moves_of
from tasks.registry.promotion import promote, rollback
from tasks.tracking.registered import register_version
from tasks.tracking.store import experiment_id, resolve_store

NAME = "ota-merged"


def write_model(folder: Path, fingerprint: str, content: bytes = b"weights") -> Path:
    """A complete artifact, as the merge leaves it: two files, one of them in a subfolder, and the record."""
    (folder / "extra").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "extra" / "chat.jinja").write_text("{{ messages }}")
    write_record(
        folder,
        Record(
            kind="merged", fingerprint=fingerprint, algorithm_version={}, config={}, inputs={}, files=folder_files(folder)
        ),
    )  # fmt: skip
    return folder


def register(root: Path, uri: str, digest: str, *, tracking_uri: str | None = None) -> str:
    """A run and a version of the registered model; its number."""
    store = resolve_store(tracking_uri=tracking_uri, root=root)
    client = MlflowClient(tracking_uri=store.uri)
    run = client.create_run(experiment_id(client, store), run_name=digest).info.run_id
    return register_version(client, store, run_id=run, uri=uri, digest=digest, tags={}, description="a merge")


@dataclass(frozen=True)
class Registry:
    """One test's registry."""

    root: Path

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=f"sqlite:///{self.root / 'mlflow.db'}")

    @property
    def aliases(self) -> dict[str, str]:
        return {alias: str(number) for alias, number in self.client.get_registered_model(NAME).aliases.items()}

    def tags(self, version: str) -> dict[str, str]:
        return dict(self.client.get_model_version(NAME, version).tags)


def a_decision(promoted: bool = True, **changes: object) -> GateDecision:
    """A decision with made-up numbers."""
    check = Check(
        capability="math", reference="base", n=100, candidate_score=0.6, reference_score=0.5, difference=0.1, standard_error=0.03,
        p_value=0.9, falls_below=False,
    )  # fmt: skip
    values: dict[str, object] = {
        "candidate": "ota", "promoted": promoted, "reasons": ("The average is higher.", "Nothing falls."), "average": 0.6,
        "champion_average": 0.55, "base_average": 0.5, "suite": "s", "suite_digest": "d", "confidence": 0.95, "checks": (check,),
    }  # fmt: skip
    return GateDecision.model_validate(values | changes)


@pytest.fixture(scope="session")
def registry_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions, of which the last is the challenger; making the tables takes seconds, copying them does not."""
    root = tmp_path_factory.mktemp("registry-template")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for number in (1, 2, 3):
            folder = write_model(root / "artifacts" / f"m{number}", f"fp{number}", b"w" * number)
            assert register(root, str(folder), f"digest{number}") == str(number)
    return root


@pytest.fixture
def registry(registry_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "tracking"
    root.mkdir()
    shutil.copy(registry_template / "mlflow.db", root / "mlflow.db")
    return Registry(root)


def make(registry: Registry, *versions: str) -> None:
    for version in versions:
        promote(version, by="anna", reason=f"promote {version}", root=registry.root)


def back(registry: Registry, to: str | None = None) -> str:
    return rollback(by="ben", reason="worse", to=to, root=registry.root).champion.version


def told(registry: Registry) -> list[tuple[str, str | None, str]]:
    """The history as it is noted in the registry, not as it could be completed."""
    moves = moves_of(registry.client.get_registered_model(NAME).tags)
    return [(move.action, move.from_version, move.to) for move in moves]
