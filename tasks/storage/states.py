"""Which of a folder's optimizer states belong to a model: those that its second moments come from, and no others."""

import json
import re
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from ota_core.artifact import EXPERT_JSON
from ota_core.errors import OtaError
from ota_core.moments import choice_in

DCP = (".metadata", "*.distcp")
"""Files of torch.distributed.checkpoint, which may be the folder itself."""
# Subfolders of trainers that keep optimizer state there: accelerate and nanotron, DeepSpeed (its universal parameters below zero/, too).
_ANY_FILE = ("optimizer*", "global_step*", "zero")
# Those whose names others use as well, with the files that count in them: torchtitan, OLMo-core, torchtune.
_KNOWN_FILES = {"step-*": DCP, "model_and_optim": DCP, "recipe_state": ("recipe_state.pt",)}
STATE_FOLDERS = (*_ANY_FILE, *_KNOWN_FILES)
_STEP = "step-*"
_WEIGHTS_TOO = "model_and_optim"  # OLMo-core keeps weights and optimizer in one
# nanotron: a step's folder, or several with their numbers as names beside latest.txt.
_NANOTRON = re.compile(
    r"(?P<step>(?:\d+/)?)(?:optimizer/(?P<rank>optimizer_pp-[^/]+\.pt|optimizer_config\.json)|model/.+|model_config\.json)"
)
NANOTRON_LATEST = "latest.txt"
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


def in_state_folder(folder: str, base: str) -> bool:
    """Whether a file of this name counts in this folder of states; folders that are no state's say nothing."""
    patterns = next((files for pattern, files in _KNOWN_FILES.items() if fnmatchcase(folder, pattern)), ("*",))
    return any(fnmatchcase(base, pattern) for pattern in patterns)


def is_nanotron_file(name: str) -> bool:
    """Whether nanotron may have written this file, by its name relative to the model's folder."""
    return name == NANOTRON_LATEST or (
        _NANOTRON.fullmatch(name) is not None and (not name.partition("model/")[2] or name.endswith(".safetensors"))
    )


def checkpoint_of(name: str) -> str | None:
    """The checkpoint-* that a file lies in, by its name relative to the model's folder."""
    first, _, rest = name.partition("/")
    return first if rest and fnmatchcase(first, CHECKPOINT) else None


def belonging(names: Collection[str], taken: Taken = None) -> list[str]:
    """These files of a model without the optimizer states that its second moments do not come from.

    What lies beside the weights comes first, then what lies in folders of states beside them, then what a checkpoint-* holds. A folder with
    the weights in it belongs in any case. Of several step-* without a word which is meant, the descriptions alone are kept: whoever opens the
    second moments lists them and asks.
    """
    beside = any(fnmatchcase(name, pattern) for name in names for pattern in BESIDE_WEIGHTS)
    nanotron = _of_nanotron(names)
    folders = bool(nanotron) or any(_is_state(name) for name in names)
    weights = any(_is_weight(name) or fnmatchcase(name, "pytorch_model_fsdp*/.metadata") for name in names)
    steps = {name.split("/")[0] for name in names if "/" in name and fnmatchcase(name.split("/")[0], _STEP)}

    def belongs(name: str) -> bool:
        first = name.split("/")[0] if "/" in name else ""
        if checkpoint := checkpoint_of(name):
            return not beside and not folders and taken in (None, checkpoint)
        if not weights and (first == _WEIGHTS_TOO or _is_dcp(name)):
            return True
        if first in steps and len(steps) > 1 and not name.endswith(".metadata"):
            return False
        if is_nanotron_file(name) and not (first and is_state_folder(first) and not nanotron):
            return name in nanotron and not beside
        if _is_state(name):
            return not beside
        return name not in POINTERS or (folders and not beside)

    return [name for name in names if belongs(name)]


def _is_dcp(name: str) -> bool:
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in DCP)


def _is_state(name: str) -> bool:
    return _is_dcp(name) or ("/" in name and is_state_folder(name.split("/")[0]))


def _of_nanotron(names: Collection[str]) -> set[str]:
    """The files of nanotron's newest step, where there is one: its weights only where they say what the optimizer does not."""
    found = {name: match for name in names if (match := _NANOTRON.fullmatch(name))}
    ranks = [match for match in found.values() if (match["rank"] or "").startswith("optimizer_pp-")]
    if not ranks:
        return set()
    newest = max((match["step"] for match in ranks), key=lambda step: int(step.rstrip("/") or "0"))
    if any(not match["step"] for match in ranks):
        newest = ""
    # How tensor parallelism and ZeRO cut a parameter is said beside its weights.
    cut = any("_dp-" in match["rank"] or not re.search(r"_tp-\d+-of-1[._-]", match["rank"]) for match in ranks)
    own = {
        name
        for name, match in found.items()
        if match["step"] == newest and (cut or not name.removeprefix(newest).startswith("model/"))
    }
    return own | ({NANOTRON_LATEST} if newest and NANOTRON_LATEST in names else set())


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
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in ("model*.safetensors", "pytorch_model*.bin"))


def _number(content: bytes | None, key: str) -> int | None:
    try:
        value = json.loads(content or b"{}").get(key)
    except (ValueError, AttributeError):
        return None
    return value if isinstance(value, int) else None
