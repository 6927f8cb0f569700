"""The demo's steps as Prefect tasks: data, training, upload; and where base and experts lie in S3."""

from pathlib import Path
from typing import Any

from prefect import task

from ota_core.artifact import ArtifactRef
from tasks.artifacts.step import Step
from tasks.artifacts.store import BuildResult, store_of
from tasks.local.demo.data import write_data
from tasks.local.demo.process import in_process
from tasks.local.demo.progress import Training
from tasks.local.demo.train import DemoSettings, train_base, train_expert, write_manifest
from tasks.settings import Places
from tasks.storage.cache import link_name
from tasks.storage.models import EXPERT_JSON, upload_folder

BUCKET = "ota-demo"
MODEL = "model"


def base_uri(seed: int) -> str:
    """Where the base lies in S3."""
    return f"s3://{BUCKET}/models/seed{seed}"


def expert_uri(capability: str, seed: int) -> str:
    """Where an expert lies in S3."""
    return f"s3://{BUCKET}/experts/{capability}/seed{seed}"


@task(name="make data", task_run_name="make data")
def make_data(where: Places, settings: DemoSettings, seed: int) -> ArtifactRef:
    """Training, validation and test data of the five capabilities."""
    config = {"seed": seed, "version": settings.version, "data": settings.data.model_dump(mode="json")}

    def build(folder: Path) -> BuildResult:
        write_data(folder / "data", seed=seed, settings=settings.data)
        return BuildResult()

    return Step.of("data", config, {}).produce(where, build)


@task(name="train", task_run_name="train {capability}")
def train(
    where: Places, settings: DemoSettings, seed: int, data: ArtifactRef, base: ArtifactRef | None, capability: str
) -> ArtifactRef:
    """The base (capability ``base``) or one expert, with the optimizer state that the Trainer leaves; kept once it is trained."""
    store = store_of(where)
    part = settings.base if base is None else settings.expert
    config = {"capability": capability, "seed": seed, "version": settings.version, "training": part.model_dump(mode="json")}
    config["model"] = settings.model.model_dump(mode="json")
    inputs = {"data": data.fingerprint} | ({"base": base.fingerprint} if base else {})

    def build(folder: Path) -> BuildResult:
        source = store.local_path(data) / "data"
        progress = Training(f"training of {'the base' if base is None else capability}")
        options: dict[str, Any] = {"seed": seed, "training": part, "progress": progress}
        if base is None:
            trained = in_process(train_base, source, folder / MODEL, model=settings.model, **options)
        else:
            trained = in_process(train_expert, capability, source, store.local_path(base) / MODEL, folder / MODEL, **options)
            write_manifest(folder / MODEL, trained, base_uri(seed))
        return BuildResult(provenance=trained.model_dump(mode="json"))

    return Step.of("checkpoint", config, inputs).produce(where, build)


@task(name="upload", task_run_name="upload {capability}")
def upload(where: Places, model: ArtifactRef, capability: str, seed: int) -> str:
    """Put a trained model into S3, an expert's ``expert.json`` last."""
    folder = store_of(where).local_path(model) / MODEL
    if capability == "base":
        upload_folder(folder, base_uri(seed))
        return base_uri(seed)
    upload_folder(folder, expert_uri(capability, seed), last=EXPERT_JSON)
    return expert_uri(capability, seed)


@task(name="upload", task_run_name="upload data")
def upload_data(where: Places, data: ArtifactRef, seed: int) -> str:
    """Put the data into S3, where benchmarks on other machines find them."""
    uri = f"s3://{BUCKET}/data/seed{seed}"
    upload_folder(store_of(where).local_path(data) / "data", uri)
    return uri


def link_models(where: Places, models: dict[str, ArtifactRef]) -> None:
    """Names for the trained models on this machine, ``demo/models/<capability>``, for trying ``ota merge`` without S3."""
    folder = where.home / "demo" / "models"
    for name, model in models.items():
        link_name(folder / name, store_of(where).local_path(model) / MODEL)
