"""OTA merging: experts weighted, element by element, by a power of their curvature (arXiv 2509.11167; docs/methods.md section 4)."""

from collections.abc import Sequence

import torch

from ota_core.compute.kernels import power as exact_power


def curvature_weights(v_hat: torch.Tensor, *, power: float, scale: float, mean: float | None, epsilon: float) -> torch.Tensor:
    """p = (v̂^power / mean) · scale + ε.

    v_hat: float32 (r, C), ≥ 0. mean: the expert's mean of v̂^power with ``normalise: global``, else None. The scale is applied after
    the mean, or it would cancel. Result float64 (r, C).
    """
    weights = exact_power(v_hat.double(), power)
    if mean is not None:
        weights = weights / mean
    if scale != 1.0:
        weights = weights * scale
    return weights + epsilon if epsilon else weights


def ota(
    thetas: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor | None],
    base: torch.Tensor | None,
    *,
    lam: float = 1.0,
    denominator: str = "kept",
) -> torch.Tensor:
    """θ = θ₀ + λ · (Σ mask·p·Δ) / P with P = Σ mask·p (``kept``) or Σ p (``all``), and θ = θ₀ where P = 0.

    weights: M tensors p_m ≥ 0, float64 (r, C). Without a base, θ = Σ p·θ_m / Σ p, and the plain mean where Σ p = 0; no mask is allowed then.
    Computed as θ₀ + λ·(t − θ₀), at λ = 1 as t itself, where t is the p-weighted mean of the experts, in which under ``all`` a masked expert
    votes for θ₀. That is the same number, and keeps a lone expert bit for bit at λ = 1. Whether an element is kept is read from the masks,
    never from P.
    """
    numerator = torch.zeros_like(thetas[0])
    total = torch.zeros_like(thetas[0])
    for theta, weight, mask in zip(thetas, weights, masks, strict=True):
        if mask is None:
            numerator += weight * theta
            total += weight
        elif denominator == "kept":
            kept_weight = torch.where(mask, weight, 0.0)
            numerator += kept_weight * theta
            total += kept_weight
        else:
            assert base is not None
            numerator += weight * torch.where(mask, theta, base)
            total += weight
    positive = total > 0
    target = numerator / torch.where(positive, total, 1.0)
    if base is None:
        return torch.where(positive, target, mean(thetas))
    target = torch.where(positive, target, base)
    merged = target if lam == 1.0 else base + lam * (target - base)
    # (Σ p·θ₀) / Σ p may differ from θ₀ in the last bit; an element that nobody keeps is the base exactly.
    return torch.where(any_kept(masks, base), merged, base)


def ota_parts(
    deltas: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], *, denominator: str
) -> list[torch.Tensor]:
    """The summands of what ``ota`` adds to the base at λ = 1, one for each expert: mask·p·Δ / P, and 0 where P = 0."""
    kept = [w if mask is None else torch.where(mask, w, 0.0) for w, mask in zip(weights, masks, strict=True)]
    total = torch.zeros_like(deltas[0])
    for weight in kept if denominator == "kept" else weights:
        total += weight
    total = torch.where(total > 0, total, 1.0)
    return [weight * delta / total for weight, delta in zip(kept, deltas, strict=True)]


def masked_ties(deltas: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], factors: Sequence[float]) -> torch.Tensor:
    """What TIES makes of masked task vectors (``masked_merge: ties``): the sign elected by Σ mask·s·Δ, then the mean, weighted by s, of the
    kept Δ of that sign; 0 where the sum is 0 or nobody agrees. factors: s_m ≥ 0, of any size. float64 (r, C)."""
    agreeing, divisor = _elected(deltas, masks, factors)
    total = torch.zeros_like(divisor)
    for part in agreeing:
        total += part
    return torch.where(divisor > 0, total / torch.where(divisor > 0, divisor, 1.0), 0.0)


def masked_ties_parts(
    deltas: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], factors: Sequence[float]
) -> list[torch.Tensor]:
    """The summands of ``masked_ties``, one for each expert: 0 where it does not agree."""
    agreeing, divisor = _elected(deltas, masks, factors)
    divisor = torch.where(divisor > 0, divisor, 1.0)
    return [part / divisor for part in agreeing]


def _elected(
    deltas: Sequence[torch.Tensor], masks: Sequence[torch.Tensor | None], factors: Sequence[float]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(s·Δ of each expert where it is kept and agrees with the elected sign, the sum of s of those that agree)."""
    left = [delta if mask is None else torch.where(mask, delta, 0.0) for delta, mask in zip(deltas, masks, strict=True)]
    elected = torch.zeros_like(deltas[0])
    for delta, factor in zip(left, factors, strict=True):
        elected += factor * delta
    elected = elected.sign()
    agreeing, divisor = [], torch.zeros_like(elected)
    for delta, factor in zip(left, factors, strict=True):
        agrees = (delta.sign() == elected) & (elected != 0)
        agreeing.append(torch.where(agrees, factor * delta, 0.0))
        divisor += agrees.double() * factor  # ``where`` of two numbers would be float32
    return agreeing, divisor


def any_kept(masks: Sequence[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """Where at least one expert keeps the element. bool, the shape of ``like``."""
    kept = torch.zeros_like(like, dtype=torch.bool)
    for mask in masks:
        if mask is None:
            return torch.ones_like(kept)
        kept |= mask
    return kept


def mean(thetas: Sequence[torch.Tensor]) -> torch.Tensor:
    """The plain mean of the experts."""
    total = thetas[0]
    for theta in thetas[1:]:
        total = total + theta
    return total / len(thetas)
