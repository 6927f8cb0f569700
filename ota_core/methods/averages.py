"""Rules that average whole weights: linear, and spherical interpolation of two models."""

import math
from collections.abc import Sequence

import torch


def linear(thetas: Sequence[torch.Tensor], weights: Sequence[float], *, normalize: bool) -> torch.Tensor:
    """Σ w·θ, divided by Σ w with ``normalize`` (model soups: Wortsman et al. 2022, arXiv 2203.05482)."""
    total = torch.zeros_like(thetas[0])
    for theta, weight in zip(thetas, weights, strict=True):
        total += weight * theta
    return total / sum(weights) if normalize else total


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


def slerp(theta0: torch.Tensor, theta1: torch.Tensor, factors: tuple[float, float]) -> torch.Tensor:
    """The point on the arc, from the factors of the whole tensor."""
    return factors[0] * theta0 + factors[1] * theta1
