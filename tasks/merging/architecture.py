"""A model's parameters in its own order, from its configuration alone: what turns an optimizer's numbers into names."""

import re
import threading
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ota_core.errors import CheckpointError
from ota_core.files.byte_source import SourceOf
from ota_core.files.checkpoint import Checkpoint, read_json
from ota_core.files.layouts.stored import Loaded
from ota_core.moments import Moments, ParameterLayout, open_moments
from ota_core.moments.base import Shape
from ota_core.plan.vocabulary.match import names_in
from ota_core.reading import quoted
from tasks.merging.listed_experts import listed
from tasks.merging.trained import changed_parameters

if TYPE_CHECKING:
    from tasks.merging.conversion import Conversion

SHOWN = 4
TODAY = "today's Trainer"
# transformers imports its parts on first use, which several threads must not do at once, and building a model sets torch's default
# dtype for the whole process.
_ONE_AT_A_TIME = threading.Lock()


BaseFolder = Path | Callable[[], Path] | None
"""The folder of the base, or a function that brings it when it is needed."""


def expert_moments(path: Path, folder: Path, base: BaseFolder = None, source_of: SourceOf | None = None) -> Moments:
    """The second moments in ``path`` under the names of the weights in ``folder``. Raises MomentsError, CheckpointError."""
    layout = partial(parameter_layout, folder, base, source_of) if (folder / "config.json").is_file() else None
    return open_moments(path, layout=layout, source_of=source_of, tensors=names_in(folder, source_of))


