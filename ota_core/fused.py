"""OTA on the CPU in one pass over a block: score, mask, weight and sum of one expert without intermediate tensors.

The same operations in the same order as ``saliency`` and ``methods.ota``, hence the same bits (tests/ota_core/test_fused.py); numba
compiles them once and keeps them on disk. Contraction to fused multiply-adds stays off.
"""

from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_compile = numba.njit(cache=True, nogil=True, error_model="numpy")

BY_CURVATURE, BY_MAGNITUDE = 0, 1


@_compile
def _score(v_hat: np.float32, theta: np.float32, base: np.float32, metric: int) -> np.float32:
    delta = np.float32(np.float64(theta) - np.float64(base))
    if metric == 1:
        return abs(delta)
    return abs(np.sqrt(v_hat) * delta)


@_compile
def _count(base: F32, theta: F32, v: F32, factor: np.float32, metric: int, high: int, counts: NDArray[np.int64]) -> None:
    """The upper 16 bits of every score, or with ``high`` ≥ 0 the lower bits of the scores whose upper bits are ``high``."""
    # Scores of a piece first, counts after: the first loop runs in the processor's vector units.
    scores = np.empty(1024, np.float32)
    bits = scores.view(np.uint32)
    for start in range(0, base.shape[0], 1024):
        size = min(1024, base.shape[0] - start)
        for i in range(size):
            scores[i] = _score(v[start + i] * factor, theta[start + i], base[start + i], metric)
        if high < 0:
            for i in range(size):
                counts[bits[i] >> 16] += 1
        else:
            for i in range(size):
                if (bits[i] >> 16) == high:
                    counts[bits[i] & 0xFFFF] += 1


@_compile
def _keep(base: F32, theta: F32, v: F32, factor: np.float32, metric: int, tau: np.float32, kept: NDArray[np.bool_]) -> None:
    for i in range(base.shape[0]):
        score = _score(v[i] * factor, theta[i], base[i], metric)
        kept[i] = (score >= tau) & (score > 0)


@_compile
def _weights(v: F32, factor: np.float32, power: float, mean: float, scale: float, epsilon: float, weights: F64) -> None:
    if power == 0.5:
        for i in range(v.shape[0]):
            weights[i] = np.sqrt(np.float64(v[i] * factor)) / mean * scale + epsilon
    elif power == 1.0:
        for i in range(v.shape[0]):
            weights[i] = np.float64(v[i] * factor) / mean * scale + epsilon
    elif power == 0.0:
        for i in range(v.shape[0]):
            weights[i] = 1.0 / mean * scale + epsilon
    else:
        for i in range(v.shape[0]):
            weights[i] = np.float64(v[i] * factor) ** power / mean * scale + epsilon


@_compile
def _add(theta: F32, weights: F64, kept: NDArray[np.bool_], numerator: F64, total: F64, somebody: NDArray[np.bool_]) -> int:
    count = 0
    for i in range(theta.shape[0]):
        weight = weights[i] if kept[i] else 0.0
        numerator[i] += weight * np.float64(theta[i])
        total[i] += weight
        somebody[i] |= kept[i]
        count += kept[i]
    return count


@_compile
def _add_all(
    base: F32, theta: F32, weights: F64, kept: NDArray[np.bool_], numerator: F64, total: F64, somebody: NDArray[np.bool_]
) -> int:
    count = 0
    for i in range(theta.shape[0]):
        numerator[i] += weights[i] * np.float64(theta[i] if kept[i] else base[i])
        total[i] += weights[i]
        somebody[i] |= kept[i]
        count += kept[i]
    return count


@_compile
def _finish(base: F32, numerator: F64, total: F64, somebody: NDArray[np.bool_], lam: float, out: F64) -> None:
    for i in range(base.shape[0]):
        start = np.float64(base[i])
        target = numerator[i] / total[i] if total[i] > 0 else start
        merged = target if lam == 1.0 else start + lam * (target - start)
        out[i] = merged if somebody[i] else start


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One expert's part in a block; tensors are flat, of the block's n elements."""

    theta: torch.Tensor
    """float32 (n,)"""
    v: torch.Tensor
    """Second moments, float32 (n,), ≥ 0, not bias-corrected."""
    factor: float
    """1 / (1 − β₂^t), or 1."""
    scale: float = 1.0
    mean: float = 1.0
    threshold: float | None = None
    """τ on the score; None where FFG is off or ``kept`` is given."""
    kept: torch.Tensor | None = None
    """A mask made before, bool (n,)."""
    metric: int = BY_CURVATURE


def ota_block(
    base: torch.Tensor, votes: list[Vote], *, power: float, epsilon: float, lam: float, denominator: str
) -> tuple[torch.Tensor, list[int]]:
    """Merged rows, float64 (n,), and how many elements each expert kept: ``methods.ota.ota`` with its masks and weights.

    base: float32 (n,). Raises nothing; values are checked where they are read.
    """
    n = base.numel()
    start = base.numpy()
    numerator, total, weights = np.zeros(n), np.zeros(n), np.empty(n)
    somebody, mask = np.zeros(n, np.bool_), np.empty(n, np.bool_)
    counts = []
    for vote in votes:
        theta, v, factor = vote.theta.numpy(), vote.v.numpy(), np.float32(vote.factor)
        if vote.kept is not None:
            kept = vote.kept.numpy()
        elif vote.threshold is None:
            kept = mask
            kept[:] = True
        else:
            kept = mask
            _keep(start, theta, v, factor, vote.metric, np.float32(vote.threshold), kept)
        _weights(v, factor, power, vote.mean, vote.scale, epsilon, weights)
        if denominator == "kept":
            counts.append(_add(theta, weights, kept, numerator, total, somebody))
        else:
            counts.append(_add_all(start, theta, weights, kept, numerator, total, somebody))
    out = np.empty(n)
    _finish(start, numerator, total, somebody, lam, out)
    return torch.from_numpy(out), counts


def count_scores(
    base: torch.Tensor, theta: torch.Tensor, v: torch.Tensor, factor: float, metric: int, high: int | None, counts: torch.Tensor
) -> None:
    """Add a block's scores to a histogram of their upper bits, or of the lower bits of those whose upper bits are ``high``.

    base, theta, v: float32 (n,); counts: int64 (65536,).
    """
    upper = -1 if high is None else high
    _count(base.numpy(), theta.numpy(), v.numpy(), np.float32(factor), metric, upper, counts.numpy())
