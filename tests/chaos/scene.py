"""A scene: one command, the state that it finds, and what must hold between a kill and the second run, and after that."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ota_core.artifact import read_record
from ota_core.errors import ArtifactError
from tests.chaos.facts import RECORD, Facts, differences, hidden, of_folder

LIGHT = ("numba.np.arraymath", "filelock", "huggingface_hub", "tests.chaos.process", "tasks.merging.inputs", "tasks.merging.opened", "tasks.merging.stages", "ota_core.engine.engine", "ota_core.moments",
         "tasks.storage.streaming.streams", "ota_core.fused.ota", "boto3", "tasks.artifacts.store", "tasks.experts.push")  # fmt: skip
TRACKED = (*LIGHT, "mlflow", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store", "alembic.runtime.migration", "pandas",
           "tasks.tracking.outbox", "tasks.registry.publish", "tasks.registry.retention.retention")  # fmt: skip
FLOWS = (*TRACKED, "torch", "transformers", "prefect", "lm_eval.evaluator", "flows.merge", "optuna.storages", "flows.search")


@dataclass
class Scene:
    """One command. Its working folder has the same path in every trial: paths are in records and in MLflow."""

    root: Path
    """Of everything: ``inputs`` are shared, and only read."""
    name: ClassVar[str]
    preload: ClassVar[Sequence[str]] = LIGHT
    share: ClassVar[float] = 1
    """How many of the kills it gets, beside the others."""
    reference: Facts = field(default_factory=dict)
    volatile: set[str] = field(default_factory=set)
    """What two whole runs differ in."""

    @property
    def folder(self) -> Path:
        return self.root / self.name / "work"

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"

    @property
    def env(self) -> dict[str, str]:
        """More of the command's environment."""
        return {}

    @property
    def words(self) -> list[str]:
        """The command's."""
        raise NotImplementedError

    def make(self) -> None:
        """Put what the command finds into the empty working folder, once."""

    def facts(self) -> Facts:
        """What there is now, of what the command makes."""
        raise NotImplementedError

    def half(self) -> Iterator[str]:
        """What a reader sees now that he must not see, after a kill."""
        raise NotImplementedError

    def left(self) -> list[str]:
        """What nobody needs any more, after the second run."""
        return hidden(self.folder)

    def is_done(self, code: int, said: str) -> bool:
        """Whether the second run ended well."""
        return code == 0

    def lay(self) -> None:
        """The state before, again."""
        before = self.folder.with_name("before")
        if not before.is_dir():
            self.folder.mkdir(parents=True)
            self.make()
            self.folder.rename(before)
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(before, self.folder, symlinks=True)

    def differs(self) -> list[str]:
        """From what two whole runs left."""
        return differences(self.facts(), self.reference, self.volatile)


class ToFolder(Scene):
    """What writes a folder or a file ``out`` beside its home."""

    out: ClassVar[str] = "out"
    overwrite: ClassVar[bool] = False
    older: Facts

    @property
    def target(self) -> Path:
        return self.folder / self.out

    def facts(self) -> Facts:
        return of_folder(self.target) if self.target.exists() else {}

    def lay(self) -> None:
        super().lay()
        self.older = self.facts()

    def half(self) -> Iterator[str]:
        found = self.facts()
        if found != self.older and (problems := differences(found, self.reference, self.volatile)):
            yield f"{self.out} is neither what was there nor the whole output: {problems[0]}"

    def is_done(self, code: int, said: str) -> bool:
        """Without --overwrite a first run that was killed after its output had taken its place leaves nothing to do."""
        return code == 0 or (code == 2 and not self.overwrite and f"{self.target} exists already" in said)

    def left(self) -> list[str]:
        return [name for name in hidden(self.folder) if not name.startswith("home/")]


def whole_artifacts(root: Path, reference: Facts, volatile: set[str]) -> Iterator[str]:
    """Folders below a root of artifacts that can be found, and do not hold what they should."""
    for folder in sorted(root.glob("*/*")):
        if folder.name.startswith("."):
            continue
        label = f"artifacts/{folder.relative_to(root).as_posix()}/"
        try:
            read_record(folder)
        except ArtifactError as error:
            yield f"{label} can be found and is not whole: {error}"
            continue
        made = of_folder(folder, label)
        for name, value in made.items():
            if name in reference and name not in volatile and reference[name] != value and not name.endswith(RECORD):
                yield f"{name} is {value} instead of {reference[name]}"
