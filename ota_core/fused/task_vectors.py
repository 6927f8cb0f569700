"""Task vectors and plain averages in one compiled pass: what ``methods.task_vectors``, ``dare`` and ``averages`` compute, tile by tile."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ota_core.compute.loops import compiled
from ota_core.files.rows import Rows
from ota_core.fused.memory import clear_absent, lacks, load, load_base, start_of, store, tile_of
from ota_core.fused.sources import SOURCE, TILE, WRITTEN, source_of
from ota_core.methods.numbers import key_of

PART = np.dtype(
    [
        ("theta", SOURCE),
        ("weight", np.float64),
        ("lowest", np.float32),
        ("highest", np.float32),
        ("factor", np.float64),
        ("random", np.int64),
        ("key", np.uint64),
        ("start", np.int64),
        ("density", np.float64),
        ("divisor", np.float64),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One expert's part in a block of n elements, and what of its task vector is left."""

    theta: Rows
    """The weights as they are stored: float32, bfloat16 or float16, n elements."""
    weight: float
    lowest: float = 0.0
    highest: float = math.inf
    """Limits of |Δ| (TIES, breadcrumbs)."""
    factor: float = 1.0
    """By what that is multiplied which lies within them (their ``rescale``)."""
    random: tuple[int, int, str, int] | None = None
    """DARE: seed, expert, tensor and the block's first element; None where nothing is dropped."""
    density: float = 1.0
    rescale: bool = True


@compiled
def _trimmed(count: int, base: Any, theta: Any, lowest: np.float32, highest: np.float32, factor: float, left: Any) -> None:
    for i in range(count):
        delta = np.float64(theta[i]) - np.float64(base[i])
        size = abs(np.float32(delta))
        left[i] = delta * factor if (size >= lowest) & (size <= highest) else 0.0


@compiled
def uniform(key: np.uint64, element: int) -> float:
    """The random number in [0, 1) of one element of a tensor: ``methods.dare.uniform``."""
    bits = np.uint64(element + 1) * np.uint64(0x9E3779B97F4A7C15) + key
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits = bits ^ (bits >> np.uint64(31))
    return np.float64(bits >> np.uint64(11)) * 2.0**-53


@compiled
def _dropped(count: int, base: Any, theta: Any, key: np.uint64, start: int, density: float, divisor: float, left: Any) -> None:
    for i in range(count):
        delta = np.float64(theta[i]) - np.float64(base[i])
        left[i] = delta / divisor if uniform(key, start + i) < density else 0.0


@compiled
def add(count: int, left: Any, weight: float, total: Any) -> None:
    """Add w·Δ of a tile."""
    for i in range(count):
        total[i] += weight * left[i]


@compiled
def add_agreeing(count: int, left: Any, weight: float, elected: Any, total: Any, divisor: Any) -> None:
    """The same where it has the elected sign, and its weight to the divisor."""
    for i in range(count):
        weighted = weight * left[i]
        agrees = (weighted > 0) if elected[i] >= 0 else (weighted < 0)
        total[i] += weighted if agrees else 0.0
        divisor[i] += weight if agrees else 0.0


@compiled
def finish(count: int, base: Any, total: Any, divisor: Any, least: float, lam: float, out: Any) -> None:
    """θ₀ + λ·total/divisor of a tile; a divisor smaller than ``least`` divides by 1."""
    for i in range(count):
        merged = total[i] / divisor[i] if abs(divisor[i]) >= least else total[i]
        out[i] = np.float64(base[i]) + lam * merged


@compiled
def _combine(
    base_source: Any, base: Any, parts: Any, n: int, elect: bool, normalize: bool, sum_of_weights: float, lam: float, least: float, kind: int,
    address: int,
) -> None:  # fmt: skip
    theta, has = np.empty(TILE, np.float32), np.empty(TILE, np.bool_)
    total, divisor, elected = np.empty(TILE), np.empty(TILE), np.empty(TILE)
    lefts = np.empty((parts.shape[0], TILE))
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load_base(base_source, first, count, base)
        total[:] = 0.0
        for m in range(parts.shape[0]):
            part, left = parts[m], lefts[m]
            load(part.theta, first, count, theta)
            if part.random:
                _dropped(count, base, theta, part.key, part.start + first, part.density, part.divisor, left)
            else:
                _trimmed(count, base, theta, part.lowest, part.highest, part.factor, left)
            clear_absent(part.theta, first, count, has, left)
            add(count, left, part.weight, total)
        if elect:
            elected[:] = total
            total[:] = 0.0
            divisor[:] = 0.0
            for m in range(parts.shape[0]):
                add_agreeing(count, lefts[m], parts[m].weight, elected, total, divisor)
        if normalize:
            if not elect:
                divisor[:] = sum_of_weights
            finish(count, base, total, divisor, least, lam, total)
        else:  # a division takes longer than all the rest
            for i in range(count):
                total[i] = np.float64(base[i]) + lam * total[i]
        store(total, count, kind, address, first, theta)


