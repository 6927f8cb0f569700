"""Rules that average whole weights: linear, and spherical interpolation of two models."""

from collections.abc import Sequence

import torch


def linear(thetas: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """Σ w·θ, divided by Σ w with ``normalize`` (model soups: Wortsman et al. 2022, arXiv 2203.05482)."""
    total = torch.zeros_like(thetas[0])
    for theta, weight in zip(thetas, weights, strict=True):
        total += weight * theta
    return total / sum(weights) if normalize else total


def slerp(theta0: torch.Tensor, theta1: torch.Tensor, factors: tuple[float, float]) -> torch.Tensor:
    """The point on the arc, from the factors of the whole tensor."""
    return factors[0] * theta0 + factors[1] * theta1
