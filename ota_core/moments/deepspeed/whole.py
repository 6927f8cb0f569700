"""ZeRO stage 0: the optimizer's own state_dict, which numbers the parameters, within ``mp_rank_00_model_states.pt``."""

from pathlib import Path
from typing import Any

from ota_core.errors import MomentsError
from ota_core.files.byte_source import SourceOf
from ota_core.files.pickled.unpickle import SavedTensor
from ota_core.moments.deepspeed.saved import V, beta2_of, mapping, open_saved, step_of
from ota_core.moments.match import Layout, match_names
from ota_core.moments.pieces import PiecedMoments, Run


def open_whole(folder: Path, path: Path, layout: Layout, source_of: SourceOf | None) -> PiecedMoments:
    """v by parameter name. Raises MomentsError when there is no state, or its numbers cannot be matched to names."""
    file = open_saved(path, source_of)
    try:
        optimizer = mapping(file.saved, str(path)).get("optimizer")
        if not isinstance(optimizer, dict) or not optimizer.get("state"):
            raise MomentsError(
                f"{path} holds no optimizer state, and no *_optim_states.pt of the ranks lie beside it: fetch them, or take a checkpoint "
                "that was saved with its optimizer"
            )
        if "param_groups" not in optimizer:
            raise MomentsError(
                f"{path} holds the optimizer of half precision training without ZeRO, which joins its parameters in an order that "
                "the file does not say. Train with ZeRO 1 or with bf16, or measure second moments instead (ota estimate)"
            )
        groups, state = optimizer["param_groups"], mapping(optimizer["state"], f"{path}: state")
        v = {key: _v(path, key, entry) for key, entry in state.items()}
        if layout is None:
            raise MomentsError(
                f"{path} numbers its parameters, and without the model's configuration the numbers cannot be matched to names: put the "
                "expert's config.json into its folder"
            )
        shapes = {key: tensor.shape for key, tensor in v.items()}
        names = match_names(path, groups, shapes, layout() if callable(layout) else layout)
        runs = {names[key]: [Run(file, tensor, 0, tensor.numel)] for key, tensor in v.items()}
        in_groups = [group.get("step") for group in groups]
        steps = {names[key]: step_of(file, entry.get("step"), *in_groups) for key, entry in state.items()}
        held = {names[key]: shape for key, shape in shapes.items()}
        return PiecedMoments(folder, [file], runs, held, steps, beta2_of(groups, str(path)))
    except BaseException:
        file.close()
        raise


def _v(path: Path, key: Any, entry: Any) -> SavedTensor:
    tensor = entry.get(V) if isinstance(entry, dict) else None
    if not (isinstance(tensor, SavedTensor) and tensor.is_floating_point and tensor.contiguous):
        held = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise MomentsError(
            f"{path}: the state of parameter {key!r} lacks a dense {V} (it holds: {held:.200}); Adam's was expected"
        )
    return tensor
