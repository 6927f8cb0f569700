"""The door: the file of one optimizer's state, and the reader for what it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ota_core.errors import MomentsError, OtaError
from ota_core.files.byte_source import SourceOf
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import Refused
from ota_core.moments.base import Moments
from ota_core.moments.match import Layout
from ota_core.moments.trainer.adafactor import adafactor_moments
from ota_core.moments.trainer.kinds import Factors, NoSecondMoment, second_moment
from ota_core.moments.trainer.moments import TrainerMoments
from ota_core.moments.trainer.names import names_of
from ota_core.moments.trainer.refusals import ESTIMATE, PROJECTED, nothing_kept, some
from ota_core.moments.trainer.stored import Stored


def open_optimizer(path: Path, layout: Layout = None, source_of: SourceOf | None = None) -> Moments:
    """v by parameter name from a file of torch.save that holds an optimizer's ``state_dict()`` (optimizer.pt, optimizer.bin).

    Tensors are read by ranges (torch's old format is loaded whole). ``layout``, or a function that builds it, is needed for numbered
    parameters only. Raises MomentsError for what is damaged, would run code, holds no v, or cannot be matched to names.
    """
    file = _load(path, source_of)
    try:
        return open_state(path, file, file.saved, layout)
    except BaseException:
        file.close()
        raise


def open_state(path: Path, file: TorchFile, saved: Any, layout: Layout = None) -> Moments:
    """The same from a file that is open: ``saved`` is the part of it that holds ``state`` and ``param_groups``. It closes the file."""
    groups, state = _groups_and_state(path, saved)
    group_of = {key: group for group in groups for key in group["params"]}
    v = _second_moments(path, groups, state, group_of)
    try:
        file.check(tensor for one in v.values() for tensor in _tensors(one))
    except ValueError as error:
        raise MomentsError(f"{path}: {error}. Fetch it again, or save the optimizer's state_dict again") from None
    names = names_of(path, groups, {key: one.shape for key, one in v.items()}, layout)
    if any(isinstance(one, Factors) for one in v.values()):
        return adafactor_moments(path, file, groups, state, {key: (names[key], one) for key, one in v.items()})
    stored = {names[key]: one for key, one in v.items() if not isinstance(one, Factors)}
    return TrainerMoments(path, file, groups, stored, {names[key]: (state[key], group_of[key]) for key in v})


def _tensors(one: Stored | Factors) -> list[Any]:
    return [one.row, one.col] if isinstance(one, Factors) else list(one.tensors())


def _load(path: Path, source_of: SourceOf | None) -> TorchFile:
    """The file, opened. Only tensors and plain containers are unpickled."""
    try:
        return TorchFile(path, source_of)
    except Exception as error:  # a damaged or hostile pickle can raise anything; nothing of it has been executed
        if isinstance(error, OtaError):
            raise
        foreign = error.name if isinstance(error, Refused) else ""
        if "projector" in foreign.lower():
            raise MomentsError(f"{path}: the state of its parameters {PROJECTED}. {ESTIMATE}") from None
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else "no reason given"
        what = (
            f"it names {foreign}"
            if foreign
            else f"{type(error).__name__}: {reason:.300}. It is truncated, damaged, or holds more than tensors and plain containers"
        )
        raise MomentsError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as an optimizer state: {what}, which "
            "is refused because loading it could run code. Fetch it again, or save the second moments by name as exp_avg_sq.safetensors"
        ) from None


def _groups_and_state(path: Path, saved: Any) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    if isinstance(saved, dict) and "offloaded" in saved:
        raise MomentsError(
            f"{path} is of torchao's CPUOffloadOptimizer, which saves a state for each parameter and no order among them. Save the second "
            "moments by name as exp_avg_sq.safetensors"
        )
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
        seen = f"the keys {some(list(saved))}" if isinstance(saved, dict) else f"a {type(saved).__name__}"
        raise MomentsError(f"{path} holds {seen}; an optimizer's state_dict with state and param_groups was expected")
    groups, state = saved["param_groups"], saved["state"]
    good = isinstance(groups, list) and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
    if not good or not isinstance(state, dict) or not all(isinstance(entry, dict) for entry in state.values()):
        raise MomentsError(f"{path}: param_groups or state is not built as torch builds them; save the state_dict again")
    return groups, state


def _second_moments(
    path: Path, groups: list[dict[str, Any]], state: Mapping[Any, Mapping[str, Any]], group_of: Mapping[Any, Mapping[str, Any]]
) -> dict[Any, Stored | Factors]:
    """Key to v; parameters that were never updated have no state and are left out."""
    v: dict[Any, Stored | Factors] = {}
    problems = []
    for key, entry in state.items():
        if not entry:
            continue
        try:
            v[key] = second_moment(entry, group_of.get(key, {}))
        except NoSecondMoment as problem:
            problems.append(f"the state of parameter {key!r} {problem}")
    if problems:
        more = f" ({len(problems) - 1} more parameters like it)" if len(problems) > 1 else ""
        raise MomentsError(f"{path}: {problems[0]}{more}. {ESTIMATE}, or supply exp_avg_sq.safetensors")
    if not v:
        raise MomentsError(f"{path} {nothing_kept(groups)}")
    return v
