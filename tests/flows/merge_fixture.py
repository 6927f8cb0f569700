"""Small real experts in a real S3, and runs of the real flow over them with the states of their task runs."""

import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import torch

from ota_core.recipe.recipe import MergeRecipe
from tasks.local.s3_server import S3Server
from tasks.settings import environment
from tasks.storage import s3
from tasks.storage.layout import write_expert_json
from tasks.storage.models import EXPERT_JSON, upload_folder
from tests.servers import task_states
from tests.tiny_models import perturb, write_tiny_llama
from tests.tiny_suite import write_tiny_suite

EXPERTS = {"math": 1, "knowledge": 2}
"""Capability to the seed of its expert. The capabilities are those of the tiny suite."""
RUN = "2026-11-20"
"""The last part of the experts' prefixes, as trainers name their runs."""


@dataclass(frozen=True)
class FlowRun:
    """What became of one flow run."""

    id: UUID
    state: Any

    @property
    def outcome(self) -> Any:
        """The flow's result. Raises what the flow raised."""
        return self.state.result()

    @cached_property
    def states(self) -> dict[str, list[str]]:
        """Task run's name to its final states."""
        return task_states(self.id)

    def computed(self) -> list[str]:
        """Names of the task runs that were not served from the cache. Logging always runs."""
        assert all(state in {"Completed", "Cached"} for states in self.states.values() for state in states), self.states
        return sorted(name for name, states in self.states.items() if "Completed" in states and not name.startswith("log "))


@dataclass(frozen=True)
class World:
    """A base and experts below one S3 prefix, a suite, and a home for what the flow makes."""

    uri: str
    """Where models and experts lie."""
    models: Path
    """Local copies: base, math, knowledge."""
    home: Path
    tracking_uri: str
    suite: Path
    data: Path

    def recipe(self, method: str = "ota", *, base: bool = True, **parameters: Any) -> MergeRecipe:
        """All experts merged; ``parameters`` are the recipe's."""
        return MergeRecipe.model_validate(
            {
                "merge_method": method,
                "base_model": f"{self.uri}/models/base" if base else None,
                "models": [{"model": f"{self.uri}/experts/{name}/{RUN}"} for name in EXPERTS],
                "parameters": parameters,
            }
        )

    def options(self, **changes: Any) -> dict[str, Any]:
        """The flow's parameters besides the recipe. No report and no smoke test by themselves: they are more tasks of every run."""
        known = {
            "home": self.home, "tracking_uri": self.tracking_uri, "suite": str(self.suite), "data_dir": str(self.data), "device": "cpu",
            "memory": "256MiB", "report": "none", "smoke": False,
        }  # fmt: skip
        return known | changes

    def run(self, recipe: MergeRecipe, **changes: Any) -> FlowRun:
        """One run of the flow, to its end."""
        from flows.merge import merge_flow

        state = merge_flow(recipe, return_state=True, **self.options(**changes))
        return FlowRun(id=state.state_details.flow_run_id, state=state)

    def at(self, home: Path) -> "World":
        """The same with another home."""
        return replace(self, home=home)


def write_experts(folder: Path) -> Path:
    """``base``, ``math``, ``knowledge``: tiny Llamas, the experts with second moments and ``expert.json``."""
    base = write_tiny_llama(folder / "base")
    for name, seed in EXPERTS.items():
        expert = perturb(base, folder / name, seed=seed)
        write_v(expert, seed=seed)
        write_expert_json(
            expert, capability=name, base_model="base", trained_at=RUN, step=100 * seed, beta2=0.999, optimizer="adamw"
        )
    return folder


def write_v(expert: Path, *, seed: int) -> None:
    """Second moments for every tensor of a checkpoint, from 1e-14 to 1e-8."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(1000 + seed)
    with safe_open(expert / "model.safetensors", framework="pt") as source:
        shapes = {name: source.get_slice(name).get_shape() for name in source.keys()}  # noqa: SIM118 - no mapping
    v = {name: 10.0 ** (-14 + 6 * torch.rand(shape, generator=generator)) for name, shape in sorted(shapes.items())}
    save_file(v, expert / "exp_avg_sq.safetensors")


def upload(models: Path, uri: str) -> None:
    """The layout of experts in S3: ``models/base`` and ``experts/<capability>/<run>``."""
    upload_folder(models / "base", f"{uri}/models/base")
    for name in EXPERTS:
        upload_folder(models / name, f"{uri}/experts/{name}/{RUN}", last=EXPERT_JSON)


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables without a row; making them takes seconds, copying them does not."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow-template") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def world(
    prefect_server: None, empty_mlflow: Path, s3_process: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[World]:
    """The experts in S3, for all tests of a file. Tests that change something there do so below a prefix of their own."""
    root = tmp_path_factory.mktemp("world")
    blank = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), str(root / "no-such-file"))
    with environment({**blank, **s3_process.env}), pytest.MonkeyPatch.context() as patch:
        for name in (
            "AWS_PROFILE",
            "AWS_ENDPOINT_URL",
            "AWS_SESSION_TOKEN",
            "AWS_REGION",
            "MLFLOW_TRACKING_URI",
            "OTA_HOME",
            "OTA_ARTIFACTS",
        ):
            patch.delenv(name, raising=False)
        bucket = f"flow-{uuid4().hex[:12]}"
        s3_process.create_bucket(bucket)
        models = write_experts(root / "models")
        upload(models, f"s3://{bucket}")
        suite, data = write_tiny_suite(root / "suite")
        database = root / "mlflow" / "mlflow.db"
        database.parent.mkdir()
        shutil.copy(empty_mlflow, database)
        yield World(
            uri=f"s3://{bucket}", models=models, home=root / "home", tracking_uri=f"sqlite:///{database}", suite=suite, data=data
        )


def s3_client() -> Any:
    """boto3's client of the server under test."""
    return s3.client()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts calls of the functions that do the stages' work: fetch, compress, mask, merge, trial (a merge into memory), score."""
    from ota_core.engine import engine
    from tasks import benchmark
    from tasks.evaluation.in_memory import MergedModel
    from tasks.storage import models as storage

    calls: Counter[str] = Counter()
    lock = threading.Lock()

    def count(owner: Any, name: str, label: str) -> None:
        whole: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            with lock:
                calls[label] += 1
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(storage, "fetch", "fetch")
    count(engine, "compress_moments", "compress")
    count(engine, "mask", "mask")
    count(engine, "merge_into", "merge")
    count(engine, "merge_into_memory", "trial")
    count(benchmark, "score_model", "score")
    count(MergedModel, "score", "score")
    return calls
