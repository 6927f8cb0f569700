"""Which of a folder's optimizer states belong to a model: those that its second moments come from, and no others."""

import json
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from ota_core.artifact import EXPERT_JSON
from ota_core.errors import OtaError
from ota_core.moments import choice_in

# Subfolders of trainers that keep optimizer state there.
STATE_FOLDERS = ("optimizer*", "global_step*")
CHECKPOINT = "checkpoint-*"
POINTERS = ("latest", "latest_universal")
"""DeepSpeed's files that name the folder of the newest step beside them."""
OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
BESIDE_WEIGHTS = ("exp_avg_sq*.safetensors", *OPTIMIZERS)
_STATE = "trainer_state.json"

Taken = str | None
"""The checkpoint-* whose optimizer belongs to the weights, of several."""


def is_state_folder(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in STATE_FOLDERS)


def checkpoint_of(name: str) -> str | None:
    """The checkpoint-* that a file lies in, by its name relative to the model's folder."""
    first, _, rest = name.partition("/")
    return first if rest and fnmatchcase(first, CHECKPOINT) else None


def belonging(names: Collection[str], taken: Taken = None) -> list[str]:
    """These files of a model without the optimizer states that its second moments do not come from.

    What lies beside the weights comes first, then what lies in folders of states beside them, then what a checkpoint-* holds.
    """
    beside = any(fnmatchcase(name, pattern) for name in names for pattern in BESIDE_WEIGHTS)
    folders = any("/" in name and is_state_folder(name.split("/")[0]) for name in names)

    def belongs(name: str) -> bool:
        if checkpoint := checkpoint_of(name):
            return not beside and not folders and taken in (None, checkpoint)
        if "/" in name and is_state_folder(name.split("/")[0]):
            return not beside
        return name not in POINTERS or (folders and not beside)

    return [name for name in names if belongs(name)]


def taken_in(folder: Path) -> Taken:
    """Which of several checkpoint-* in a local folder fits its weights; None where there is nothing to choose, or it is unclear."""
    try:
        choice = choice_in(folder)
    except OtaError:  # whoever opens the second moments says what is wrong
        return None
    return choice.name if choice else None


def taken_of(contents: Mapping[str, str], read: Callable[[str], bytes | None]) -> Taken:
    """The same for a listing: nothing but ``trainer_state.json`` and ``expert.json`` is read.

    contents: name to what stands for a file's content, such as its size and ETag.
    """
    checkpoints = {one for name in contents if (one := checkpoint_of(name)) and name.split("/")[1] != _STATE}
    if len(checkpoints) < 2:
        return None
    own = {name: content for name, content in contents.items() if "/" not in name and _is_weight(name)}
    step = _number(read(_STATE), "global_step") if _STATE in contents else None
    if step is None and EXPERT_JSON in contents:
        step = _number(read(EXPERT_JSON), "step")
    for one in sorted(
        checkpoints, key=lambda one: int(one.rpartition("-")[2]) if one.rpartition("-")[2].isdigit() else -1, reverse=True
    ):
        its = {name.removeprefix(f"{one}/"): content for name, content in contents.items() if name.startswith(f"{one}/")}
        its = {name: content for name, content in its.items() if "/" not in name and _is_weight(name)}
        if own == its if own and its else step is not None and one == f"checkpoint-{step}":
            return one
    return None


def _is_weight(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ("model*.safetensors", "pytorch_model*.bin"))


def _number(content: bytes | None, key: str) -> int | None:
    try:
        value = json.loads(content or b"{}").get(key)
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, int) else None
