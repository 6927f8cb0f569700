"""Rows of W + s·B·A as compiled loops in float64: sums of fixed order, so that no cut into blocks and no machine changes a bit.

Legend: n rows, N columns, r the rank. left (n, r) and right (r, N) are float32 or float64.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled
from ota_core.compute.subspace import dot

Numbers = NDArray[np.floating[Any]]
F64 = NDArray[np.float64]

# Columns at once: what is added up for them stays in the first cache.
_TILE = 1024


@compiled
def edited_rows(weights: Numbers, left: Numbers, right: Numbers, scale: float, out: F64) -> None:
    """out (n, N) = weights (n, N) + scale · left · right. The r products of an element are added in their order."""
    rank = left.shape[1]
    total = np.empty(_TILE)
    for first in range(0, weights.shape[1], _TILE):
        width = min(_TILE, weights.shape[1] - first)
        for i in range(weights.shape[0]):
            for j in range(width):
                total[j] = 0.0
            whole = rank - rank % 4
            for k in range(0, whole, 4):
                a, b, c, d = left[i, k] * 1.0, left[i, k + 1] * 1.0, left[i, k + 2] * 1.0, left[i, k + 3] * 1.0
                for j in range(width):
                    part = total[j] + a * right[k, first + j]
                    part += b * right[k + 1, first + j]
                    part += c * right[k + 2, first + j]
                    total[j] = part + d * right[k + 3, first + j]
            for k in range(whole, rank):
                a = left[i, k] * 1.0
                for j in range(width):
                    total[j] += a * right[k, first + j]
            for j in range(width):
                out[i, first + j] = weights[i, first + j] + scale * total[j]


@compiled
def scale_rows_to(rows: F64, lengths: Numbers) -> None:
    """Give every row (n, N) its length (n,): DoRA's magnitude over the norm of the row (arXiv 2402.09353, equation 5)."""
    for i in range(rows.shape[0]):
        factor = lengths[i] / np.sqrt(dot(rows[i], rows[i]))
        for j in range(rows.shape[1]):
            rows[i, j] *= factor


@compiled
def add_squares(rows: F64, sums: F64) -> None:
    """Add the squares of rows (n, N), one row after the other, to the sums of the columns (N,)."""
    for i in range(rows.shape[0]):
        for j in range(rows.shape[1]):
            sums[j] += rows[i, j] * rows[i, j]