def parameter_layout(folder: Path, base: BaseFolder = None, source_of: SourceOf | None = None) -> ParameterLayout:
    """The parameters of the model in ``folder``, as the Trainer's optimizer numbers them. No network, no weights in memory.

    base: the model that training began with; where it froze parameters, weights that differ from the base's say which were trained.
    source_of: where the bytes of weights come from, if not from the files themselves.
    Code that the folder brings along does not run. Raises CheckpointError when the configuration cannot be built, or when the checkpoint's
    tensors do not become the model's parameters as transformers loads them.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no config.json, from which the order of the parameters in the optimizer follows: copy the expert's "
            "config.json there, or save the second moments by name as exp_avg_sq.safetensors"
        )
    held = _held(folder, source_of)
    with _ONE_AT_A_TIME:
        from tasks.merging.conversion import conversion_of, under_other_names  # with it comes torch

        model = _skeleton(folder)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        rules = {title: frozenset(names) & shapes.keys() for title, names in _rules(model).items()}
        tied = _tied(model)
        conversion = conversion_of(model, held, shapes, tied)
    _check(folder, type(model).__name__, conversion, held, shapes)
    return ParameterLayout(
        shapes=shapes, decayed=rules.pop(TODAY), tied=tied, rules=rules, stored=under_other_names(conversion, shapes),
        config=read_json(folder / "config.json"), changed=_changed(folder, base, conversion.tensors(), source_of),
    )  # fmt: skip


def parameters_of(folder: Path, source_of: SourceOf | None = None, config: Path | None = None) -> Loaded:
    """What the tensors of the checkpoint in ``folder`` become as transformers loads it. Raises CheckpointError.

    config: the folder of the configuration, where it is another. The configuration alone is read, and the headers of the weights.
    """
    held = _held(folder, source_of)
    with _ONE_AT_A_TIME:
        from tasks.merging.conversion import conversion_of  # with it comes torch

        model = _skeleton(config or folder)
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        conversion = conversion_of(model, held, shapes, _tied(model))
        known = {name for name, _ in model.named_modules()}
        known |= {name.removeprefix(f"{model.base_model_prefix}.") for name in known}
        own, made = listed(held, shapes) if model.config.model_type == "gpt_oss" else ({}, {})
        own, made = conversion.own | own, conversion.made | made
        rest = held.keys() - own.keys() - made.keys()
        beside = frozenset(name for name in rest if name.rpartition(".")[0] not in known)
        bare = _bare(model)
    return Loaded(own, made, shapes, beside, bare)


def _bare(model: Any) -> frozenset[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    layers = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, Conv1D)
    return frozenset(
        f"{name}.{own}" for name, module in model.named_modules() if not isinstance(module, layers)
        for own, parameter in module.named_parameters(recurse=False) if parameter.ndim in (2, 3)
    )  # fmt: skip


def model_problems(folder: Path, held: Mapping[str, Shape]) -> list[str]:
    """What keeps the class that config.json names from loading tensors of these names and shapes; nothing where it loads them all."""
    from torch import nn

    try:
        with _ONE_AT_A_TIME:
            from tasks.merging.conversion import conversion_of  # with it comes torch

            model = _skeleton(folder)
            shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
            tied = _tied(model)
            conversion = conversion_of(model, held, shapes, tied)
            late = {f"{name}.{own}" for name, one in model.named_modules() for own, value in one.named_parameters(recurse=False)
                    if isinstance(value, nn.parameter.UninitializedParameter)}  # fmt: skip
        _check(
            folder, type(model).__name__, conversion, held, {name: shape for name, shape in shapes.items() if name not in late}
        )
    except CheckpointError as error:
        return [str(error)]
    return []


def _changed(
    folder: Path, base: BaseFolder, tensors: Mapping[str, list[str]], source_of: SourceOf | None
) -> Callable[[], frozenset[str]] | None:
    if base is None:
        return None
    return lambda: changed_parameters(folder, base() if callable(base) else base, tensors, source_of)


def _held(folder: Path, source_of: SourceOf | None) -> dict[str, Shape]:
    with closing(Checkpoint(folder, source_of)) as checkpoint:
        return {name: tuple(checkpoint.info(name).shape) for name in checkpoint.names()}


def _skeleton(folder: Path) -> Any:
    """The model on the meta device: modules, names and shapes without storage. Its class is the one that config.json names."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

    check_layers(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        named = (getattr(config, "architectures", None) or [None])[0]
        with torch.device("meta"):
            if named is None:
                return cast(Any, AutoModelForCausalLM).from_config(config, trust_remote_code=False)
            made = getattr(transformers, named, None)
            if not (isinstance(made, type) and issubclass(made, PreTrainedModel)):
                raise ValueError(f"architectures names {named}, which is no model of transformers {transformers.__version__}.")
            return cast(Any, made)._from_config(config)
    except Exception as error:  # the architectures' own code runs here and raises what it likes
        # transformers puts one error into another: their names say nothing to who reads the end.
        reason = re.sub(r"\w+Error: ", "", " ".join(str(error).split())).rstrip(".") or "no reason given"
        raise CheckpointError(
            f"{folder / 'config.json'} cannot be built as a model ({type(error).__name__}, {reason:.300}). "
            "Correct the configuration, or save the second moments by name as exp_avg_sq.safetensors, which needs none"
        ) from error


def _rules(model: Any) -> dict[str, list[str]]:
    """Names of the parameters with weight decay by the rule of the installed Trainer, and by those of earlier ones.

    Before transformers 4.47 a layer's class decided, and not its name: LayerNorm, and those RMS norms that their model had registered.
    """
    from torch import nn
    from transformers import Trainer
    from transformers.trainer_pt_utils import get_parameter_names

    class Rule(Trainer):
        def __init__(self) -> None:
            """The rule reads the model alone; a whole Trainer would move it to a device and set the process's seeds."""

    kinds = {type(module) for module in model.modules()}
    norms = [kind for kind in kinds if kind.__name__.lower().endswith(("rmsnorm", "layernorm"))]
    earlier = {"the Trainer's rule before transformers 4.47": norms, "the same with RMS norms decayed": []}
    return {TODAY: list(Rule().get_decay_parameter_names(model))} | {
        title: [name for name in get_parameter_names(model, [nn.LayerNorm, *some]) if "bias" not in name]
        for title, some in earlier.items()
    }


def _tied(model: Any) -> dict[str, str]:
    """Alias to the first name of the same parameter."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), name)
        if kept != name:
            tied[name] = kept
    return tied


def _check(
    folder: Path, architecture: str, conversion: "Conversion", held: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> None:
    """Every parameter must come from tensors of the checkpoint of the right shapes: second moments get their names."""
    tensors = conversion.tensors()
    missing = [name for name in shapes if name not in tensors]
    if missing:
        unknown = sorted(held.keys() - conversion.own.keys() - conversion.made.keys())
        raise CheckpointError(
            f"{folder}: {architecture} has {len(missing)} parameters that no tensor of the checkpoint becomes when transformers loads it "
            f"({_some(missing)}); the checkpoint holds {len(unknown)} others ({_some(unknown)}). So the numbers of the optimizer cannot be "
            "matched to its tensors: save the second moments by the names in the checkpoint as exp_avg_sq.safetensors, or correct "
            "config.json if it is not this checkpoint's"
        )
    expected = {tensor: shapes[name] for tensor, name in conversion.own.items()}
    expected |= {tensor: one.shape for tensor, one in conversion.made.items()}
    differ = [
        f"{tensor} has {list(held[tensor])} in the checkpoint, {list(shape)} by config.json"
        for tensor, shape in expected.items()
        if held[tensor] != shape
    ]
    if differ:
        raise CheckpointError(f"{folder}: {len(differ)} tensors contradict config.json: {_some(differ)}. Correct config.json")


def _some(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (", …" if len(items) > SHOWN else "") if items else "none"


MAX_LAYERS = 10_000
"""Of a model: each becomes a module in memory before its weights are looked at."""


def check_layers(folder: Path) -> None:
    """Raise CheckpointError where config.json, at any depth, asks for more layers than a model can have."""
    pending: list[Any] = [read_json(folder / "config.json")] if (folder / "config.json").exists() else []
    while pending:
        one = pending.pop()
        for key, value in one.items() if isinstance(one, dict) else ():
            if isinstance(value, dict):
                pending.append(value)
            elif "layer" in key and type(value) is int and value > MAX_LAYERS:
                raise CheckpointError(
                    f"{folder / 'config.json'}: {key[:80]} is {quoted(value)}, a model of at most {MAX_LAYERS} layers was expected"
                )
