"""A model's parameters in its own order, from its configuration alone: what turns an optimizer's numbers into names."""

import threading
from pathlib import Path
from typing import Any, cast

from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import Checkpoint
from ota_core.moments import ParameterLayout

SHOWN = 4
# transformers imports its parts on first use, which several threads must not do at once, and building a model sets torch's default
# dtype for the whole process.
_ONE_AT_A_TIME = threading.Lock()


def parameter_layout(folder: Path) -> ParameterLayout:
    """The parameters of the model in ``folder``, as the Trainer's optimizer numbers them. No network, no weights in memory.

    Code that the folder brings along does not run. Raises CheckpointError when the configuration cannot be built, or when the checkpoint's
    tensors are not called and shaped like the model's parameters.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json, from which the order of the parameters in the optimizer follows: copy the expert's "
            "config.json there, or save the second moments by name as exp_avg_sq.safetensors"
        )
    with _ONE_AT_A_TIME:
        model = _skeleton(folder)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        decayed = frozenset(_decayed(model)) & shapes.keys()
    layout = ParameterLayout(shapes=shapes, decayed=decayed, tied=_tied(model))
    _check_against_checkpoint(folder, type(model).__name__, layout)
    return layout


def _skeleton(folder: Path) -> Any:
    """The model on the meta device: modules, names and shapes without storage."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return cast(Any, AutoModelForCausalLM).from_config(config, trust_remote_code=False)
    except Exception as error:  # the architectures' own code runs here and raises what it likes
        reason = str(error).strip().splitlines() or ["no reason given"]
        raise CheckpointError(
            f"{folder / 'config.json'} cannot be built as a causal language model: {type(error).__name__}: {reason[0]:.300} "
            "Correct the configuration, or save the second moments by name as exp_avg_sq.safetensors, which needs none"
        ) from error


def _decayed(model: Any) -> list[str]:
    """Names of the parameters with weight decay, by the rule of the installed Trainer."""
    from transformers import Trainer

    class Rule(Trainer):
        def __init__(self) -> None:
            """The rule reads the model alone; a whole Trainer would move it to a device and set the process's seeds."""

    return list(Rule().get_decay_parameter_names(model))


def _tied(model: Any) -> dict[str, str]:
    """Alias to the first name of the same parameter."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), name)
        if kept != name:
            tied[name] = kept
    return tied


def _check_against_checkpoint(folder: Path, architecture: str, layout: ParameterLayout) -> None:
    """Second moments must bear the checkpoint's names; transformers renames or fuses tensors of some architectures on loading."""
    checkpoint = Checkpoint(folder)
    try:
        held = {name: tuple(checkpoint.info(name).shape) for name in checkpoint.names()}
    finally:
        checkpoint.close()
    names = {name: {name, *(alias for alias, kept in layout.tied.items() if kept == name)} for name in layout.shapes}
    missing = [name for name, same in names.items() if not same & held.keys()]
    if missing:
        unknown = sorted(held.keys() - layout.shapes.keys() - layout.tied.keys())
        raise CheckpointError(
            f"{folder}: {architecture} has {len(missing)} parameters that the checkpoint does not name ({_some(missing)}); the "
            f"checkpoint holds {len(unknown)} others ({_some(unknown)}). transformers converts such weights on loading, so the "
            "numbers of the optimizer cannot be matched to its tensors: save the second moments by the names in the checkpoint "
            "as exp_avg_sq.safetensors, or correct config.json if it is not this checkpoint's"
        )
    differ = [
        f"{name} has {list(held[name])} in the checkpoint, {list(layout.shapes[parameter])} by config.json"
        for parameter, same in names.items()
        for name in sorted(same & held.keys())
        if held[name] != layout.shapes[parameter]
    ]
    if differ:
        raise CheckpointError(f"{folder}: {len(differ)} tensors contradict config.json: {_some(differ)}. Correct config.json")


def _some(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (", …" if len(items) > SHOWN else "") if items else "none"
