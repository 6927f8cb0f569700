"""Rules that add up task vectors: task arithmetic, TIES, and what DARE and breadcrumbs leave of them."""

from collections.abc import Sequence

import torch

from ota_core.methods.numbers import NOTHING


def add_up(deltas: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """Σ w·Δ, divided by Σ w with ``normalize`` unless the weights cancel (task arithmetic: Ilharco et al. 2023, arXiv 2212.04089)."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total += weight * delta
    return total / _sum_of(weights, normalize)


def add_up_parts(deltas: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> list[torch.Tensor]:
    """The summands of ``add_up``, one for each expert."""
    divisor = _sum_of(weights, normalize)
    return [weight * delta / divisor for delta, weight in zip(deltas, weights, strict=True)]


def _sum_of(weights: Sequence[float], normalize: bool) -> float:
    """What a sum is divided by: 1 without ``normalize``, and where the weights cancel."""
    divisor = sum(weights)
    return divisor if normalize and abs(divisor) >= NOTHING else 1.0


def elect_and_add(deltas: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """TIES: elect each element's sign by the weighted sum, then add up the weighted task vectors that agree with it.

    ``normalize`` divides by the weights of those that agree: the disjoint mean of Yadav et al. 2023 (arXiv 2306.01708, section 3).
    A sum of exactly 0 elects plus, as mergekit does. An entry of 0 agrees with nobody.
    """
    agreeing, divisor = _elected(deltas, weights, normalize)
    total = torch.zeros_like(deltas[0])
    for part in agreeing:
        total += part
    return total if divisor is None else total / divisor


def elect_and_add_parts(deltas: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> list[torch.Tensor]:
    """The summands of ``elect_and_add``, one for each expert: 0 where it does not agree."""
    agreeing, divisor = _elected(deltas, weights, normalize)
    return agreeing if divisor is None else [part / divisor for part in agreeing]


def _elected(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], normalize: bool
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """(w·Δ of each expert where it agrees with the elected sign, what their sum is divided by with ``normalize``)."""
    positive = add_up(deltas, weights, normalize=False) >= 0
    agreeing, divisor = [], torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        weighted = weight * delta
        agrees = torch.where(positive, weighted > 0, weighted < 0)
        agreeing.append(torch.where(agrees, weighted, 0.0))
        if normalize:
            divisor += agrees.double() * weight  # ``where`` of two numbers would be float32
    return agreeing, torch.where(divisor.abs() >= NOTHING, divisor, 1.0) if normalize else None


def trim(delta: torch.Tensor, lowest: float, highest: float) -> torch.Tensor:
    """Δ where lowest ≤ |Δ| ≤ highest, 0 elsewhere; the limits are float32 values of |Δ| (``tally.kth_largest``)."""
    size = delta.float().abs()
    return torch.where((size >= lowest) & (size <= highest), delta, 0.0)
