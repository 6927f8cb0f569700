"""Which of several ``checkpoint-N`` in a folder of training belongs to the weights beside them."""

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ota_core.artifact import EXPERT_JSON
from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import Checkpoint, read_json, weight_files
from ota_core.files.compare import same_weights

NUMBERED = re.compile(r"checkpoint-(\d+)")
STATE = "trainer_state.json"


@dataclass(frozen=True)
class Choice:
    """A checkpoint that was taken, and why, in words."""

    name: str
    others: int
    why: str

    @property
    def note(self) -> str:
        return f"second moments of {self.name}, {self.why} ({self.others} other checkpoint{'s' * (self.others != 1)} left aside)"


def choose(folder: Path, hits: Sequence[Path]) -> tuple[list[Path], Choice | None]:
    """Of what was found below a folder, that which belongs to its weights, and what was chosen; all of it where that is unclear."""
    beside = [hit for hit in hits if _checkpoint(folder, hit) is None]
    if beside:
        return beside, None
    names = sorted({str(_checkpoint(folder, hit)) for hit in hits})
    choice = chosen(folder, names) if len(names) > 1 else None
    return [hit for hit in hits if choice is None or _checkpoint(folder, hit) == choice.name], choice


def _checkpoint(folder: Path, hit: Path) -> str | None:
    """The checkpoint-* of the folder that holds a hit."""
    parts = hit.relative_to(folder).parts
    return parts[0] if parts and parts[0].startswith("checkpoint-") and (folder / parts[0]).is_dir() else None


def chosen(folder: Path, names: Sequence[str]) -> Choice | None:
    """The newest of these checkpoints below ``folder`` that fits its weights; None where none is seen to.

    A checkpoint fits that holds the same weights. Where one holds none, it fits when it was saved at the step of the weights: that of
    ``trainer_state.json`` or ``expert.json`` beside them.
    """
    own = _weights(folder)
    step = _step_of(folder)
    for name in sorted(names, key=lambda name: number_of(folder / name), reverse=True):
        its = _weights(folder / name)
        if own and its:
            if _same(own, its):
                return Choice(name, len(names) - 1, "which holds the same weights")
        elif step is not None and number_of(folder / name) == step:
            return Choice(name, len(names) - 1, f"as the weights are those of step {step}")
    return None


def number_of(folder: Path) -> int:
    """The step at which a checkpoint was saved: what its ``trainer_state.json`` says, else its name."""
    said = _global_step(folder)
    named = NUMBERED.fullmatch(folder.name)
    return said if said is not None else int(named[1]) if named else -1


def _step_of(folder: Path) -> int | None:
    said = _global_step(folder)
    if said is None and (folder / EXPERT_JSON).is_file():
        value = read_json(folder / EXPERT_JSON).get("step")
        said = value if isinstance(value, int) else None
    return said


def _global_step(folder: Path) -> int | None:
    if not (folder / STATE).is_file():
        return None
    value = read_json(folder / STATE).get("global_step")
    return value if isinstance(value, int) else None


Files = tuple[tuple[str, int, int], ...]
"""Name, size and time of each file of weights: what was compared once is not compared again."""


def _weights(folder: Path) -> tuple[str, Files] | None:
    try:
        files = weight_files(folder)
        return str(folder), tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    except (CheckpointError, OSError):
        return None


@lru_cache(maxsize=64)
def _same(one: tuple[str, Files], other: tuple[str, Files]) -> bool:
    try:
        with closing(Checkpoint(one[0])) as mine, closing(Checkpoint(other[0])) as theirs:
            return same_weights(mine, theirs)
    except CheckpointError:
        return False  # damaged weights, of which the checkpoint's own reader tells
