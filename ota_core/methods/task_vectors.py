"""Rules that add up task vectors: task arithmetic, TIES, and what DARE and breadcrumbs leave of them."""

from collections.abc import Sequence

import torch

from ota_core.methods.numbers import NOTHING


def add_up(deltas: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """Σ w·Δ, divided by Σ w with ``normalize`` unless the weights cancel (task arithmetic: Ilharco et al. 2023, arXiv 2212.04089)."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total += weight * delta
    divisor = sum(weights)
    return total / divisor if normalize and abs(divisor) >= NOTHING else total


def elect_and_add(deltas: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """TIES: elect each element's sign by the weighted sum, then add up the weighted task vectors that agree with it.

    ``normalize`` divides by the weights of those that agree: the disjoint mean of Yadav et al. 2023 (arXiv 2306.01708, section 3).
    A sum of exactly 0 elects plus, as mergekit does. An entry of 0 agrees with nobody.
    """
    positive = add_up(deltas, weights, normalize=False) >= 0
    total = torch.zeros_like(deltas[0])
    divisor = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        weighted = weight * delta
        agrees = torch.where(positive, weighted > 0, weighted < 0)
        total += torch.where(agrees, weighted, 0.0)
        if normalize:
            divisor += torch.where(agrees, weight, 0.0)
    return total / torch.where(divisor.abs() >= NOTHING, divisor, 1.0) if normalize else total


def trim(delta: torch.Tensor, lowest: float, highest: float) -> torch.Tensor:
    """Δ where lowest ≤ |Δ| ≤ highest, 0 elsewhere; the limits are float32 values of |Δ| (``tally.kth_largest``)."""
    size = delta.float().abs()
    return torch.where((size >= lowest) & (size <= highest), delta, 0.0)
