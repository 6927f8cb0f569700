"""Rules that decide element by element what becomes of the experts' edits: nearswap, Arcee Fusion, RAM and SCE, on tensors.

Each returns the experts' parts and what their sum is divided by, so that the merged edit is Σ parts / divisor. Δ: float64 (r, C).
"""

from collections.abc import Sequence

import torch

from ota_core.compute.kernels import sqrt

Parts = tuple[list[torch.Tensor], torch.Tensor]
"""(one part for each expert, the divisor of their sum), float64 (r, C) each."""


def nearswap(delta: torch.Tensor, *, t: float) -> torch.Tensor:
    """min(1, t/|Δ|)·Δ: edits up to t whole, larger ones cut to it (alchemonaut 2024, QuartetAnemoi-70B-t0.0001, on its model card)."""
    return delta.clamp(-t, t)


def ram(deltas: Sequence[torch.Tensor], *, least: float, boosts: Sequence[float]) -> Parts:
    """Reinforced Agent Merging: the mean of the experts that moved an element by more than ``least``; where it is one alone, its edit times
    its boost (Yuan et al. 2026, arXiv 2601.13572, section 4)."""
    moved = [delta.abs() > least for delta in deltas]
    movers = torch.zeros_like(deltas[0])
    for one in moved:
        movers += one.double()
    parts = []
    for delta, one, boost in zip(deltas, moved, boosts, strict=True):
        part = torch.where(one, delta, 0.0)
        parts.append(torch.where(movers == 1, boost * part, part))
    return parts, movers.clamp(min=1.0)


def ram_boost(shared: int, unique: int, *, r: float, alpha: float) -> float:
    """RAM+'s factor on an expert's unique edits, 1 + r·min(shared/unique, α): more where more of its edits are averaged away."""
    return 1.0 + r * min(alpha, shared / unique) if unique else 1.0


def deviation(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """√variance of each element over the experts, float32; below the smallest normal number it counts as 0."""
    mean, square = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        mean += delta
    mean /= len(deltas)
    for delta in deltas:
        square += (delta - mean) * (delta - mean)
    found = sqrt(square / len(deltas)).float()
    return torch.where(found >= 2.0**-126, found, 0.0)


def selected(deltas: Sequence[torch.Tensor], threshold: float) -> list[torch.Tensor]:
    """Δ where the deviation is at least the threshold, 0 elsewhere; a threshold of 0 keeps everything."""
    if threshold <= 0:
        return list(deltas)
    keeps = deviation(deltas) >= threshold
    return [torch.where(keeps, delta, 0.0) for delta in deltas]


def sce(deltas: Sequence[torch.Tensor], *, threshold: float, weights: Sequence[float]) -> Parts:
    """Select, Calculate, Erase: of the elements that differ most between the experts, the weighted mean of the edits that agree with the sign of
    their plain sum; a sum of 0 elects plus (Wan et al. 2024, arXiv 2408.07990, section 3.2)."""
    deltas = selected(deltas, threshold)
    elected, divisor, parts = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0]), []
    for delta in deltas:
        elected += delta
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = torch.where(elected >= 0, delta > 0, delta < 0)
        parts.append(torch.where(agrees, weight * delta, 0.0))
        divisor += weight * agrees.double()
    return parts, torch.where(divisor > 0, divisor, 1.0)


def importance(delta: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
    """Arcee Fusion's |Δ|·KL(softmax(θ) ‖ softmax(θ₀)), float32; the divergence of each row, float64 (r, 1)."""
    return (delta.abs() * divergence).float()


def fuse(delta: torch.Tensor, divergence: torch.Tensor, *, threshold: float) -> torch.Tensor:
    """Δ where its importance is at least the threshold, 0 elsewhere (Arcee Fusion, mergekit 0.1's announcement)."""
    return torch.where(importance(delta, divergence).double() >= threshold, delta, 0.0)
