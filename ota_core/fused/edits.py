"""nearswap, Arcee Fusion, RAM and SCE in compiled passes: what ``methods.edits`` computes, tile by tile, with the same bits.

Blocks are n elements as stored, of the base and of M models; Δ_m is what a model's weights differ by from the base's.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled
from ota_core.compute.subspace import dot
from ota_core.files.rows import Rows
from ota_core.fused.memory import clear_absent, lacks, load, load_base, start_of, store, tile_of
from ota_core.fused.sources import SOURCE, TILE, WRITTEN, source_of

F64 = NDArray[np.float64]


def _table(thetas: Sequence[Rows]) -> NDArray[Any]:
    return np.array([source_of(theta)[()] for theta in thetas], SOURCE)


def _start(base: Rows, thetas: Sequence[Rows]) -> Rows:
    """θ₀ with a mean in rows that the base lacks."""
    start = start_of(base, thetas)
    assert start is not None
    return start


@compiled
def _deltas(sources: Any, base: Any, first: int, count: int, theta: Any, has: Any, deltas: Any) -> None:
    """Δ of a tile, float64 (M, TILE); 0 in rows that a model lacks."""
    for m in range(sources.shape[0]):
        load(sources[m], first, count, theta)
        for i in range(count):
            deltas[m, i] = np.float64(theta[i]) - np.float64(base[i])
        clear_absent(sources[m], first, count, has, deltas[m])


@compiled
def _delta(source: Any, base: Any, first: int, count: int, theta: Any, has: Any, delta: Any) -> None:
    """Δ of one model's tile, float64 (TILE,)."""
    load(source, first, count, theta)
    for i in range(count):
        delta[i] = np.float64(theta[i]) - np.float64(base[i])
    clear_absent(source, first, count, has, delta)


@compiled
def _nearswap(base_source: Any, base: Any, source: Any, n: int, t: float, lam: float, kind: int, address: int) -> None:
    theta, delta, has = np.empty(TILE, np.float32), np.empty(TILE), np.empty(TILE, np.bool_)
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load_base(base_source, first, count, base)
        _delta(source, base, first, count, theta, has, delta)
        for i in range(count):
            delta[i] = np.float64(base[i]) + lam * min(t, max(-t, delta[i]))
        store(delta, count, kind, address, first, theta)


def nearswap_block(base: Rows, theta: Rows, out: Rows, *, t: float, lam: float) -> None:
    """``methods.edits.nearswap`` of a block, rounded into ``out``: float32 or bfloat16, contiguous."""
    start = _start(base, [theta])
    _nearswap(source_of(start)[()], tile_of(start), source_of(theta)[()], base.size, t, lam, WRITTEN[out.dtype], out.address)


@compiled
def _ram(
    base_source: Any, base: Any, sources: Any, n: int, least: float, boosts: Any, lam: float, kind: int, address: int
) -> None:
    theta, total, has = np.empty(TILE, np.float32), np.empty(TILE), np.empty(TILE, np.bool_)
    deltas, movers = np.empty((sources.shape[0], TILE)), np.empty(TILE)
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load_base(base_source, first, count, base)
        _deltas(sources, base, first, count, theta, has, deltas)
        movers[:] = 0.0
        total[:] = 0.0
        for m in range(sources.shape[0]):
            for i in range(count):
                movers[i] += 1.0 if abs(deltas[m, i]) > least else 0.0
        for m in range(sources.shape[0]):
            for i in range(count):
                part = deltas[m, i] if abs(deltas[m, i]) > least else 0.0
                total[i] += boosts[m] * part if movers[i] == 1.0 else part
        for i in range(count):
            total[i] = np.float64(base[i]) + lam * (total[i] / max(movers[i], 1.0))
        store(total, count, kind, address, first, theta)


def ram_block(base: Rows, thetas: Sequence[Rows], out: Rows, *, least: float, boosts: Sequence[float], lam: float) -> None:
    """``methods.edits.ram`` of a block, rounded into ``out``. boosts: the factor on what one expert alone moved, M of them."""
    kind = WRITTEN[out.dtype]
    start = _start(base, thetas)
    _ram(
        source_of(start)[()],
        tile_of(start),
        _table(thetas),
        base.size,
        least,
        np.array(boosts, np.float64),
        lam,
        kind,
        out.address,
    )


@compiled
def _count_movers(base_source: Any, base: Any, sources: Any, n: int, least: float, counts: Any) -> None:
    theta, has = np.empty(TILE, np.float32), np.empty(TILE, np.bool_)
    deltas, movers = np.empty((sources.shape[0], TILE)), np.empty(TILE, np.int64)
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load_base(base_source, first, count, base)
        _deltas(sources, base, first, count, theta, has, deltas)
        movers[:] = 0
        for m in range(sources.shape[0]):
            for i in range(count):
                movers[i] += np.int64(abs(deltas[m, i]) > least)
        for m in range(sources.shape[0]):
            unique, shared = np.int64(0), np.int64(0)
            for i in range(count):
                moved = abs(deltas[m, i]) > least
                unique += np.int64(moved & (movers[i] == 1))
                shared += np.int64(moved & (movers[i] > 1))
            counts[m, 0] += shared
            counts[m, 1] += unique


