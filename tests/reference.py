"""An independent reference for FFG and OTA: plain numpy on whole models, each a dictionary of arrays by parameter name.

Written from the published formulas (arXiv 2509.11167) and shared with nothing in ota_core. Merges are float64. Scores are
float32, √v̂ · |Δ| in that order, because a threshold is a statement about ranks: float64 would break ties that the definition has.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One expert: its weights, its second moments by parameter name, and what may differ between experts."""

    weights: Tensors
    v: Tensors = field(default_factory=dict)
    step: int | None = None
    beta2: float | None = None
    density: float | None = None
    precond_threshold: float | None = None
    scaling_factor: float = 1.0


def rank1(v: NDArray[Any]) -> NDArray[np.float32]:
    """(r_i / s) · c_j over the last two axes, from float32 row sums r and column sums c; s = Σ r. Vectors stay whole."""
    v = v.astype(np.float32)
    if v.ndim < 2:
        return v
    out = np.zeros_like(v).reshape(-1, *v.shape[-2:])
    for index, matrix in enumerate(v.reshape(-1, *v.shape[-2:])):
        rows = matrix.astype(np.float64).sum(axis=1).astype(np.float32)
        cols = matrix.astype(np.float64).sum(axis=0).astype(np.float32)
        total = math.fsum(rows.tolist())
        if total > 0:
            out[index] = (rows.astype(np.float64) / total).astype(np.float32)[:, None] * cols[None, :]
    return out.reshape(v.shape)


def curvature(expert: Expert, compression: str = "none", bias_correction: bool = False) -> Tensors:
    """v̂ in float32: v as stored or its rank-1 form, divided by 1 − β₂^t when both are known and it is asked for."""
    v = {name: rank1(x) if compression == "rank1" else x.astype(np.float32) for name, x in expert.v.items()}
    if bias_correction and expert.step is not None and expert.beta2 is not None:
        factor = np.float32(1.0 / (1.0 - expert.beta2**expert.step))
        v = {name: x * factor for name, x in v.items()}
    return v


def scores(base: Tensors, expert: Expert, v: Tensors, metric: str = "curvature") -> Tensors:
    """√v̂ · |Δ| (or |Δ|) in float32 for every tensor that carries curvature."""
    out = {}
    for name in v:
        size = np.abs(expert.weights[name].astype(np.float32) - base[name].astype(np.float32))
        out[name] = np.sqrt(v[name]) * size if metric == "curvature" else size
    return out


def kept_count(density: float, total: int) -> int:
    """k = ρ·N rounded to the nearest integer, halves up."""
    return math.floor(density * total + 0.5)


def threshold(values: NDArray[Any], density: float) -> np.float32:
    """The k-th largest value by a full sort; infinite when k = 0, so that nothing reaches it."""
    k = kept_count(density, values.size)
    return np.float32(np.inf) if k == 0 else np.sort(values, axis=None)[::-1][k - 1]


def thresholds(expert: Expert, score: Tensors, scope: str = "global") -> dict[str, np.float32]:
    """τ by tensor: from the density over the whole expert or per tensor, or from precond_threshold in units of v·Δ²."""
    if expert.precond_threshold is not None:
        return dict.fromkeys(score, np.float32(math.sqrt(expert.precond_threshold)))
    assert expert.density is not None
    if scope == "per_tensor":
        return {name: threshold(x, expert.density) for name, x in score.items()}
    everything = np.concatenate([x.reshape(-1) for x in score.values()]) if score else np.zeros(0, np.float32)
    return dict.fromkeys(score, threshold(everything, expert.density))


def masks(base: Tensors, expert: Expert, v: Tensors, scope: str = "global", metric: str = "curvature") -> Tensors | None:
    """(score ≥ τ) and (score > 0) by tensor; None when FFG is off (no density, or density 1)."""
    if expert.precond_threshold is None and (expert.density is None or expert.density == 1):
        return None
    score = scores(base, expert, v, metric)
    tau = thresholds(expert, score, scope)
    return {name: (x >= tau[name]) & (x > 0) for name, x in score.items()}


def importance(v: Tensors, expert: Expert, power: float, normalise: str, epsilon: float) -> Tensors:
    """p = v̂^power [/ its mean over the whole expert] · scaling_factor + ε, float64."""
    p = {name: x.astype(np.float64) ** power for name, x in v.items()}
    if normalise == "global":
        mean = sum(x.sum() for x in p.values()) / sum(x.size for x in p.values())
        p = {name: x / mean for name, x in p.items()}
    return {name: x * expert.scaling_factor + epsilon for name, x in p.items()}


def missing(base: Tensors, experts: Sequence[Expert], tied: Mapping[str, str]) -> list[tuple[str, int]]:
    """(tensor, expert) for every tensor that the expert moved and that has no curvature there, its own or its twin's."""
    return [
        (name, m)
        for name in base
        for m, expert in enumerate(experts)
        if tied.get(name, name) not in expert.v and (expert.weights[name] != base[name]).any()
    ]


