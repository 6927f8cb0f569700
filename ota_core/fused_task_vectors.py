"""The baselines on the CPU without intermediate tensors: the operations of ``methods.task_vectors``, ``dare`` and ``averages`` in their
order, hence the same bits (tests/ota_core/test_fused.py)."""

import math
from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from ota_core.methods.dare import key_of

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_compile = numba.njit(cache=True, nogil=True, error_model="numpy")


@_compile
def _trimmed(base: F32, theta: F32, lowest: np.float32, highest: np.float32, left: F64) -> None:
    for i in range(base.shape[0]):
        delta = np.float64(theta[i]) - np.float64(base[i])
        size = abs(np.float32(delta))
        left[i] = delta if (size >= lowest) & (size <= highest) else 0.0


@_compile
def _dropped(base: F32, theta: F32, key: np.uint64, start: int, density: float, divisor: float, left: F64) -> None:
    gamma, mix1, mix2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
    for i in range(base.shape[0]):
        bits = np.uint64(start + i + 1) * gamma + key
        bits = (bits ^ (bits >> np.uint64(30))) * mix1
        bits = (bits ^ (bits >> np.uint64(27))) * mix2
        bits = bits ^ (bits >> np.uint64(31))
        random = np.float64(bits >> np.uint64(11)) * 2.0**-53
        delta = np.float64(theta[i]) - np.float64(base[i])
        left[i] = delta / divisor if random < density else 0.0


@_compile
def _add(left: F64, weight: float, total: F64) -> None:
    for i in range(left.shape[0]):
        total[i] += weight * left[i]


@_compile
def _add_agreeing(left: F64, weight: float, elected: F64, total: F64, divisor: F64) -> None:
    for i in range(left.shape[0]):
        weighted = weight * left[i]
        agrees = (weighted > 0) if elected[i] >= 0 else (weighted < 0)
        total[i] += weighted if agrees else 0.0
        divisor[i] += weight if agrees else 0.0


@_compile
def _finish(base: F32, total: F64, divisor: F64, least: float, lam: float, out: F64) -> None:
    for i in range(base.shape[0]):
        merged = total[i] / divisor[i] if abs(divisor[i]) >= least else total[i]
        out[i] = np.float64(base[i]) + lam * merged


@_compile
def _add_theta(theta: F32, weight: float, total: F64) -> None:
    for i in range(theta.shape[0]):
        total[i] += weight * np.float64(theta[i])


@dataclass(frozen=True, kw_only=True)
class Part:
    """One expert's part in a block of n elements, and what of its task vector is left."""

    theta: torch.Tensor
    """float32 (n,)"""
    weight: float
    lowest: float = 0.0
    highest: float = math.inf
    """Limits of |Δ| (TIES, breadcrumbs)."""
    random: tuple[int, int, str, int] | None = None
    """DARE: seed, expert, tensor and the block's first element; None where nothing is dropped."""
    density: float = 1.0
    rescale: bool = True

    @cached_property
    def key(self) -> np.uint64:
        """DARE's key of this tensor."""
        assert self.random is not None
        return np.uint64(key_of(*self.random[:3]))

    def left(self, base: F32) -> F64:
        """What is left of the task vector, float64 (n,)."""
        out = np.empty(base.shape[0])
        if self.random is None:
            _trimmed(base, self.theta.numpy(), np.float32(self.lowest), np.float32(self.highest), out)
        else:
            divisor = self.density if self.rescale else 1.0
            _dropped(base, self.theta.numpy(), self.key, self.random[3], self.density, divisor, out)
        return out


def combine_block(
    base: torch.Tensor, parts: list[Part], *, elect: bool, normalize: bool, lam: float, nothing: float
) -> torch.Tensor:
    """θ₀ + λ · what ``add_up`` or, with ``elect``, ``elect_and_add`` makes of the parts: float64 (n,).

    base: float32 (n,). nothing: a divisor smaller than this divides by 1.
    """
    start = base.numpy()
    lefts = [part.left(start) for part in parts]
    total = np.zeros(start.shape[0])
    for left, part in zip(lefts, parts, strict=True):
        _add(left, part.weight, total)
    divisor = np.full(start.shape[0], sum(part.weight for part in parts) if normalize else 1.0)
    if elect:
        elected = total
        total, divisor = np.zeros(start.shape[0]), np.zeros(start.shape[0])
        for left, part in zip(lefts, parts, strict=True):
            _add_agreeing(left, part.weight, elected, total, divisor)
        if not normalize:
            divisor[:] = 1.0
    out = np.empty(start.shape[0])
    _finish(start, total, divisor, nothing, lam, out)
    return torch.from_numpy(out)


def linear_block(thetas: list[torch.Tensor], weights: list[float], *, normalize: bool) -> torch.Tensor:
    """``methods.averages.linear`` of float32 blocks (n,): float64 (n,)."""
    total = np.zeros(thetas[0].numel())
    for theta, weight in zip(thetas, weights, strict=True):
        _add_theta(theta.numpy(), weight, total)
    return torch.from_numpy(total / sum(weights) if normalize else total)
