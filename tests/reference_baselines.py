"""Independent references for the baselines: plain float64 numpy on dictionaries of arrays. Nothing is shared with ota_core.

Where the papers leave a choice (how k is rounded, what a zero sum elects), the choice is what mergekit 0.1.5 was observed to do.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.reference import Tensors

Array = NDArray[Any]


def linear(models: Sequence[Tensors], weights: Sequence[float], normalize: bool = True) -> Tensors:
    """Σ w·θ, divided by Σ w unless ``normalize`` is false."""
    divisor = sum(weights) if normalize else 1.0
    return {
        name: sum(w * m[name].astype(np.float64) for w, m in zip(weights, models, strict=True)) / divisor for name in models[0]
    }


def trim(task: Array, density: float) -> Array:
    """TIES: zero all but the k largest |Δ| of a tensor, k = ⌊ρ·n⌋ but at least 1. Equal values at the threshold all stay."""
    k = max(1, int(density * task.size))
    tau = np.sort(np.abs(task), axis=None)[::-1][k - 1]
    return np.where(np.abs(task) >= tau, task, 0.0)


def breadcrumb(task: Array, density: float, gamma: float) -> Array:
    """Breadcrumbs: drop the ⌊γ·n⌋ largest |Δ| (fewer when less than that is to go) and keep the ⌊ρ·n⌋ that follow."""
    n = task.size
    k = int(density * n)
    drop = min(int(gamma * n), n - k)
    order = np.argsort(-np.abs(task), axis=None, kind="stable")
    keep = np.zeros(n, dtype=bool)
    keep[order[drop : drop + k]] = True
    return np.where(keep.reshape(task.shape), task, 0.0)


def dare(task: Array, keep: Array, density: float, rescale: bool = True) -> Array:
    """DARE: keep what the given mask keeps, divided by the density (Yu et al. 2023)."""
    return np.where(keep, task, 0.0) / (density if rescale else 1.0)


def weighted_sum(tasks: Sequence[Array], weights: Sequence[float], normalize: bool, scales: Sequence[float]) -> Array:
    """Σ s·w·Δ, on request divided by Σ w (by 1 where that is 0)."""
    total = sum((s * w * task for s, w, task in zip(scales, weights, tasks, strict=True)), np.zeros_like(tasks[0]))
    divisor = sum(weights) if normalize else 1.0
    return total / (divisor if abs(divisor) >= 1e-8 else 1.0)


def elect_and_merge(tasks: Sequence[Array], weights: Sequence[float], normalize: bool, scales: Sequence[float]) -> Array:
    """TIES: elect the sign of Σ w·Δ (zero elects plus), then add up the s·w·Δ of that sign, on request divided by their weights."""
    weighted = [w * task for w, task in zip(weights, tasks, strict=True)]
    plus = sum(weighted, np.zeros_like(tasks[0])) >= 0
    total, divisor = np.zeros_like(tasks[0]), np.zeros_like(tasks[0])
    for w, s, entry in zip(weights, scales, weighted, strict=True):
        agrees = np.where(plus, entry > 0, entry < 0)
        total += np.where(agrees, s * entry, 0.0)
        divisor += np.where(agrees, w, 0.0)
    return total / np.where(np.abs(divisor) >= 1e-8, divisor, 1.0) if normalize else total


def add_up(
    base: Tensors,
    experts: Sequence[Tensors],
    weights: Sequence[float],
    left: Callable[[int, str, Array], Array] = lambda m, name, task: task,
    *,
    lambda_: float = 1.0,
    normalize: bool = False,
    elect: bool = False,
    scales: Tensors | None = None,
) -> Tensors:
    """θ₀ + λ · Σ s · w · what is left of Δ, with ``elect`` by the signs that TIES elects. left: expert's number, tensor, Δ → what is left;
    scales: tensor to the s of each expert, 1 without it."""
    combine = elect_and_merge if elect else weighted_sum
    merged = {}
    for name, start in base.items():
        theta0 = start.astype(np.float64)
        tasks = [left(m, name, expert[name].astype(np.float64) - theta0) for m, expert in enumerate(experts)]
        factors = np.ones(len(experts)) if scales is None else scales[name]
        merged[name] = theta0 + lambda_ * combine(tasks, weights, normalize, factors.tolist())
    return merged


def fisher(base: Tensors | None, experts: Sequence[Tensors], vs: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
    """Σ w·v·θ / Σ w·v (Matena & Raffel 2021); where that sum is 0 the base, or without one the plain mean."""
    merged = {}
    for name in experts[0]:
        thetas = [e[name].astype(np.float64) for e in experts]
        fishers = [w * v[name].astype(np.float64) for w, v in zip(weights, vs, strict=True)]
        total = sum(fishers)
        weighted = sum(f * theta for f, theta in zip(fishers, thetas, strict=True))
        otherwise = base[name].astype(np.float64) if base is not None else sum(thetas) / len(thetas)
        merged[name] = np.where(total > 0, weighted / np.where(total > 0, total, 1.0), otherwise)
    return merged


def slerp(a: Tensors, b: Tensors, t: float) -> Tensors:
    """Along the great circle between the directions of two tensors; a straight line where |cos| ≥ 0.9995."""
    merged = {}
    for name in a:
        x, y = a[name].astype(np.float64), b[name].astype(np.float64)
        norms = np.linalg.norm(x) * np.linalg.norm(y)
        cosine = float(np.sum(x * y) / norms) if norms > 0 else 0.0
        if abs(cosine) >= 0.9995:
            merged[name] = (1 - t) * x + t * y
        else:
            angle = math.acos(cosine)
            merged[name] = (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
    return merged
