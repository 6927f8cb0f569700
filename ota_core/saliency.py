"""Saliency of an expert's edits, and the exact threshold that keeps a given share of them (methods.md section 3).

Fast Fisher Grafting (arXiv 2509.11167, section 5) ranks edits by v̂·Δ². √v̂·|Δ| has the same order and does not underflow
float32. Non-negative floats order as their bit patterns, so the k-th largest score is found with two histograms of 65,536
bins: one of the upper 16 bits, one of the lower 16 bits within the bin that holds it. Histograms of parts add up.
"""

import math
import threading
from collections.abc import Callable

import torch

from ota_core.kernels import sqrt

BINS = 1 << 16


def curvature_scores(v_hat: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """√v̂·|Δ|, float32. v_hat: float32 ≥ 0; delta: float64 or float32, the same shape."""
    # The absolute value last: v̂ = −0.0 would give a score of −0.0, whose bits order wrongly.
    return (sqrt(v_hat) * delta.float()).abs()


def magnitude_scores(delta: torch.Tensor) -> torch.Tensor:
    """|Δ|, float32: the paper's comparison, and TIES's trimming."""
    return delta.float().abs()


def threshold_of_product(x: float) -> float:
    """The threshold on √v̂·|Δ| that stands for v̂·Δ² ≥ x, rounded to float32 as the scores are."""
    return torch.tensor(math.sqrt(x), dtype=torch.float32).item()


def kept_count(density: float, total: int) -> int:
    """k = round(ρ·N), halves up."""
    return min(total, math.floor(density * total + 0.5))


def keep(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """The mask of methods.md section 3: score ≥ τ and score > 0. bool, the scores' shape."""
    return (scores >= threshold) & (scores > 0)


class Histogram:
    """Counts of scores by the bits of one half. Each thread counts on its own; the counts add up."""

    def __init__(self) -> None:
        self._parts: dict[int, torch.Tensor] = {}

    def local(self) -> torch.Tensor:
        """This thread's counts, int64 (65536,), to be added to."""
        mine = self._parts.get(threading.get_ident())
        if mine is None:
            mine = self._parts[threading.get_ident()] = torch.zeros(BINS, dtype=torch.int64)
        return mine

    def counts(self) -> torch.Tensor:
        """All threads' counts together, int64 (65536,)."""
        return torch.stack([*self._parts.values()]).sum(0)

    def find(self, k: int) -> tuple[int, int]:
        """The bin that holds the k-th largest score (1 ≤ k ≤ all), and how many scores lie in the bins above it."""
        counts = self.counts()
        from_top = counts.flip(0).cumsum(0)
        index = int(torch.searchsorted(from_top, k))
        return BINS - 1 - index, int(from_top[index] - counts[BINS - 1 - index])


Count = Callable[[Histogram, int | None], None]
"""Adds every score to a histogram: its upper 16 bits, or, with a number, the lower bits of the scores whose upper bits are that number."""


def kth_largest(count: Count, k: int, high: Histogram | None = None) -> float:
    """The k-th largest score, exactly. Two counts of all scores, one where ``high`` holds the upper bits already.

    k = 0 gives infinity (nothing is kept).
    """
    if k == 0:
        return math.inf
    if high is None:
        high = Histogram()
        count(high, None)
    upper, above = high.find(k)
    low = Histogram()
    count(low, upper)
    lower, _ = low.find(k - above)
    return torch.tensor((upper << 16) | lower, dtype=torch.int32).view(torch.float32).item()
