"""Stand-ins for the tensor subclasses that optimizers of other libraries leave in files of torch.save.

A subclass is saved as the name of its class, its outer shape and the tensors that it is made of. ``torch.load(weights_only=True)`` takes no
class that it does not know. With one of these in the place of the library's own, it builds a tensor of that outer shape whose parts are
attributes: nothing of the library is imported and none of its code runs. Only these names are let through, everything else stays refused.
"""

import threading
from pathlib import Path
from typing import Any

import torch

_LOAD = threading.Lock()  # the names that torch.load accepts are a setting of the whole process


class _Parts(torch.Tensor):
    """A tensor that cannot be computed with: its parts are its attributes, read from the file."""

    codes: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{cls.__name__} stands for a tensor of another library; only its parts can be read")


class OptimState8bit(_Parts):
    """torchao: ``codes`` uint8 in the parameter's shape, ``scale`` (blocks,), ``qmap`` float32 (256,)."""


class OptimState4bit(_Parts):
    """torchao: ``codes`` uint8 (elements / 2,), the high half first, ``scale`` (blocks,), ``qmap`` float32 (16,)."""


class OptimStateFp8(_Parts):
    """torchao: ``codes`` float8_e4m3fn in the parameter's shape, ``scale`` (blocks,)."""


_MODULES = ("torchao.optim", "torchao.prototype.low_bit_optim")  # now, and before torchao 0.11
_FILES = {"subclass_8bit": OptimState8bit, "subclass_4bit": OptimState4bit, "subclass_fp8": OptimStateFp8}
STAND_INS: list[Any] = [(kind, f"{module}.{file}.{kind.__name__}") for module in _MODULES for file, kind in _FILES.items()]


def load(path: Path, device: str) -> Any:
    """``torch.load`` of tensors, plain containers and the subclasses above. Raises whatever torch.load raises."""
    with _LOAD, torch.serialization.safe_globals(STAND_INS):
        return torch.load(path, map_location=device, weights_only=True)


def foreign_classes(path: Path) -> list[str]:
    """What else a file names: classes and functions that ``load`` refuses, as ``module.name``; read without running anything.

    Empty where torch cannot tell: for its old format, and for a file that is damaged.
    """
    try:
        with _LOAD, torch.serialization.safe_globals(STAND_INS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged file can raise anything here
        return []
