"""What a stage is: what it will leave, by its fingerprint, from what, and how it is done on the machine that runs it."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from ota_core.artifact import ArtifactRef, Kind, fingerprint
from ota_core.compute.stream import Progress
from ota_core.frozen import Frozen
from tasks.artifacts.store import BuildResult, store_of
from tasks.settings import Places


class Step(Frozen):
    """One stage's output before it is computed: what it will be, by its fingerprint."""

    kind: Kind
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]

    @classmethod
    def of(cls, kind: Kind, config: dict[str, Any], inputs: dict[str, str]) -> Self:
        """The step of an output that configuration and inputs decide."""
        return cls(kind=kind, fingerprint=fingerprint(kind, config, inputs), config=config, inputs=inputs)

    def produce(self, where: Places, build: Callable[[Path], BuildResult]) -> ArtifactRef:
        """The artifact: built in an empty folder, or found. Raises OtaError."""
        return store_of(where).produce(self.kind, self.fingerprint, config=self.config, inputs=self.inputs, build=build)


class Work(Frozen):
    """Something to do here or on another machine: it travels as JSON, and holds every option that decides the bytes."""

    turn: ClassVar[Literal["engine", "benchmark"] | None] = "engine"
    """Of two at once in one process that have the same, one waits."""
    kind: str
    """By which its class is known."""

    @property
    def name(self) -> str:
        """For people: of a task run, of a run on another machine."""
        raise NotImplementedError

    def key(self, where: Places) -> str | None:
        """What a result is remembered by: what decides it, and where it lies; None for what is never remembered."""
        raise NotImplementedError

    def run(self, where: Places, device: str, progress: Progress | None = None) -> Any:
        """Do it on this machine, or find it done. Raises OtaError."""
        raise NotImplementedError

    def abroad(self) -> Self:
        """The same for another machine: without the folders of this one."""
        return self


class Stage(Work):
    """Work that leaves an artifact."""

    step: Step
    """What it will leave."""

    def key(self, where: Places) -> str:
        """A remembered result is a reference into one root of artifacts; a run with another root must not be given it."""
        return f"ota-{self.step.kind}-{self.step.fingerprint}-{place(where.artifacts)}"

    def find(self, where: Places) -> ArtifactRef | None:
        """What it left, where it was done. Raises StorageError when the root cannot be read."""
        return store_of(where).find(self.step.kind, self.step.fingerprint)

    def produce(self, where: Places, build: Callable[[Path], BuildResult]) -> ArtifactRef:
        """The artifact: built in an empty folder, or found. Raises OtaError."""
        return self.step.produce(where, build)


def place(root: str | Path) -> str:
    """A short name for a root of artifacts or a cache."""
    return hashlib.sha256(str(root).encode()).hexdigest()[:8]