def ota(
    base: Tensors,
    experts: Sequence[Expert],
    *,
    power: float = 0.5,
    scope: str = "global",
    metric: str = "curvature",
    mask_curvature: str = "merge",
    compression: str = "none",
    bias_correction: bool = False,
    normalise: str = "none",
    epsilon: float = 0.0,
    denominator: str = "kept",
    fallback: str = "base",
    masked_merge: str = "precond",
    rescale: bool = False,
    lambda_: float = 1.0,
    missing_curvature: str = "error",
    tied: Mapping[str, str] | None = None,
    scales: Tensors | None = None,
) -> Tensors:
    """θ = θ₀ + λ · (Σ s·mask·p·Δ) / P by tensor, float64. ``tied`` maps an alias to the tensor whose curvature it shares.

    scales: tensor to the s of each expert, by which its part is multiplied when all else is decided; 1 without it.
    """
    tied = dict(tied or {})
    without = missing(base, experts, tied)
    if without and missing_curvature == "error":
        raise ValueError(f"no curvature: {without}")
    vs = [{n: x for n, x in curvature(e, compression, bias_correction).items() if n not in tied} for e in experts]
    full = [{n: x for n, x in curvature(e, "none", bias_correction).items() if n not in tied} for e in experts]
    ps = [importance(v, e, power, normalise, epsilon) for v, e in zip(vs, experts, strict=True)]
    scored = full if mask_curvature == "full" else vs
    kept = [masks(base, e, v, scope, metric) for e, v in zip(experts, scored, strict=True)]

    s = scales or {name: np.ones(len(experts)) for name in base}
    merged = {}
    for name, start in base.items():
        theta0 = start.astype(np.float64)
        deltas = [e.weights[name].astype(np.float64) - theta0 for e in experts]
        if any(tensor == name for tensor, _ in without):
            merged[name] = theta0 + lambda_ * sum(x * d for x, d in zip(s[name], deltas, strict=True)) / len(experts)
            continue
        twin = tied.get(name, name)
        numerator, total, weight_of_kept = (np.zeros_like(theta0) for _ in range(3))
        anyone = np.zeros(theta0.shape, dtype=bool)
        parts = []
        for m, expert in enumerate(experts):
            if twin not in vs[m]:
                continue
            own = kept[m]
            mask = np.ones(theta0.shape, dtype=bool) if own is None else own[twin]
            p = ps[m][twin] if masked_merge == "precond" else np.full(theta0.shape, expert.scaling_factor, np.float64)
            task = np.where(mask, deltas[m], 0.0)
            if rescale and (task != 0).any():
                task = task * (np.linalg.norm(deltas[m]) / np.linalg.norm(task))
            numerator += s[name][m] * mask * p * task
            weight_of_kept += mask * p
            total += p
            anyone |= mask
            parts.append((expert.scaling_factor, task, s[name][m]))
        if masked_merge == "ties":
            everybody = sum(e.scaling_factor for e in experts) if denominator == "all" else None
            update = elected_mean(parts, theta0.shape, everybody)
        else:
            divisor = weight_of_kept if denominator == "kept" else total
            update = np.divide(numerator, divisor, out=np.zeros_like(theta0), where=divisor > 0)
        merged[name] = theta0 + lambda_ * update
        if fallback == "mean" and parts:
            mean = theta0 + sum(x * delta for x, delta in zip(s[name], deltas, strict=True)) / len(experts)
            merged[name] = np.where(anyone, merged[name], mean)
    return merged


def elected_mean(
    parts: Sequence[tuple[float, NDArray[Any], float]], shape: tuple[int, ...], everybody: float | None = None
) -> NDArray[np.float64]:
    """TIES after FFG: elect the sign of Σ s·Δ, then the s-weighted mean of the Δ that have it; 0 where nobody does. parts: (s, Δ, what
    Δ is multiplied by in the mean). everybody: the Σ s to divide by, with ``denominator: all``; None for that of the Δ that agree."""
    sign = np.sign(sum((s * task for s, task, _ in parts), np.zeros(shape)))
    total, weight = np.zeros(shape), np.zeros(shape)
    for s, task, scale in parts:
        agrees = (np.sign(task) == sign) & (task != 0)
        total += np.where(agrees, scale * s * task, 0.0)
        weight += np.where(agrees, s, 0.0)
    if everybody is not None:
        return total / everybody
    return np.divide(total, weight, out=np.zeros(shape), where=weight > 0)


def ota_without_base(experts: Sequence[Expert], *, power: float = 0.5, compression: str = "none", bias_correction: bool = False,
                     normalise: str = "none", epsilon: float = 0.0) -> Tensors:  # fmt: skip
    """θ = Σ p·θ_m / Σ p, float64; the plain mean where Σ p = 0."""
    ps = [importance(curvature(e, compression, bias_correction), e, power, normalise, epsilon) for e in experts]
    merged = {}
    for name in experts[0].weights:
        thetas = [e.weights[name].astype(np.float64) for e in experts]
        total = sum(p[name] for p in ps)
        weighted = sum(p[name] * theta for p, theta in zip(ps, thetas, strict=True))
        merged[name] = np.where(total > 0, weighted / np.where(total > 0, total, 1.0), sum(thetas) / len(thetas))
    return merged
