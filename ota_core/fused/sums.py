"""Sums over the rows of a block in one compiled pass: of squares, products and powers, each in the order of ``loops.row_sum``.

A sum of a row is the same for every cut into blocks; who adds up rows does so exactly (``math.fsum``).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled, power, row_sum
from ota_core.files.rows import Rows
from ota_core.fused.memory import clear_absent, load, load_base, tile_of
from ota_core.fused.ota import load_v_hat
from ota_core.fused.sources import TILE, VSource, source_of
from ota_core.fused.task_vectors import load_ends


@compiled
def _squares(base_source: Any, theta_source: Any, kept: Any, columns: int, whole: Any, left: Any) -> None:
    base, theta, has, lanes = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.bool_), np.empty(16)
    squares = np.empty(columns)
    for i in range(whole.shape[0]):
        for start in range(0, columns, TILE):
            first, count = i * columns + start, min(TILE, columns - start)
            load(base_source, first, count, base)
            load(theta_source, first, count, theta)
            part = squares[start : start + count]
            for j in range(count):
                delta = np.float64(theta[j]) - np.float64(base[j])
                part[j] = delta * delta
            clear_absent(base_source, first, count, has, part)
            clear_absent(theta_source, first, count, has, part)
        whole[i] = row_sum(squares, lanes)
        for j in range(columns):
            squares[j] = squares[j] if kept[i * columns + j] else 0.0
        left[i] = row_sum(squares, lanes)


def squares_of(base: Rows, theta: Rows, kept: NDArray[np.bool_]) -> tuple[list[float], list[float]]:
    """Σ Δ² and Σ mask·Δ² of each row of a task vector, 0 in rows that a model lacks. base, theta: (r, C) as stored; kept: bool, r·C elements."""
    rows, columns = base.held.shape
    whole, left = np.empty(rows), np.empty(rows)
    _squares(source_of(base)[()], source_of(theta)[()], kept.reshape(-1), columns, whole, left)
    return whole.tolist(), left.tolist()


@compiled
def _magnitudes(
    base_source: Any, theta_source: Any, lowest: np.float32, highest: np.float32, columns: int, base: Any, whole: Any, left: Any
) -> None:  # fmt: skip
    theta, has, lanes = np.empty(TILE, np.float32), np.empty(TILE, np.bool_), np.empty(16)
    every, kept = np.empty(columns), np.empty(columns)
    for i in range(whole.shape[0]):
        for start in range(0, columns, TILE):
            first, count = i * columns + start, min(TILE, columns - start)
            load_base(base_source, first, count, base)
            load(theta_source, first, count, theta)
            part = every[start : start + count]
            for j in range(count):
                part[j] = abs(np.float64(theta[j]) - np.float64(base[j]))
            clear_absent(theta_source, first, count, has, part)
            for j in range(count):
                size = np.float32(part[j])
                kept[start + j] = part[j] if (size >= lowest) & (size <= highest) else 0.0
        whole[i] = row_sum(every, lanes)
        left[i] = row_sum(kept, lanes)


def magnitudes_of(base: Rows, theta: Rows, lowest: float, highest: float) -> tuple[list[float], list[float]]:
    """Σ |Δ| of each row of a task vector, and of what of it lies within the limits; 0 in rows that the expert lacks. base, theta: (r, C)."""
    rows, columns = base.held.shape
    whole, left = np.empty(rows), np.empty(rows)
    limits = np.float32(lowest), np.float32(highest)
    _magnitudes(source_of(base)[()], source_of(theta)[()], *limits, columns, tile_of(base), whole, left)
    return whole.tolist(), left.tolist()


@compiled
def _powers(source: Any, factor: np.float32, columns: int, exponent: float, found: Any) -> bool:
    v_hat, lanes = np.empty(TILE, np.float32), np.empty(16)
    values, powers = np.empty(columns), np.empty(columns)
    for i in range(found.shape[0]):
        for start in range(0, columns, TILE):
            count = min(TILE, columns - start)
            if load_v_hat(source, factor, i * columns + start, count, v_hat):
                return True
            for j in range(count):
                values[start + j] = np.float64(v_hat[j])
        if exponent == 0.5:
            for j in range(columns):
                powers[j] = np.sqrt(values[j])
        elif exponent == 1.0:
            powers[:] = values
        elif exponent == 0.0:
            powers[:] = 1.0
        else:
            power(values, exponent, powers)
        found[i] = row_sum(powers, lanes)
    return False


def power_sums(v: VSource, rows: int, columns: int, exponent: float) -> list[float] | None:
    """Σ v̂^power of each of r rows. None for a bad v."""
    found = np.empty(rows)
    bad = _powers(v.source[()], np.float32(v.factor), columns, exponent, found)
    return None if bad else found.tolist()


@compiled
def _products(first_source: Any, second_source: Any, columns: int, found: Any) -> None:
    a, b, has, lanes = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.bool_), np.empty(16)
    products = np.empty((3, columns))
    for i in range(found.shape[1]):
        for start in range(0, columns, TILE):
            count = min(TILE, columns - start)
            load_ends(first_source, second_source, i * columns + start, count, a, b, has)
            for j in range(count):
                x, y = np.float64(a[j]), np.float64(b[j])
                products[0, start + j], products[1, start + j], products[2, start + j] = x * x, y * y, x * y
        for k in range(3):
            found[k, i] = row_sum(products[k], lanes)


def products_of(ends: tuple[Rows, Rows]) -> NDArray[np.float64]:
    """Σ a², Σ b² and Σ a·b of each row of two models, float64 (3, r). ends: (r, C) as stored; a row that one lacks is the other's."""
    found = np.empty((3, ends[0].held.shape[0]))
    first, second = (source_of(end)[()] for end in ends)
    _products(first, second, ends[0].held.shape[1], found)
    return found
