"""Saliency of an expert's edits, and the exact threshold that keeps a given share of them (docs/methods.md section 3).

Fast Fisher Grafting (arXiv 2509.11167, section 5) ranks edits by v̂·Δ². √v̂·|Δ| has the same order and does not underflow
float32. Non-negative floats order as their bit patterns, so the k-th largest score is found with histograms of the patterns: ``locate``.
"""

import math
import threading

import numpy as np
import torch
from numpy.typing import NDArray

from ota_core.compute.kernels import sqrt

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
    """The mask of docs/methods.md section 3: score ≥ τ and score > 0. bool, the scores' shape."""
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


def locate(counts: NDArray[np.int64], k: int) -> tuple[int, int]:
    """The place that holds the k-th largest (1 ≤ k ≤ all), and how many lie in the places above it. counts: int64 (N,), by rising score."""
    from_top = np.cumsum(counts[::-1])
    index = int(np.searchsorted(from_top, k))
    return len(counts) - 1 - index, int(from_top[index] - counts[len(counts) - 1 - index])


def score_of(bits: int) -> float:
    """The float32 score of a bit pattern."""
    return float(np.array(bits, np.uint32).view(np.float32))
