"""Opening DeepSpeed's files: their own classes become records that do nothing, and what is read of them is checked here."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from ota_core.errors import MomentsError, OtaError
from ota_core.files.byte_source import SourceOf
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import Record, SavedTensor
from ota_core.moments.safetensors_file import as_beta2, as_step

# Settings and arguments of the training program, which are not read.
MODULES = ("deepspeed.", "argparse.Namespace", "megatron.")
V = "exp_avg_sq"


def open_saved(path: Path, source_of: SourceOf | None, records: tuple[str, ...] = ()) -> TorchFile:
    """A file of torch.save, opened; classes whose names begin as ``records`` or ``MODULES`` say are not run. Raises MomentsError that names it when it is truncated, damaged or could run code."""
    try:
        return TorchFile(path, source_of, (*MODULES, *records))
    except Exception as error:  # a damaged or hostile pickle can raise anything; nothing of it has been executed
        if isinstance(error, OtaError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise MomentsError(
            f"{path} ({path.stat().st_size if path.exists() else 0} bytes) cannot be read: {type(error).__name__}: {reason:.300} "
            "It is truncated, damaged, or holds more than tensors, plain containers and the trainer's own settings, which is refused "
            "because loading it could run code. Fetch it again"
        ) from None


def mapping(value: Any, where: str) -> dict[Any, Any]:
    """``value``, which must be a dictionary."""
    if not isinstance(value, dict):
        raise MomentsError(f"{where} is a {type(value).__name__}, a dictionary was expected: save the checkpoint again")
    return value


def shapes_of(value: Any, where: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes, in the order of the file."""
    result = {}
    for name, shape in mapping(value, where).items():
        if not isinstance(name, str) or not isinstance(shape, (tuple, list)):
            raise MomentsError(
                f"{where} holds {name!r:.80}: {shape!r:.80}; names and shapes were expected: save the checkpoint again"
            )
        result[name] = tuple(int(size) for size in shape)
    return result


def stage_of(value: Any) -> int | None:
    """The stage of ZeRO: a number, or DeepSpeed's enumeration, which a record holds."""
    if isinstance(value, Record):
        value = value.arguments[0] if value.arguments else None
    return value if type(value) is int else None


def flat(entry: Any, where: str) -> SavedTensor:
    """v of one flattened group. Raises MomentsError, naming the keys that are there, for optimizers without v."""
    tensor = entry.get(V) if isinstance(entry, Mapping) else None
    if isinstance(tensor, SavedTensor) and tensor.is_floating_point and len(tensor.shape) == 1 and tensor.contiguous:
        return tensor
    keys = ", ".join(sorted(map(str, entry))) if isinstance(entry, Mapping) else type(entry).__name__
    raise MomentsError(
        f"{where} holds no flat {V} (it holds: {keys:.200}); the state of Adam or AdamW was expected. Take a checkpoint of a run with "
        "such an optimizer, or measure second moments instead (ota estimate)"
    )


def step_of(file: TorchFile, *places: Any) -> int | None:
    """The first number of steps among places that may hold one, as a number or a tensor."""
    for value in places:
        if isinstance(value, SavedTensor):
            value = file.number(value) if value.numel == 1 else None
        if value is not None:
            return as_step(value, f"{file.path}: step")
    return None


def beta2_of(groups: Any, where: str) -> float | None:
    """β₂ of all parameter groups. Raises MomentsError when they differ."""
    found = {
        as_beta2(group["betas"][1], f"{where}: β₂ in betas")
        for group in (groups if isinstance(groups, list) else ())
        if isinstance(group, Mapping) and isinstance(group.get("betas"), (tuple, list)) and len(group["betas"]) == 2
    }
    if len(found) > 1:
        raise MomentsError(f"{where}: the parameter groups have different β₂ ({sorted(found)}); one for all was expected")
    return found.pop() if found else None


def beta2_set(settings: Any, where: str) -> float | None:
    """β₂ of the optimizer that DeepSpeed's settings name; None where the training program made it itself."""
    optimizer = settings.get("optimizer") if isinstance(settings, Mapping) else None
    given = optimizer.get("params") if isinstance(optimizer, Mapping) else None
    betas = given.get("betas") if isinstance(given, Mapping) else None
    return as_beta2(betas[1], f"{where}: β₂ in ds_config") if isinstance(betas, (list, tuple)) and len(betas) == 2 else None


def count(shape: tuple[int, ...]) -> int:
    """Elements of a parameter."""
    return prod(shape)
