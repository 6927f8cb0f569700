"""DELLA's random masks in a compiled pass, row by row: what ``methods.della`` computes, with the same bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled
from ota_core.files.rows import Rows
from ota_core.fused.memory import clear_absent, load, load_base, start_of, store, tile_of
from ota_core.fused.sources import SOURCE, TILE, WRITTEN, source_of
from ota_core.fused.task_vectors import add, add_agreeing, finish, uniform
from ota_core.methods.numbers import key_of

_RADIX = 11
"""Bits that one pass of the sort looks at; three passes order a float32 ≥ 0."""

DELLA = np.dtype(
    [
        ("theta", SOURCE),
        ("weight", np.float64),
        ("key", np.uint64),
        ("start", np.int64),
        ("density", np.float64),
        ("epsilon", np.float64),
    ]
)


@dataclass(frozen=True, kw_only=True)
class DellaPart:
    """One expert's part in a block of whole rows."""

    theta: Rows
    """The weights as they are stored, R·C elements."""
    weight: float
    random: tuple[int, int, str, int]
    """Seed, expert, tensor and the block's first element."""
    density: float
    """1: everything is kept."""
    epsilon: float


@compiled
def _rank(bits: Any, order: Any, other: Any, counts: Any, ranks: Any) -> None:
    """The rank of each pattern of a row by rising size, equal ones in their order: a radix sort, in time linear in the row's length."""
    size = bits.shape[0]
    for i in range(size):
        order[i] = i
    for shift in (0, 11, 22):
        counts[:] = 0
        for i in range(size):
            counts[(bits[i] >> np.uint32(shift)) & np.uint32(2047)] += 1
        total = 0
        for digit in range(counts.shape[0]):
            here = counts[digit]
            counts[digit] = total
            total += here
        for i in range(size):
            digit = (bits[order[i]] >> np.uint32(shift)) & np.uint32(2047)
            other[counts[digit]] = order[i]
            counts[digit] += 1
        for i in range(size):
            order[i] = other[i]
    for i in range(size):
        ranks[order[i]] = i


@compiled
def _sizes(base_source: Any, base: Any, source: Any, first: int, count: int, theta: Any, has: Any, sizes: Any) -> None:
    """|Δ| of elements first …, float32."""
    for start in range(0, count, TILE):
        size = min(TILE, count - start)
        load_base(base_source, first + start, size, base)
        load(source, first + start, size, theta)
        for i in range(size):
            sizes[start + i] = abs(np.float32(np.float64(theta[i]) - np.float64(base[i])))
        clear_absent(source, first + start, size, has, sizes[start : start + size])


@compiled
def _ranks(base_source: Any, base: Any, source: Any, columns: int, out: Any) -> None:
    theta, has, sizes = np.empty(TILE, np.float32), np.empty(TILE, np.bool_), np.empty(columns, np.float32)
    order, other, counts = np.empty(columns, np.int32), np.empty(columns, np.int32), np.empty(1 << _RADIX, np.int32)
    _sizes(base_source, base, source, 0, columns, theta, has, sizes)
    _rank(sizes.view(np.uint32), order, other, counts, out)


def ranks_of_row(base: Rows, theta: Rows) -> NDArray[np.int32]:
    """The rank of each |Δ| among n elements that are one row, by rising size: int32 (n,)."""
    found = np.empty(base.size, np.int32)
    start = start_of(base, [theta])
    assert start is not None
    _ranks(source_of(start)[()], tile_of(start), source_of(theta)[()], base.size, found)
    return found


@compiled
def _left(part: Any, base: Any, theta: Any, ranks: Any, columns: int, first: int, count: int, rescale: bool, left: Any) -> None:
    """What is left of one expert's edits in a tile. ranks: of the tile's elements in their row."""
    step = 2.0 * part.epsilon / (columns - 1) if columns > 1 else 0.0
    lowest = part.density - part.epsilon if columns > 1 else part.density
    for i in range(count):
        delta = np.float64(theta[i]) - np.float64(base[i])
        chance = lowest + np.float64(ranks[i]) * step
        kept = delta if uniform(part.key, part.start + first + i) < chance else 0.0
        left[i] = kept / chance if rescale else kept


