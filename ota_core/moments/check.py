"""The one check that every block of second moments passes on its way in."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import MomentsError


def checked(block: torch.Tensor, *, path: Path, name: str, shape: Sequence[int], start: int) -> torch.Tensor:
    """``block`` as float32, which is ``block`` itself where it is float32 already.

    block: rows start:start+len of the matrix that stands for the parameter ``name`` of this ``shape``.
    Raises MomentsError, naming file, tensor and the first bad index, for a negative, NaN or infinite entry.
    """
    values = block.to(torch.float32)
    if values.numel() == 0:
        return values
    low, high = torch.aminmax(values)  # one pass; a NaN anywhere makes both NaN, and then both comparisons are false
    if float(low) >= 0 and float(high) < math.inf:
        return values
    first = int((~((values >= 0) & (values < math.inf))).flatten().to(torch.uint8).argmax())
    flat = start * matrix_shape(shape)[1] + first
    index = [int(i) for i in torch.unravel_index(torch.tensor(flat), tuple(shape))] if shape else []
    raise MomentsError(
        f"{path}: the second moment of {name!r} is {float(values.flatten()[first])} at index {index}, a finite value of at "
        "least 0 was expected. The training run diverged or the file is damaged: take the second moments of an earlier "
        "checkpoint, or save them again"
    )
