"""torchtune's ``recipe_state.pt``: the optimizer's state_dict beside the state of the recipe, by name where several processes trained.

From the public source: torchtune/training/checkpointing/_checkpointer.py and torchtune/training/_distributed.py. Written by hand from it.
"""

from pathlib import Path
from typing import Any

from ota_core.errors import MomentsError
from ota_core.files.byte_source import SourceOf
from ota_core.files.pickled.unpickle import SavedTensor
from ota_core.moments.base import Moments
from ota_core.moments.deepspeed.saved import V, beta2_of, mapping, open_saved, step_of
from ota_core.moments.foreign.translate import translated
from ota_core.moments.match import Layout
from ota_core.moments.pieces import PiecedMoments, Run


def open_tune(path: Path, layout: Layout, source_of: SourceOf | None) -> Moments:
    """v by name. Raises MomentsError for a state that numbers its parameters: torchtune's own order is not Hugging Face's."""
    file = open_saved(path, source_of)
    try:
        optimizer = mapping(mapping(file.saved, str(path)).get("optimizer"), f"{path}: optimizer")
        state = mapping(optimizer.get("state"), f"{path}: state")
        if not all(isinstance(name, str) for name in state):
            raise MomentsError(
                f"{path} numbers its parameters in torchtune's own order, which the file does not name; a run on several processes keeps "
                "names. Save the second moments by name as exp_avg_sq.safetensors, or measure them (ota estimate)"
            )
        v = {name: _v(path, name, entry) for name, entry in state.items()}
        runs = {name: [Run(file, tensor, 0, tensor.numel)] for name, tensor in v.items()}
        steps = {name: step_of(file, entry.get("step")) for name, entry in state.items()}
        shapes = {name: tensor.shape for name, tensor in v.items()}
        beta2 = beta2_of(optimizer.get("param_groups"), str(path))
        return translated(path, PiecedMoments(path, [file], runs, shapes, steps, beta2), layout)
    except BaseException:
        file.close()
        raise


def _v(path: Path, name: str, entry: Any) -> SavedTensor:
    tensor = entry.get(V) if isinstance(entry, dict) else None
    if not (isinstance(tensor, SavedTensor) and tensor.is_floating_point and tensor.contiguous):
        held = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise MomentsError(f"{path}: the state of {name!r} lacks a dense {V} (it holds: {held:.200}); Adam's was expected")
    return tensor
