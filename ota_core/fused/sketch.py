"""δᵀ z for random probes z in one compiled pass over the rows of a task vector: each row is added to one of P sums, with a random sign."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled
from ota_core.compute.subspace import dot, mix
from ota_core.files.rows import Rows
from ota_core.fused.memory import clear_absent, load
from ota_core.fused.sources import TILE, source_of

_SEED = 1


@compiled
def signs(first: int, count: int) -> NDArray[np.float64]:
    """The random signs, ±1, of rows first … first + count − 1: float64 (count,)."""
    found = np.empty(count)
    for i in range(count):
        found[i] = 1.0 if mix(first + i, _SEED) >> np.uint64(63) else -1.0
    return found


@compiled
def _sketch(base_source: Any, theta_source: Any, columns: int, first: int, flips: Any, sums: Any, squares: Any) -> None:
    base, theta, delta = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float64)
    has = np.empty(TILE, np.bool_)
    for i in range(flips.shape[0]):
        bucket = (first + i) % sums.shape[0]
        for start in range(0, columns, TILE):
            count = min(TILE, columns - start)
            load(base_source, i * columns + start, count, base)
            load(theta_source, i * columns + start, count, theta)
            for j in range(count):
                delta[j] = np.float64(theta[j]) - np.float64(base[j])
            clear_absent(base_source, i * columns + start, count, has, delta)
            clear_absent(theta_source, i * columns + start, count, has, delta)
            squares[0] += dot(delta[:count], delta[:count])
            for j in range(count):
                sums[bucket, start + j] += flips[i] * delta[j]


def add_rows(base: Rows, theta: Rows, first: int, sums: NDArray[np.float64], squares: NDArray[np.float64]) -> None:
    """Add rows of a task vector to its sketch, row i to sum i mod P. The bits do not depend on how the rows are cut.

    base, theta: (r, C) as stored: float32, bfloat16 or float16; first: the first row's number in its matrix. sums: float64 (P, C), is added
    to: the transpose of δᵀ Z, where the probes Z (R, P) have E[Z Zᵀ] = I (Charikar, Chen & Farach-Colton 2004, "Finding frequent items in data
    streams"). squares: float64 (1,), gains Σ δ².
    """
    rows, columns = base.held.shape
    _sketch(source_of(base)[()], source_of(theta)[()], columns, first, signs(first, rows), sums, squares)
