"""Compiled loops over blocks for what torch has no fast, order-independent operation: histograms of bit patterns and exact-order sums.

Compiled once by numba and cached on disk. Every result is the same for every cut into blocks: counts are integers, row sums run over one
row in a fixed order.
"""

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

_compile = numba.njit(cache=True, nogil=True)


@_compile
def _count_high(bits: NDArray[np.uint32], counts: NDArray[np.int64]) -> None:
    for value in bits:
        counts[value >> 16] += 1


@_compile
def _count_low(bits: NDArray[np.uint32], high: int, counts: NDArray[np.int64]) -> None:
    for value in bits:
        if (value >> 16) == high:
            counts[value & 0xFFFF] += 1


@_compile
def row_sum(row: NDArray[np.floating[Any]], lanes: NDArray[np.float64]) -> float:
    """Σ of one row, in float64; ``lanes``: float64 (16,), overwritten. A part of other compiled loops.

    Sixteen running sums let the processor add in parallel, in an order that only the row's length decides.
    """
    whole = row.shape[0] - row.shape[0] % 16
    lanes[:] = 0.0
    for j in range(0, whole, 16):
        for lane in range(16):
            lanes[lane] += np.float64(row[j + lane])
    total = 0.0
    for lane in range(16):
        total += lanes[lane]
    for j in range(whole, row.shape[0]):
        total += np.float64(row[j])
    return total


@_compile
def _row_sums(matrix: NDArray[np.float64], sums: NDArray[np.float64]) -> None:
    lanes = np.empty(16, np.float64)
    for i in range(matrix.shape[0]):
        sums[i] = row_sum(matrix[i], lanes)


@_compile
def _power(values: NDArray[np.float64], exponent: float, out: NDArray[np.float64]) -> None:
    for i in range(values.shape[0]):
        out[i] = values[i] ** exponent


def _bits(scores: torch.Tensor) -> NDArray[np.uint32]:
    return scores.reshape(-1).view(torch.int32).numpy().view(np.uint32)


def count_high(scores: torch.Tensor, counts: torch.Tensor) -> None:
    """Add the upper 16 bits of every score to a histogram. scores: float32, ≥ 0, any shape, on the CPU; counts: int64 (65536,)."""
    _count_high(_bits(scores), counts.numpy())


def count_low(scores: torch.Tensor, high: int, counts: torch.Tensor) -> None:
    """Like ``count_high`` for the lower 16 bits of the scores whose upper bits are ``high``."""
    _count_low(_bits(scores), high, counts.numpy())


def row_sums(matrix: torch.Tensor) -> torch.Tensor:
    """Sum of each row. matrix: float64 (R, C); result: float64 (R,), on the CPU."""
    if matrix.is_cuda:
        return matrix.sum(dim=1).cpu()
    sums = torch.empty(matrix.shape[0], dtype=torch.float64)
    _row_sums(matrix.contiguous().numpy(), sums.numpy())
    return sums


def sqrt(values: torch.Tensor) -> torch.Tensor:
    """√values, correctly rounded (IEEE 754), float32 or float64, any shape.

    torch's own square root on the CPU goes through a vector library that may err in the last bit, differently on other processors.
    """
    return values.sqrt() if values.is_cuda else torch.from_numpy(np.sqrt(values.numpy()))


def power(values: torch.Tensor, exponent: float) -> torch.Tensor:
    """values^exponent, float64, any shape. Square root and identity are exact; the rest goes through one scalar routine, because a
    vectorised power may round the last elements of a block differently from the others."""
    if exponent == 0.5:
        return sqrt(values)
    if exponent == 1.0:
        return values
    if exponent == 0.0:
        return torch.ones_like(values)
    if values.is_cuda:
        return values.pow(exponent)
    out = torch.empty_like(values)
    _power(values.reshape(-1).numpy(), exponent, out.reshape(-1).numpy())
    return out
