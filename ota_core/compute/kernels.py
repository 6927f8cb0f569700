"""What torch has no fast, order-independent operation for, on its tensors: compiled loops where they lie on the CPU."""

import numpy as np
import torch
from numpy.typing import NDArray

from ota_core.compute import loops


def _bits(scores: torch.Tensor) -> NDArray[np.uint32]:
    return scores.reshape(-1).view(torch.int32).numpy().view(np.uint32)


def count_high(scores: torch.Tensor, counts: NDArray[np.int64]) -> None:
    """Add the upper 16 bits of every score to a histogram. scores: float32, ≥ 0, any shape, on the CPU; counts: int64 (65536,)."""
    loops.count_high(_bits(scores), counts)


def count_low(scores: torch.Tensor, high: int, counts: NDArray[np.int64]) -> None:
    """Like ``count_high`` for the lower 16 bits of the scores whose upper bits are ``high``."""
    loops.count_low(_bits(scores), high, counts)


def row_sums(matrix: torch.Tensor) -> torch.Tensor:
    """Sum of each row. matrix: float64 (R, C); result: float64 (R,), on the CPU."""
    if matrix.is_cuda:
        return matrix.sum(dim=1).cpu()
    sums = torch.empty(matrix.shape[0], dtype=torch.float64)
    loops.row_sums(matrix.contiguous().numpy(), sums.numpy())
    return sums


def sqrt(values: torch.Tensor) -> torch.Tensor:
    """√values, correctly rounded (IEEE 754), float32 or float64, any shape.

    torch's own square root on the CPU goes through a vector library that may err in the last bit, differently on other processors.
    """
    return values.sqrt() if values.is_cuda else torch.from_numpy(np.sqrt(values.numpy()))


def power(values: torch.Tensor, exponent: float) -> torch.Tensor:
    """values^exponent, float64, any shape. Square root and identity are exact; the rest goes through ``loops.power``."""
    if exponent == 0.5:
        return sqrt(values)
    if exponent == 1.0:
        return values
    if exponent == 0.0:
        return torch.ones_like(values)
    if values.is_cuda:
        return values.pow(exponent)
    out = torch.empty_like(values)
    loops.power(values.reshape(-1).numpy(), exponent, out.reshape(-1).numpy())
    return out