@compiled
def _merge(
    base_source: Any, parts: Any, ranks: Any, offset: int, columns: int, first: int, size: int, elect: bool, normalize: bool, rescale: bool,
    sum_of_weights: float, lam: float, least: float, kind: int, address: int, base: Any, theta: Any, has: Any, tiles: Any,
) -> None:  # fmt: skip
    """Merge ``size`` elements of a block from ``first`` on, all of one row of ``columns``; their ranks begin at ``offset``."""
    models, total, divisor, elected = parts.shape[0], tiles[0], tiles[1], tiles[2]
    for start in range(0, size, TILE):
        count, place, at = min(TILE, size - start), first + start, offset + start
        load_base(base_source, place, count, base)
        total[:] = 0.0
        for m in range(models):
            left = tiles[3 + m]
            load(parts[m].theta, place, count, theta)
            if parts[m].density < 1.0:
                _left(parts[m], base, theta, ranks[m, at : at + count], columns, place, count, rescale, left)
            else:
                for i in range(count):
                    left[i] = np.float64(theta[i]) - np.float64(base[i])
            clear_absent(parts[m].theta, place, count, has, left)
            add(count, left, parts[m].weight, total)
        divisor[:] = sum_of_weights if normalize else 1.0
        if elect:
            elected[:] = total
            total[:] = 0.0
            divisor[:] = 0.0
            for m in range(models):
                add_agreeing(count, tiles[3 + m], parts[m].weight, elected, total, divisor)
            if not normalize:
                divisor[:] = 1.0
        finish(count, base, total, divisor, least, lam, total)
        store(total, count, kind, address, place, theta)


@compiled
def _della(
    base_source: Any, base: Any, parts: Any, rows: int, columns: int, given: Any, start: int, elect: bool, normalize: bool, rescale: bool,
    sum_of_weights: float, lam: float, least: float, kind: int, address: int,
) -> None:  # fmt: skip
    models, theta, has = parts.shape[0], np.empty(TILE, np.float32), np.empty(TILE, np.bool_)
    tiles = np.empty((3 + models, TILE))
    if given.shape[1] > 0:
        _merge(
            base_source, parts, given, start, given.shape[1], 0, rows * columns, elect, normalize, rescale, sum_of_weights, lam, least, kind,
            address, base, theta, has, tiles,
        )  # fmt: skip
        return
    ranks, counts = np.empty((models, columns), np.int32), np.empty(1 << _RADIX, np.int32)
    sizes, order, other = np.empty(columns, np.float32), np.empty(columns, np.int32), np.empty(columns, np.int32)
    for r in range(rows):
        for m in range(models):
            if parts[m].density < 1.0:
                _sizes(base_source, base, parts[m].theta, r * columns, columns, theta, has, sizes)
                _rank(sizes.view(np.uint32), order, other, counts, ranks[m])
        _merge(
            base_source, parts, ranks, 0, columns, r * columns, columns, elect, normalize, rescale, sum_of_weights, lam, least, kind, address,
            base, theta, has, tiles,
        )  # fmt: skip


def della_block(
    base: Rows, parts: Sequence[DellaPart], out: Rows, *, columns: int, ranks: NDArray[np.int32] | None, elect: bool, normalize: bool,
    rescale: bool, lam: float, nothing: float,
) -> None:  # fmt: skip
    """θ₀ + λ · what ``add_up`` or, with ``elect``, ``elect_and_add`` makes of the edits that are kept, rounded into ``out``.

    base: R rows of ``columns`` elements as stored. ranks: where the block is a part of a vector, those of all its elements, int32 (M, n), in place of
    rows. nothing: a divisor smaller than this divides by 1.
    """
    table = np.zeros(len(parts), DELLA)
    for row, part in zip(table, parts, strict=True):
        row["theta"], row["weight"] = source_of(part.theta), part.weight
        row["key"], row["start"] = key_of(*part.random[:3]), part.random[3]
        row["density"], row["epsilon"] = part.density, part.epsilon
    weights = sum(part.weight for part in parts)
    given = np.empty((len(parts), 0), np.int32) if ranks is None else ranks
    start = start_of(base, [part.theta for part in parts])
    assert start is not None
    _della(
        source_of(start)[()], tile_of(start), table, base.size // columns, columns, given, parts[0].random[3], elect, normalize, rescale, weights, lam, nothing,
        WRITTEN[out.dtype], out.address,
    )  # fmt: skip
