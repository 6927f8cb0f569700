"""What the rules compute on single numbers, without tensors: ranks and thresholds, bins of scores, keys of random numbers."""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

BINS = 1 << 16
# Weights that cancel leave nothing to divide by; the sum is then taken as it is, as mergekit does.
NOTHING = 1e-8


def kept_count(density: float, total: int) -> int:
    """k = round(ρ·N), halves up."""
    return min(total, math.floor(density * total + 0.5))


def ties_ranks(density: float, total: int) -> tuple[int, int]:
    """Ranks (dropped, last) by falling |Δ| that TIES keeps in a tensor of ``total`` elements: 1 … k, at least one."""
    return 0, min(total, max(1, int(density * total)))


def breadcrumbs_ranks(density: float, gamma: float, total: int) -> tuple[int, int]:
    """Ranks (dropped, last) that breadcrumbs keeps: without the largest ``gamma``, then ``density`` of all, the smallest dropped
    (Davari & Belilovsky 2023, arXiv 2312.06795). Where both do not fit, fewer of the largest are dropped, as mergekit does."""
    kept = int(density * total)
    dropped = min(int(gamma * total), total - kept)
    return dropped, dropped + kept


def threshold_of_product(x: float) -> float:
    """The threshold on √v̂·|Δ| that stands for v̂·Δ² ≥ x, rounded to float32 as the scores are."""
    return float(np.float32(math.sqrt(x)))


def slerp_factors(norm0: float, norm1: float, dot: float, t: float) -> tuple[float, float]:
    """The factors of two vectors at position t of the arc between them (Shoemake 1985). norm0, norm1: their norms; dot: their product.

    Nearly parallel or opposite vectors interpolate linearly: the arc has no direction there. A vector of zeros counts as orthogonal to
    every other. Both as mergekit does.
    """
    cosine = dot / (norm0 * norm1) if norm0 > 0 and norm1 > 0 else 0.0
    if abs(cosine) >= 0.9995:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def locate(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The place that holds the k-th largest (1 ≤ k ≤ all), and how many lie in the places above it. counts: int64 (N,), by rising score."""
    from_top = np.cumsum(counts[::-1])
    index = int(np.searchsorted(from_top, k))
    return len(counts) - 1 - index, int(from_top[index] - counts[len(counts) - 1 - index])


def score_of(bits: int) -> float:
    """The float32 score of a bit pattern."""
    return float(np.array(bits, np.uint32).view(np.float32))


def key_of(seed: int, expert: int, name: str) -> int:
    """The 64 bits that tell one tensor's random numbers from another's."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{expert}\0{name}".encode()).digest()[:8], "little")


def significant(value: float, digits: int) -> float:
    """A number to so many significant digits."""
    return float(f"{value:.{digits - 1}e}")