def count_movers(base: Rows, thetas: Sequence[Rows], *, least: float) -> NDArray[np.int64]:
    """(elements that others moved too, elements that nobody else moved) of each expert's edits above ``least``: int64 (M, 2)."""
    counts = np.zeros((len(thetas), 2), np.int64)
    start = _start(base, thetas)
    _count_movers(source_of(start)[()], tile_of(start), _table(thetas), base.size, least, counts)
    return counts


@compiled
def _deviation(deltas: Any, count: int, out: Any) -> None:
    """√variance over the models of each element of a tile, float32; below the smallest normal number it counts as 0."""
    models = deltas.shape[0]
    for i in range(count):
        mean, square = 0.0, 0.0
        for m in range(models):
            mean += deltas[m, i]
        mean = mean / models
        for m in range(models):
            square += (deltas[m, i] - mean) * (deltas[m, i] - mean)
        found = np.float32(math.sqrt(square / models))
        out[i] = found if found >= np.float32(2.0**-126) else np.float32(0.0)


@compiled
def _deviations(base_source: Any, base: Any, sources: Any, n: int, out: Any) -> None:
    theta, has, deltas = np.empty(TILE, np.float32), np.empty(TILE, np.bool_), np.empty((sources.shape[0], TILE))
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load_base(base_source, first, count, base)
        _deltas(sources, base, first, count, theta, has, deltas)
        _deviation(deltas, count, out[first : first + count])


def deviations(base: Rows, thetas: Sequence[Rows]) -> NDArray[np.float32]:
    """``methods.edits.deviation`` of a block: float32 (n,)."""
    found = np.empty(base.size, np.float32)
    start = _start(base, thetas)
    _deviations(source_of(start)[()], tile_of(start), _table(thetas), base.size, found)
    return found


@compiled
def _squares(base_source: Any, base: Any, sources: Any, rows: int, columns: int, threshold: np.float32, out: Any) -> None:
    theta, has, deltas = np.empty(TILE, np.float32), np.empty(TILE, np.bool_), np.empty((sources.shape[0], TILE))
    spread, row = np.empty(TILE, np.float32), np.empty((sources.shape[0], columns))
    for r in range(rows):
        for start in range(0, columns, TILE):
            count = min(TILE, columns - start)
            load_base(base_source, r * columns + start, count, base)
            _deltas(sources, base, r * columns + start, count, theta, has, deltas)
            if threshold > 0:
                _deviation(deltas, count, spread)
                for m in range(sources.shape[0]):
                    for i in range(count):
                        row[m, start + i] = deltas[m, i] if spread[i] >= threshold else 0.0
            else:
                row[:, start : start + count] = deltas[:, :count]
        for m in range(sources.shape[0]):
            out[r, m] = dot(row[m], row[m])


