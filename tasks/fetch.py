"""Fetching: bring one checkpoint to this machine, verified."""

from typing import ClassVar, Literal

from ota_core.compute.stream import Progress
from tasks.artifacts.step import Work, place
from tasks.settings import Places
from tasks.storage import models as storage
from tasks.storage.models import Fetched


class FetchJob(Work):
    """Bring one checkpoint to this machine."""

    turn: ClassVar[Literal["engine", "benchmark"] | None] = None
    kind: Literal["fetch"] = "fetch"
    source: str
    identity: str | None
    """Of what lies at the source now (``identity_of_source``); None where no cheap look tells, and a result is not remembered."""

    @property
    def name(self) -> str:
        return f"fetch {self.source}"

    def key(self, where: Places) -> str | None:
        return f"ota-fetch3-{self.identity}-{place(where.cache)}" if self.identity else None

    def run(self, where: Places, device: str = "cpu", progress: Progress | None = None) -> Fetched:
        """The checkpoint in this machine's cache. Raises StorageError."""
        tell = (lambda done, total: progress(self.name, done, total)) if progress else None
        return storage.fetch(self.source, cache=where.cache, progress=tell)
