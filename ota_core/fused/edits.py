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
from ota_core.fused.memory import load, store
from ota_core.fused.sources import SOURCE, TILE, WRITTEN, source_of

F64 = NDArray[np.float64]


def _table(thetas: Sequence[Rows]) -> NDArray[Any]:
    return np.array([source_of(theta)[()] for theta in thetas], SOURCE)


@compiled
def _deltas(sources: Any, base: Any, first: int, count: int, theta: Any, deltas: Any) -> None:
    """Δ of a tile, float64 (M, TILE)."""
    for m in range(sources.shape[0]):
        load(sources[m], first, count, theta)
        for i in range(count):
            deltas[m, i] = np.float64(theta[i]) - np.float64(base[i])


@compiled
def _nearswap(base_source: Any, source: Any, n: int, t: float, lam: float, kind: int, address: int) -> None:
    base, theta, out = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE)
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load(base_source, first, count, base)
        load(source, first, count, theta)
        for i in range(count):
            delta = np.float64(theta[i]) - np.float64(base[i])
            out[i] = np.float64(base[i]) + lam * min(t, max(-t, delta))
        store(out, count, kind, address, first, theta)


def nearswap_block(base: Rows, theta: Rows, out: Rows, *, t: float, lam: float) -> None:
    """``methods.edits.nearswap`` of a block, rounded into ``out``: float32 or bfloat16, contiguous."""
    _nearswap(source_of(base)[()], source_of(theta)[()], base.size, t, lam, WRITTEN[out.dtype], out.address)


@compiled
def _ram(base_source: Any, sources: Any, n: int, least: float, boosts: Any, lam: float, kind: int, address: int) -> None:
    base, theta, total = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE)
    deltas, movers = np.empty((sources.shape[0], TILE)), np.empty(TILE)
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load(base_source, first, count, base)
        _deltas(sources, base, first, count, theta, deltas)
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
    _ram(source_of(base)[()], _table(thetas), base.size, least, np.array(boosts, np.float64), lam, kind, out.address)


@compiled
def _count_movers(base_source: Any, sources: Any, n: int, least: float, counts: Any) -> None:
    base, theta = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    deltas, movers = np.empty((sources.shape[0], TILE)), np.empty(TILE, np.int64)
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load(base_source, first, count, base)
        _deltas(sources, base, first, count, theta, deltas)
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
    _count_movers(source_of(base)[()], _table(thetas), base.size, least, counts)
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
def _deviations(base_source: Any, sources: Any, n: int, out: Any) -> None:
    base, theta, deltas = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty((sources.shape[0], TILE))
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load(base_source, first, count, base)
        _deltas(sources, base, first, count, theta, deltas)
        _deviation(deltas, count, out[first : first + count])


def deviations(base: Rows, thetas: Sequence[Rows]) -> NDArray[np.float32]:
    """``methods.edits.deviation`` of a block: float32 (n,)."""
    found = np.empty(base.size, np.float32)
    _deviations(source_of(base)[()], _table(thetas), base.size, found)
    return found


@compiled
def _squares(base_source: Any, sources: Any, rows: int, columns: int, threshold: np.float32, out: Any) -> None:
    base, theta, deltas = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty((sources.shape[0], TILE))
    spread, row = np.empty(TILE, np.float32), np.empty((sources.shape[0], columns))
    for r in range(rows):
        for start in range(0, columns, TILE):
            count = min(TILE, columns - start)
            load(base_source, r * columns + start, count, base)
            _deltas(sources, base, r * columns + start, count, theta, deltas)
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
    _squares(source_of(base)[()], _table(thetas), rows, base.size // rows, np.float32(threshold), found)
    return found


@compiled
def _sce(
    base_source: Any, sources: Any, n: int, threshold: np.float32, weights: Any, lam: float, kind: int, address: int
) -> None:
    base, theta, spread = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    deltas, elected, total, divisor = np.empty((sources.shape[0], TILE)), np.empty(TILE), np.empty(TILE), np.empty(TILE)
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load(base_source, first, count, base)
        _deltas(sources, base, first, count, theta, deltas)
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
    _sce(
        source_of(base)[()], _table(thetas), base.size, np.float32(threshold), np.array(weights, np.float64), lam,
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
def _divergences(base_source: Any, source: Any, rows: int, columns: int, out: Any) -> None:
    tile, base, theta = np.empty(TILE, np.float32), np.empty(columns), np.empty(columns)
    for r in range(rows):
        for start in range(0, columns, TILE):
            count = min(TILE, columns - start)
            load(base_source, r * columns + start, count, tile)
            base[start : start + count] = tile[:count]
            load(source, r * columns + start, count, tile)
            theta[start : start + count] = tile[:count]
        out[r] = _divergence(base, theta)


def divergences(base: Rows, theta: Rows, rows: int) -> F64:
    """``methods.edits.divergence`` of each row of a block: float64 (R,)."""
    found = np.empty(rows)
    _divergences(source_of(base)[()], source_of(theta)[()], rows, base.size // rows, found)
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
def _importances(base_source: Any, source: Any, columns: int, n: int, divergence: Any, out: Any) -> None:
    base, theta = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for r in range(divergence.shape[0]):
        for start in range(0, columns, TILE):
            first = r * columns + start
            count = min(TILE, columns - start)
            load(base_source, first, count, base)
            load(source, first, count, theta)
            for i in range(count):
                out[first + i] = np.float32(abs(np.float64(theta[i]) - np.float64(base[i])) * divergence[r])


def importances(base: Rows, theta: Rows, divergence: F64) -> NDArray[np.float32]:
    """``methods.edits.importance`` of a block: float32 (n,). divergence: of each of its R rows, float64 (R,)."""
    found = np.empty(base.size, np.float32)
    _importances(source_of(base)[()], source_of(theta)[()], base.size // divergence.size, base.size, divergence, found)
    return found


@compiled
def _fuse(
    base_source: Any, source: Any, columns: int, divergence: Any, threshold: float, lam: float, kind: int, address: int
) -> None:  # fmt: skip
    base, theta, out = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE)
    for r in range(divergence.shape[0]):
        for start in range(0, columns, TILE):
            first = r * columns + start
            count = min(TILE, columns - start)
            load(base_source, first, count, base)
            load(source, first, count, theta)
            for i in range(count):
                delta = np.float64(theta[i]) - np.float64(base[i])
                kept = np.float64(np.float32(abs(delta) * divergence[r])) >= threshold
                out[i] = np.float64(base[i]) + lam * (delta if kept else 0.0)
            store(out, count, kind, address, first, theta)


def fuse_block(base: Rows, theta: Rows, out: Rows, *, divergence: F64, threshold: float, lam: float) -> None:
    """``methods.edits.fuse`` of a block, rounded into ``out``. divergence: of each of its R rows, float64 (R,)."""
    _fuse(
        source_of(base)[()], source_of(theta)[()], base.size // divergence.size, divergence, threshold, lam, WRITTEN[out.dtype], out.address
    )  # fmt: skip
