"""The one check that every block of second moments passes on its way in."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import MomentsError


def checked(values: NDArray[np.float32], *, path: Path, name: str, shape: Sequence[int], start: int) -> NDArray[np.float32]:
    """``values`` themselves.

    values: rows start:start+len of the matrix that stands for the parameter ``name`` of this ``shape``.
    Raises MomentsError, naming file, tensor and the first bad index, for a negative, NaN or infinite entry.
    """
    # A NaN anywhere makes both NaN, and then both comparisons are false.
    if values.size == 0 or (values.min() >= 0 and values.max() < math.inf):
        return values
    first = int((~((values >= 0) & (values < math.inf))).argmax())
    index = [int(i) for i in np.unravel_index(start * matrix_shape(shape)[1] + first, tuple(shape))] if shape else []
    raise MomentsError(
        f"{path}: the second moment of {name!r} is {float(values.reshape(-1)[first])} at index {index}, a finite value of at "
        "least 0 was expected. The training run diverged or the file is damaged: take the second moments of an earlier "
        "checkpoint, or save them again"
    )