def combine_block(
    base: Rows, parts: Sequence[Part], out: Rows, *, elect: bool, normalize: bool, lam: float, nothing: float
) -> None:
    """θ₀ + λ · what ``add_up`` or, with ``elect``, ``elect_and_add`` makes of the parts, rounded into ``out``.

    base: n elements as stored; out: float32, bfloat16 or float64, n elements, contiguous. nothing: a divisor smaller than this divides by 1.
    """
    start = start_of(base, [part.theta for part in parts])
    assert start is not None
    table = np.zeros(len(parts), PART)
    for row, part in zip(table, parts, strict=True):
        row["theta"], row["weight"] = source_of(part.theta), part.weight
        row["lowest"], row["highest"], row["factor"] = part.lowest, part.highest, part.factor
        row["density"], row["divisor"] = part.density, part.density if part.rescale else 1.0
        if part.random is not None:
            row["random"], row["key"], row["start"] = 1, key_of(*part.random[:3]), part.random[3]
    weights = sum(part.weight for part in parts)
    where = WRITTEN[out.dtype], out.address
    _combine(source_of(start)[()], tile_of(start), table, base.size, elect, normalize, weights, lam, nothing, *where)


@compiled
def _average(
    filled: bool, base_source: Any, base: Any, thetas: Any, weights: Any, n: int, divisor: float, kind: int, address: int
) -> None:
    theta, total, has = np.empty(TILE, np.float32), np.empty(TILE), np.empty(TILE, np.bool_)
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        if filled:
            load_base(base_source, first, count, base)
        total[:] = 0.0
        for m in range(thetas.shape[0]):
            load(thetas[m], first, count, theta)
            weight = weights[m]
            if lacks(thetas[m], first, count, has):
                for i in range(count):
                    total[i] += weight * (np.float64(theta[i]) if has[i] else np.float64(base[i]))
            else:
                for i in range(count):
                    total[i] += weight * np.float64(theta[i])
        if divisor != 1.0:
            for i in range(count):
                total[i] = total[i] / divisor
        store(total, count, kind, address, first, theta)


def linear_block(
    thetas: Sequence[Rows], weights: Sequence[float], out: Rows, *, normalize: bool, base: Rows | None = None
) -> None:
    """``methods.averages.linear`` of blocks of n elements as stored, rounded into ``out``: float32, bfloat16 or float64, contiguous.

    base: n elements as stored, which stand in for rows that an expert lacks; without it that is the mean of those that have them.
    """
    start = start_of(base, thetas)
    table = np.array([source_of(theta)[()] for theta in thetas], SOURCE)
    divisor = float(sum(weights)) if normalize else 1.0
    source = source_of(start if start is not None else thetas[0])[()]
    where = WRITTEN[out.dtype], out.address
    _average(start is not None, source, tile_of(start), table, np.array(weights, np.float64), out.size, divisor, *where)


@compiled
def _slerp(first_source: Any, second_source: Any, n: int, factor0: float, factor1: float, kind: int, address: int) -> None:
    a, b, out, has = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE), np.empty(TILE, np.bool_)
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load_ends(first_source, second_source, first, count, a, b, has)
        for i in range(count):
            out[i] = factor0 * np.float64(a[i]) + factor1 * np.float64(b[i])
        store(out, count, kind, address, first, a)


@compiled
def load_ends(first_source: Any, second_source: Any, first: int, count: int, a: Any, b: Any, has: Any) -> None:
    """A tile of two models; a row that one of them lacks is the other's. ``has``: a tile, overwritten."""
    load(first_source, first, count, a)
    load(second_source, first, count, b)
    if lacks(first_source, first, count, has):
        for i in range(count):
            a[i] = a[i] if has[i] else b[i]
    if lacks(second_source, first, count, has):
        for i in range(count):
            b[i] = b[i] if has[i] else a[i]


def slerp_block(ends: tuple[Rows, Rows], factors: tuple[float, float], out: Rows) -> None:
    """``methods.averages.slerp`` of blocks of n elements as stored, rounded into ``out``: float32, bfloat16 or float64, contiguous."""
    first, second = (source_of(end)[()] for end in ends)
    _slerp(first, second, out.size, *factors, WRITTEN[out.dtype], out.address)