def squares(base: Rows, thetas: Sequence[Rows], rows: int, *, threshold: float) -> F64:
    """Σ Δ² of each row and expert over the elements whose deviation reaches the threshold (0: over all): float64 (R, M)."""
    found = np.empty((rows, len(thetas)))
    start = _start(base, thetas)
    _squares(source_of(start)[()], tile_of(start), _table(thetas), rows, base.size // rows, np.float32(threshold), found)
    return found


@compiled
def _sce(
    base_source: Any, base: Any, sources: Any, n: int, threshold: np.float32, weights: Any, lam: float, kind: int, address: int
) -> None:
    theta, has, spread = np.empty(TILE, np.float32), np.empty(TILE, np.bool_), np.empty(TILE, np.float32)
    deltas, elected, total, divisor = np.empty((sources.shape[0], TILE)), np.empty(TILE), np.empty(TILE), np.empty(TILE)
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load_base(base_source, first, count, base)
        _deltas(sources, base, first, count, theta, has, deltas)
        if threshold > 0:
            _deviation(deltas, count, spread)
            for m in range(sources.shape[0]):
                for i in range(count):
                    deltas[m, i] = deltas[m, i] if spread[i] >= threshold else 0.0
        elected[:] = 0.0
        total[:] = 0.0
        divisor[:] = 0.0
        for m in range(sources.shape[0]):
            for i in range(count):
                elected[i] += deltas[m, i]
        for m in range(sources.shape[0]):
            weight = weights[m]
            for i in range(count):
                agrees = (deltas[m, i] > 0) if elected[i] >= 0 else (deltas[m, i] < 0)
                total[i] += weight * deltas[m, i] if agrees else 0.0
                divisor[i] += weight if agrees else 0.0
        for i in range(count):
            merged = total[i] / divisor[i] if divisor[i] > 0 else 0.0
            total[i] = np.float64(base[i]) + lam * merged
        store(total, count, kind, address, first, theta)


def sce_block(base: Rows, thetas: Sequence[Rows], out: Rows, *, threshold: float, weights: Sequence[float], lam: float) -> None:
    """``methods.edits.sce`` of a block, rounded into ``out``. threshold: least deviation that is kept; 0 keeps everything."""
    start = _start(base, thetas)
    _sce(
        source_of(start)[()], tile_of(start), _table(thetas), base.size, np.float32(threshold), np.array(weights, np.float64), lam,
        WRITTEN[out.dtype], out.address,
    )  # fmt: skip


@compiled
def _divergence(base: Any, theta: Any) -> float:
    """KL(softmax(θ) ‖ softmax(θ₀)) of one row, float64 (C,) each."""
    top, top0 = theta.max(), base.max()
    total, total0, mean = 0.0, 0.0, 0.0
    for j in range(theta.shape[0]):
        share = math.exp(theta[j] - top)
        total += share
        total0 += math.exp(base[j] - top0)
        mean += share * (theta[j] - base[j])
    found: float = mean / total - ((top + math.log(total)) - (top0 + math.log(total0)))
    return max(0.0, found)


@compiled
def _divergences(base_source: Any, base: Any, source: Any, rows: int, columns: int, out: Any) -> None:
    tile, has, before, after = np.empty(TILE, np.float32), np.empty(TILE, np.bool_), np.empty(columns), np.empty(columns)
    for r in range(rows):
        for start in range(0, columns, TILE):
            count = min(TILE, columns - start)
            load_base(base_source, r * columns + start, count, base)
            before[start : start + count] = base[:count]
            load(source, r * columns + start, count, tile)
            after[start : start + count] = tile[:count]
            if lacks(source, r * columns + start, count, has):
                for i in range(count):
                    after[start + i] = after[start + i] if has[i] else before[start + i]
        out[r] = _divergence(before, after)


def divergences(base: Rows, theta: Rows, rows: int) -> F64:
    """``methods.edits.divergence`` of each row of a block: float64 (R,)."""
    found = np.empty(rows)
    start = _start(base, [theta])
    _divergences(source_of(start)[()], tile_of(start), source_of(theta)[()], rows, base.size // rows, found)
    return found


@compiled
def _divergences_of(base: Any, theta: Any, out: Any) -> None:
    for r in range(base.shape[0]):
        out[r] = _divergence(base[r], theta[r])


def divergences_of(base: F64, theta: F64) -> F64:
    """The same of rows in memory, float64 (R, C) each."""
    found = np.empty(base.shape[0])
    _divergences_of(base, theta, found)
    return found


@compiled
def _importances(base_source: Any, base: Any, source: Any, columns: int, n: int, divergence: Any, out: Any) -> None:
    theta, delta, has = np.empty(TILE, np.float32), np.empty(TILE), np.empty(TILE, np.bool_)
    for r in range(divergence.shape[0]):
        for start in range(0, columns, TILE):
            first = r * columns + start
            count = min(TILE, columns - start)
            load_base(base_source, first, count, base)
            _delta(source, base, first, count, theta, has, delta)
            for i in range(count):
                out[first + i] = np.float32(abs(delta[i]) * divergence[r])


def importances(base: Rows, theta: Rows, divergence: F64) -> NDArray[np.float32]:
    """``methods.edits.importance`` of a block: float32 (n,). divergence: of each of its R rows, float64 (R,)."""
    found = np.empty(base.size, np.float32)
    start = _start(base, [theta])
    _importances(
        source_of(start)[()], tile_of(start), source_of(theta)[()], base.size // divergence.size, base.size, divergence, found
    )
    return found


@compiled
def _fuse(
    base_source: Any, base: Any, source: Any, columns: int, divergence: Any, threshold: float, lam: float, kind: int, address: int
) -> None:  # fmt: skip
    theta, delta, has = np.empty(TILE, np.float32), np.empty(TILE), np.empty(TILE, np.bool_)
    for r in range(divergence.shape[0]):
        for start in range(0, columns, TILE):
            first = r * columns + start
            count = min(TILE, columns - start)
            load_base(base_source, first, count, base)
            _delta(source, base, first, count, theta, has, delta)
            for i in range(count):
                kept = np.float64(np.float32(abs(delta[i]) * divergence[r])) >= threshold
                delta[i] = np.float64(base[i]) + lam * (delta[i] if kept else 0.0)
            store(delta, count, kind, address, first, theta)


def fuse_block(base: Rows, theta: Rows, out: Rows, *, divergence: F64, threshold: float, lam: float) -> None:
    """``methods.edits.fuse`` of a block, rounded into ``out``. divergence: of each of its R rows, float64 (R,)."""
    start = _start(base, [theta])
    _fuse(
        source_of(start)[()], tile_of(start), source_of(theta)[()], base.size // divergence.size, divergence, threshold, lam, WRITTEN[out.dtype], out.address
    )  # fmt: skip
