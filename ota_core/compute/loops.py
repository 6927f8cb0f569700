"""How loops are compiled, and those that several rooms share: histograms of bit patterns and sums in an exact order.

numba compiles each loop once and keeps it on disk; contraction to fused multiply-adds stays off. Every result is the same for every
cut into blocks: counts are integers, row sums run over one row in a fixed order.
"""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loop_cache import SETTING, find_cache

find_cache()  # numba reads the setting when it is imported

import numba  # noqa: E402

numba.config.CACHE_DIR = os.environ.get(SETTING, "")  # type: ignore[attr-defined]  # numba may be here already
compiled = numba.njit(cache=True, nogil=True, error_model="numpy")


@compiled
def count_high(bits: NDArray[np.uint32], counts: NDArray[np.int64]) -> None:
    """Add the upper 16 bits of every pattern (n,) to a histogram (65536,)."""
    for value in bits:
        counts[value >> 16] += 1


@compiled
def count_low(bits: NDArray[np.uint32], high: int, counts: NDArray[np.int64]) -> None:
    """Like ``count_high`` for the lower 16 bits of the patterns whose upper bits are ``high``."""
    for value in bits:
        if (value >> 16) == high:
            counts[value & 0xFFFF] += 1


@compiled
def count_inside(bits: NDArray[np.uint32], bottom: int, inside: NDArray[np.int64]) -> int:
    """How many patterns (n,) lie above the W from ``bottom`` on; those inside are added to their counts, int64 (W,)."""
    above = np.int64(0)
    for value in bits:
        place = np.int64(value) - bottom
        above += np.int64(place >= inside.shape[0])
        if 0 <= place < inside.shape[0]:
            inside[place] += 1
    return int(above)


@compiled
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


@compiled
def row_sums(matrix: NDArray[np.float64], sums: NDArray[np.float64]) -> None:
    """Sums (R,) of the rows of a matrix (R, C)."""
    lanes = np.empty(16, np.float64)
    for i in range(matrix.shape[0]):
        sums[i] = row_sum(matrix[i], lanes)


@compiled
def power(values: NDArray[np.float64], exponent: float, out: NDArray[np.float64]) -> None:
    """values^exponent (n,) through one scalar routine: a vectorised one may round the last elements of a block differently."""
    for i in range(values.shape[0]):
        out[i] = values[i] ** exponent
