"""The best factors of a difference of two matrices, and how far their product is from it.

Legend: Δ (R, C) is the difference, k the rank, l > k the directions that are looked at. Blocks of rows of Δ come again and again, so that
no more than a block need be in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import sqrt

import torch

Blocks = Callable[[], Iterator[tuple[int, torch.Tensor]]]
"""All rows of Δ in their order: the first row of a block, and its rows, float32 (n, C), on the device."""

_ROUNDS = 4
_SPARE = 16


@dataclass(frozen=True)
class Factors:
    """B (R, k) and A (k, C), float32 on the CPU. Their product is the approximation of Δ, each with the root of the singular values."""

    b: torch.Tensor
    a: torch.Tensor
    norm: float
    """‖Δ‖ (Frobenius)."""
    exact: bool
    """Whether the singular values are those of Δ itself, and not of its part in the directions that were found."""


def squared_norm(blocks: Blocks) -> float:
    """‖Δ‖², added in float64."""
    return sum(float((rows.double() ** 2).sum()) for _, rows in blocks())


def factors_of(
    blocks: Blocks, shape: tuple[int, int], rank: int, *, exact: bool, largest_error: float | None = None, device: str = "cpu"
) -> Factors | None:
    """Factors of at most this rank; fewer where ``largest_error``, the distance over ‖Δ‖, is kept with fewer. None where Δ is zero.

    Not ``exact``: by a randomised subspace iteration (Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1) with a fixed
    seed, four rounds and half as many spare directions as the rank.
    """
    norm2 = squared_norm(blocks)
    if norm2 == 0:
        return None
    rows, cols = shape
    rank = min(rank, rows, cols)
    wanted = min(rows, cols, rank + max(_SPARE, rank // 2))
    exact = exact or wanted == min(rows, cols)
    if exact:
        whole = torch.cat([part for _, part in blocks()])
        u, s, vh = torch.linalg.svd(whole, full_matrices=False)
        del whole
    else:
        u, s, vh = _randomised(blocks, rows, cols, wanted, device)
    kept = rank if largest_error is None else _smallest(s, norm2, rank, largest_error)
    # Directions that carry nothing but rounding: of a difference whose own rank is lower.
    kept = max(1, min(kept, int((s[:rank] > s[0] * 1e-7).sum())))
    root = s[:kept].sqrt()
    return Factors((u[:, :kept] * root).cpu(), (root[:, None] * vh[:kept]).cpu(), sqrt(norm2), exact)


def _randomised(
    blocks: Blocks, rows: int, cols: int, wanted: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    start = torch.randn(cols, wanted, generator=torch.Generator().manual_seed(0)).to(device)
    left = torch.empty(rows, wanted, device=device)
    for turn in range(_ROUNDS + 1):
        for first, part in blocks():
            left[first : first + part.shape[0]] = part @ start
        q, _ = torch.linalg.qr(left)
        small = torch.zeros(wanted, cols, device=device)
        for first, part in blocks():
            small += q[first : first + part.shape[0]].T @ part
        if turn < _ROUNDS:
            start, _ = torch.linalg.qr(small.T)
    inner, s, vh = torch.linalg.svd(small, full_matrices=False)
    return q @ inner, s, vh


def _smallest(s: torch.Tensor, norm2: float, rank: int, largest_error: float) -> int:
    """The smallest rank that leaves at most this share of ‖Δ‖, or the largest allowed."""
    left = norm2 - torch.cumsum(s.double() ** 2, 0)
    enough = torch.nonzero(left[:rank] <= largest_error**2 * norm2)
    return int(enough[0]) + 1 if len(enough) else rank


def distance(blocks: Blocks, b: torch.Tensor, a: torch.Tensor, device: str = "cpu") -> float:
    """‖Δ − B·A‖ (Frobenius), added in float64. b (R, k), a (k, C): the factors as they are stored."""
    total, b, a = 0.0, b.float().to(device), a.float().to(device)
    for first, part in blocks():
        total += float(((part - b[first : first + part.shape[0]] @ a).double() ** 2).sum())
    return sqrt(total)
