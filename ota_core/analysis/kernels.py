"""Compiled loops of the analyses: integer counts, hence the same for every cut."""

import numpy as np
from numpy.typing import NDArray

from ota_core.analysis.table import BINS
from ota_core.compute.loops import compiled

Bools = NDArray[np.bool_]
Counts = NDArray[np.int64]


@compiled
def count_mask(kept: Bools, first: int, height: int, bins: Counts, empty: Counts, columns: NDArray[np.int32]) -> int:
    """Count what a mask keeps of whole rows of a stack of matrices; returns the sum.

    kept: bool (r, C), rows ``first`` … of the stack, each matrix of ``height`` rows. Added to: bins (20,), rows by their kept fraction;
    empty (1,), rows with nothing kept; columns (S, C), what each column keeps.
    """
    rows, width = kept.shape
    total = 0
    for i in range(rows):
        column = columns[(first + i) // height]
        count = 0
        for j in range(width):
            column[j] += kept[i, j]
            count += kept[i, j]
        bins[min(BINS - 1, BINS * count // width)] += 1
        empty[0] += count == 0
        total += count
    return total


@compiled
def count_conflicts(deltas: NDArray[np.float64], both: Counts, opposite: Counts) -> None:
    """For each pair a < b of task vectors: elements that both move, and those among them that they move in opposite directions.

    deltas: float64 (M, n). both, opposite: int64 (M, M), added to above the diagonal.
    """
    for a in range(deltas.shape[0]):
        for b in range(a + 1, deltas.shape[0]):
            moved, apart = 0, 0
            for i in range(deltas.shape[1]):
                x, y = deltas[a, i], deltas[b, i]
                moved += (x != 0) & (y != 0)
                apart += ((x > 0) & (y < 0)) | ((x < 0) & (y > 0))
            both[a, b] += moved
            opposite[a, b] += apart


@compiled
def count_common(kept: Bools, common: Counts) -> None:
    """For each pair a ≤ b of masks: elements that both keep. kept: bool (M, n); common: int64 (M, M), added to."""
    for a in range(kept.shape[0]):
        for b in range(a, kept.shape[0]):
            total = 0
            for i in range(kept.shape[1]):
                total += kept[a, i] & kept[b, i]
            common[a, b] += total
