"""Sums of products whose bits no cut into blocks, no order of threads and no machine changes.

A product sum over one row runs in an order that only the row's length decides. Over rows the sums are kept exact, as an expansion of
numbers that do not overlap (Shewchuk 1997, "Adaptive precision floating-point arithmetic", grow-expansion), and rounded once at the end.
"""

import math
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled
from ota_core.compute.subspace import dot

# An exact sum of float64 has at most 2,098 bits, hence 40 numbers that do not overlap.
_WIDTH = 44
_NOT_FINITE = -1


def pair_count(vectors: int) -> int:
    """Pairs of so many vectors, each with itself included."""
    return vectors * (vectors + 1) // 2


def pair_index(a: int, b: int, vectors: int) -> int:
    """The position of the pair (a, b), a ≤ b, in the order (0, 0), (0, 1), …, (1, 1), …"""
    return a * vectors - a * (a - 1) // 2 + b - a


@compiled
def _grow(parts: NDArray[np.float64], used: int, x: float) -> int:
    """Add x to an expansion of ``used`` numbers, by rising size. Returns how many there are now, or −1 for what is not finite."""
    kept = 0
    for i in range(used):
        y = parts[i]
        if abs(x) < abs(y):
            x, y = y, x
        high = x + y
        low = y - (high - x)
        if low != 0.0:
            parts[kept] = low
            kept += 1
        x = high
    if not np.isfinite(x):
        return _NOT_FINITE
    parts[kept] = x
    return kept + 1


@compiled
def _add_dots(vectors: NDArray[np.float64], parts: NDArray[np.float64], used: NDArray[np.int64]) -> bool:
    for i in range(vectors.shape[1]):
        pair = 0
        for a in range(vectors.shape[0]):
            for b in range(a, vectors.shape[0]):
                used[pair] = _grow(parts[pair], used[pair], dot(vectors[a, i], vectors[b, i]))
                if used[pair] < 0:
                    return False
                pair += 1
    return True


@compiled
def _add_parts(
    parts: NDArray[np.float64], used: NDArray[np.int64], other: NDArray[np.float64], other_used: NDArray[np.int64]
) -> None:
    for pair in range(used.shape[0]):
        for i in range(other_used[pair]):
            used[pair] = _grow(parts[pair], used[pair], other[pair, i])


class PairDots:
    """Σ x_a·x_b of every pair of M vectors, of which several threads bring pieces. x is never squared into float32."""

    def __init__(self, vectors: int) -> None:
        self.vectors = vectors
        self._parts = np.zeros((pair_count(vectors), _WIDTH))
        self._used = np.zeros(pair_count(vectors), np.int64)
        self._lock = Lock()

    def add_rows(self, rows: NDArray[np.float64]) -> bool:
        """Add whole rows. rows: float64 (M, R, C), contiguous. False where a sum is not finite; it must not be used any more then."""
        with self._lock:
            return bool(_add_dots(rows, self._parts, self._used))

    def add(self, other: "PairDots") -> None:
        """Add what another one holds."""
        with self._lock:
            _add_parts(self._parts, self._used, other._parts, other._used)

    def get(self, a: int, b: int) -> float:
        """Σ x_a·x_b over all that was added, rounded once."""
        pair = pair_index(min(a, b), max(a, b), self.vectors)
        return math.fsum(self._parts[pair, : self._used[pair]].tolist())

    def cosine(self, a: int, b: int) -> float:
        """The cosine of the angle between two vectors; NaN where one is all zeros."""
        lengths = self.get(a, a), self.get(b, b)
        if min(lengths) == 0:
            return math.nan
        # Two roots: the product of two tiny sums of squares would underflow.
        return self.get(a, b) / math.sqrt(lengths[0]) / math.sqrt(lengths[1])
