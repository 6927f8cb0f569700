"""Saliency of an expert's edits, and the exact threshold that keeps a given share of them (docs/methods.md section 3).

Fast Fisher Grafting (arXiv 2509.11167, section 5) ranks edits by v̂·Δ². √v̂·|Δ| has the same order and does not underflow
float32. Non-negative floats order as their bit patterns, so the k-th largest score is found with histograms of the patterns: ``numbers.locate``.
"""

import torch

from ota_core.compute.kernels import sqrt


def curvature_scores(v_hat: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """√v̂·|Δ|, float32. v_hat: float32 ≥ 0; delta: float64 or float32, the same shape."""
    # The absolute value last: v̂ = −0.0 would give a score of −0.0, whose bits order wrongly.
    return (sqrt(v_hat) * delta.float()).abs()


def magnitude_scores(delta: torch.Tensor) -> torch.Tensor:
    """|Δ|, float32: the paper's comparison, and TIES's trimming."""
    return delta.float().abs()


def keep(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    """The mask of docs/methods.md section 3: score ≥ τ and score > 0. bool, the scores' shape."""
    return (scores >= threshold) & (scores > 0)
