"""The pass of ``rank1`` over v as a compiled loop."""

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled, row_sum

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@compiled
def sums(v: F32, height: int, rows: F64, cols: F64, weighted: F64) -> None:
    """r, c and w of whole matrices of ``height`` rows. v: (S·height, C); rows: (S·height,); cols, weighted: (S, C), zeros before.

    Four rows at a time, because the sums over columns then go through memory once for four; they are added row after row all the same.
    """
    lanes, roots = np.empty(16, np.float64), np.empty(4, np.float64)
    for matrix in range(cols.shape[0]):
        c, w = cols[matrix], weighted[matrix]
        first, last = matrix * height, (matrix + 1) * height
        fours = last - height % 4
        for i in range(first, fours, 4):
            for k in range(4):
                rows[i + k] = row_sum(v[i + k], lanes)
                roots[k] = np.sqrt(rows[i + k])
            p, q, s, t = roots[0], roots[1], roots[2], roots[3]
            for j in range(v.shape[1]):
                a, b, d, e = np.float64(v[i, j]), np.float64(v[i + 1, j]), np.float64(v[i + 2, j]), np.float64(v[i + 3, j])
                c[j] = c[j] + a + b + d + e
                w[j] = w[j] + p * np.sqrt(a) + q * np.sqrt(b) + s * np.sqrt(d) + t * np.sqrt(e)
        for i in range(fours, last):
            rows[i] = row_sum(v[i], lanes)
            root = np.sqrt(rows[i])
            for j in range(v.shape[1]):
                value = np.float64(v[i, j])
                c[j] += value
                w[j] += root * np.sqrt(value)
