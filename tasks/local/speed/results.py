"""What the benchmark found, as it stands in ``bench.json``, and what follows from it: medians, ratios to the floor, targets met."""

from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict, computed_field

from ota_core.frozen import Frozen
from tasks.local.speed.machine import Machine
from tasks.local.speed.measure import Floor, FloorRound, Run


class Target(Frozen):
    """What a case should reach."""

    kind: Literal["ratio", "seconds", "overhead", "against"]
    """Wall time as a multiple of the floor; wall time in seconds; seconds beyond the sum of the stages; seconds of the stage as a multiple
    of those of the case that does the same from one file."""
    limit: float


class CaseResult(BaseModel):
    """One case at one size: every run, its floor, and what follows."""

    # What follows is written for other readers, and computed again when it is read back.
    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    what: str
    parameters: int
    experts: int
    command: list[str] = []
    input_bytes: int = 0
    output_bytes: int = 0
    planned_read_bytes: int | None = None
    """Tensor bytes that the stage reads in all its passes, by the accounting of ``ota plan``; None where it has none."""
    in_page_cache: bool = True
    """Whether the inputs fit the memory; where not, time is the disk's."""
    runs: list[Run] = []
    floor: Floor | None = None
    """None for a case that merges nothing."""
    target: Target | None = None
    """What is promised for this size."""
    stages_sum: float | None = None
    """Of a fresh flow: the sum of its stages without Prefect, in seconds."""
    one_file_seconds: float | None = None
    """Of a case that reads shards: seconds of reading the same from one file."""
    skipped: str = ""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def seconds(self) -> float | None:
        """Median wall time of the command."""
        return median(run.seconds for run in self.runs) if self.runs else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cpu_seconds(self) -> float | None:
        """Median of user and system time together."""
        return median(run.user_seconds + run.system_seconds for run in self.runs) if self.runs else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def stage_seconds(self) -> float | None:
        """Median of what the command says of its stages, without interpreter, imports and looking up inputs."""
        said = [sum(run.stage_seconds.values()) for run in self.runs if run.stage_seconds]
        return median(said) if said else None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def peak_bytes(self) -> int | None:
        """The largest peak of all runs."""
        return max((run.peak_bytes for run in self.runs), default=None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def command_ratio(self) -> float | None:
        """Wall time of the command ÷ the floor."""
        return self._ratio(self.seconds, fsync=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def stage_ratio(self) -> float | None:
        """Seconds of the stage ÷ the floor."""
        return self._ratio(self.stage_seconds, fsync=True)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def stage_ratio_without_fsync(self) -> float | None:
        """Seconds of the stage, its own fsync included ÷ the floor without fsync."""
        return self._ratio(self.stage_seconds, fsync=False)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def overhead_seconds(self) -> float | None:
        """Of a fresh flow: wall time beyond the sum of its stages."""
        return None if self.seconds is None or self.stages_sum is None else self.seconds - self.stages_sum

    @computed_field  # type: ignore[prop-decorator]
    @property
    def one_file_ratio(self) -> float | None:
        """Of a case that reads shards: its seconds ÷ those from one file."""
        return None if self.stage_seconds is None or not self.one_file_seconds else self.stage_seconds / self.one_file_seconds

    @computed_field  # type: ignore[prop-decorator]
    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none, or nothing was measured."""
        if self.target is None:
            return None
        reached = {
            "ratio": self.command_ratio, "seconds": self.seconds, "overhead": self.overhead_seconds, "against": self.one_file_ratio,
        }[self.target.kind]  # fmt: skip
        return None if reached is None else reached <= self.target.limit

    def _ratio(self, seconds: float | None, *, fsync: bool) -> float | None:
        if seconds is None or self.floor is None:
            return None
        return seconds / (self.floor.total if fsync else self.floor.read + self.floor.write)


class Combination(Frozen):
    """One size with one number of experts."""

    billions: float
    parameters: int
    experts: int
    build_seconds: float
    cases: list[CaseResult]
    floor_rounds: list[FloorRound]


class Bench(Frozen):
    """``bench.json``."""

    version: int = 2
    machine: Machine
    floor_definition: str
    notes: list[str]
    combinations: list[Combination]
