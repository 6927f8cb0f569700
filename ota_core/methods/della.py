"""DELLA: edits are kept at random, the larger ones of a row with a higher chance (Deep, Bhardwaj & Poria 2024, arXiv 2406.11617, MAGPRUNE)."""

import torch


def chances(delta: torch.Tensor, *, density: float, epsilon: float) -> torch.Tensor:
    """The chance of each edit to be kept, from density − ε for the smallest |Δ| of a row to density + ε for the largest, by rank.

    delta: float64 (r, C), whole rows; result: float64 (r, C). Of equal edits (as float32) the later one ranks higher; a row of one element has
    the density.
    """
    columns = delta.shape[1]
    if columns == 1:
        return torch.full_like(delta, density)
    order = delta.float().abs().argsort(dim=1, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(columns, device=delta.device).expand_as(order))
    return (density - epsilon) + ranks.double() * (2.0 * epsilon / (columns - 1))


def keep_by_chance(delta: torch.Tensor, random: torch.Tensor, chance: torch.Tensor, *, rescale: bool) -> torch.Tensor:
    """Δ where random < chance, 0 elsewhere; divided by its chance with ``rescale``, which keeps the expectation of every edit.

    delta, random in [0, 1) and chance: float64 (r, C).
    """
    kept = torch.where(random < chance, delta, 0.0)
    return kept / chance if rescale else kept
