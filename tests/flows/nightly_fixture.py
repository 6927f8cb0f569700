"""Experts that learned something, below a prefix of each test's own, and nights over them in this process.

What stages leave is shared by all tests of a file: only its first night computes. The registered model, its note and what is published are
each test's own, by name.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from safetensors.torch import load_file, save_file

from tasks.registry import promotion
from tasks.registry.nightly import LastNight, NightlyConfig, last_night
from tasks.registry.publish import Latest, read_latest
from tasks.settings import places
from tasks.storage.layout import write_expert_json
from tasks.storage.models import EXPERT_JSON, upload_folder
from tasks.tracking.registered import CHALLENGER
from tests.flows.merge_fixture import World, write_v
from tests.servers import flow_run_name
from tests.tiny_models import perturb, write_tiny_llama
from tests.tiny_suite import write_tiny_suite
from tests.tiny_training import memorise, rows_of

OTA = {"name": "ota rho=0.80", "merge_method": "ota", "parameters": {"density": 0.8, "compression": "rank1"}}
LINEAR = {"name": "linear", "merge_method": "linear"}
WEAK = {"name": "weak", "merge_method": "task_arithmetic", "parameters": {"lambda": 0.3, "weight": 0.5}}
"""Better than the base, worse than the others."""
FIRST, SECOND, THIRD = "2026-11-20", "2026-11-21", "2026-11-22"


@dataclass(frozen=True)
class Night:
    """What became of one run of the flow."""

    state: Any

    @property
    def id(self) -> UUID:
        return UUID(str(self.state.state_details.flow_run_id))

    @property
    def name(self) -> str:
        return flow_run_name(self.id)

    @property
    def shown(self) -> tuple[str, str]:
        """The state's name and message as the server has them."""
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            state = client.read_flow_run(self.id).state
        assert state is not None and state.name is not None
        return state.name, state.message or ""

    @cached_property
    def artifacts(self) -> dict[str, Any]:
        """What the run itself shows in the Prefect UI, by key."""
        return artifacts_of(self.id)


def artifacts_of(flow_run_id: UUID) -> dict[str, Any]:
    """A flow run's artifacts by key; those without a key by their type."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    with get_client(sync_client=True) as client:
        return {one.key or one.type: one for one in client.read_artifacts(artifact_filter=chosen, limit=200)}


@dataclass(frozen=True)
class Trained:
    """The models of a file's tests, and the suite that they are good or bad at."""

    models: Path
    """base, math, knowledge (both know the suite by heart), poor (knows nothing)."""
    base_uri: str
    suite: Path
    data: Path
    root: str
    """Where tests may put what is theirs."""


@dataclass(frozen=True)
class Nights:
    """One test's experts and its registered model."""

    trained: Trained
    name: str

    @property
    def uri(self) -> str:
        return f"{self.trained.root}/{self.name}"

    @property
    def experts(self) -> str:
        return f"{self.uri}/experts"

    def push(self, model: str | Path, capability: str, name: str = FIRST, **manifest: Any) -> str:
        """One of the models, or a folder, as an expert; its address."""
        folder = self.trained.models / model
        facts = {"capability": capability, "base_model": self.trained.base_uri, "trained_at": name}
        write_expert_json(folder, **(facts | manifest))
        upload_folder(folder, f"{self.experts}/{capability}/{name}", last=EXPERT_JSON)
        return f"{self.experts}/{capability}/{name}"

    def config(self, *candidates: dict[str, Any], **changes: Any) -> NightlyConfig:
        known: dict[str, Any] = {
            "name": self.name, "experts": self.experts, "base_model": self.trained.base_uri, "suite": str(self.trained.suite),
            "data_dir": str(self.trained.data), "publish": f"{self.uri}/merged", "memory": "256MiB", "device": "cpu",
            "candidates": candidates or (OTA, LINEAR),
        }  # fmt: skip
        return NightlyConfig.model_validate(known | changes)

    def run(self, *candidates: dict[str, Any], force: bool = False, **changes: Any) -> Night:
        """One night, to its end."""
        from flows.nightly import nightly_flow

        return Night(nightly_flow(self.config(*candidates, **changes), force, return_state=True))

    @property
    def champion(self) -> promotion.Version | None:
        return promotion.current(promotion.CHAMPION, name=self.name)

    @property
    def challenger(self) -> promotion.Version | None:
        return promotion.current(CHALLENGER, name=self.name)

    @property
    def latest(self) -> Latest | None:
        return read_latest(f"{self.uri}/merged", self.name)

    @property
    def note(self) -> LastNight | None:
        return last_night(places(), self.name)


@pytest.fixture(scope="module")
def trained(world: World) -> Iterator[Trained]:
    """Trained once for a file; ``OTA_HOME`` and MLflow are the file's own."""
    folder = world.models.parent / "trained"
    suite, data = write_tiny_suite(folder / "suite", n=12)
    base = write_tiny_llama(folder / "base", hidden=32)
    memorise(base, folder / "math", rows_of(data), seed=1, steps=100)
    memorise(base, folder / "knowledge", rows_of(data), seed=1, steps=120)
    write_v(perturb(base, folder / "poor", seed=3), seed=3)
    base_uri = f"{world.uri}/trained/base"
    upload_folder(base, base_uri)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTA_HOME", str(world.home))
        patch.setenv("MLFLOW_TRACKING_URI", world.tracking_uri)
        patch.delenv("OTA_GPU_DEPLOYMENT", raising=False)
        yield Trained(models=folder, base_uri=base_uri, suite=suite, data=data, root=f"{world.uri}/nights")


@pytest.fixture
def nights(trained: Trained) -> Nights:
    return Nights(trained=trained, name=f"n-{uuid4().hex[:8]}")


def broken_copy(model: Path, out: Path) -> Path:
    """An expert's folder with a NaN in its weights."""
    shutil.copytree(model, out)
    weights = load_file(out / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out
