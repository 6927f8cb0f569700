"""Products between task vectors, row by row or column by column, and their sums with factors of each row or column, in compiled passes.

The models are seen as K sources of rows of C columns; with a base, what is multiplied and added up is their difference to it. No bit
depends on how the rows are cut into blocks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.exact import pair_count
from ota_core.compute.loops import compiled
from ota_core.compute.subspace import dot
from ota_core.files.rows import Rows
from ota_core.fused.memory import clear_absent, load, load_base, start_of, store, tile_of
from ota_core.fused.sources import SOURCE, TILE, WRITTEN, source_of

F64 = NDArray[np.float64]


@compiled
def _load_row(
    base_source: Any, base: Any, edits: bool, source: Any, first: int, count: int, theta: Any, has: Any, out: Any
) -> None:
    """Elements first … of one model, less the base where ``edits``, into ``out``."""
    for start in range(0, count, TILE):
        size = min(TILE, count - start)
        load(source, first + start, size, theta)
        if edits:
            load_base(base_source, first + start, size, base)
            for j in range(size):
                out[start + j] = np.float64(theta[j]) - np.float64(base[j])
            clear_absent(source, first + start, size, has, out[start : start + size])
        else:
            for j in range(size):
                out[start + j] = np.float64(theta[j])


@compiled
def _row_products(base_source: Any, base: Any, edits: bool, sources: Any, rows: int, columns: int, out: Any) -> None:
    theta, has = np.empty(TILE, np.float32), np.empty(TILE, np.bool_)
    vectors = np.empty((sources.shape[0], columns))
    for i in range(rows):
        for k in range(sources.shape[0]):
            _load_row(base_source, base, edits, sources[k], i * columns, columns, theta, has, vectors[k])
        pair = 0
        for a in range(sources.shape[0]):
            for b in range(a, sources.shape[0]):
                out[i, pair] = dot(vectors[a], vectors[b])
                pair += 1


@compiled
def _column_products(
    base_source: Any, base: Any, edits: bool, sources: Any, rows: int, columns: int, first: int, sums: Any
) -> None:
    theta, has = np.empty(TILE, np.float32), np.empty(TILE, np.bool_)
    a, b = np.empty(columns), np.empty(columns)
    for i in range(rows):
        _load_row(base_source, base, edits, sources[0], i * columns, columns, theta, has, a)
        _load_row(base_source, base, edits, sources[1], i * columns, columns, theta, has, b)
        at = ((first + i) * columns) % sums.shape[0]
        for j in range(columns):
            sums[at + j, 0] += a[j] * a[j]
            sums[at + j, 1] += a[j] * b[j]
            sums[at + j, 2] += b[j] * b[j]


@compiled
def _add_up(
    base_source: Any, base: Any, edits: bool, sources: Any, rows: int, columns: int, first: int, by_row: bool, factors: Any, lam: float, kind: int,
    address: int,
) -> None:  # fmt: skip
    theta, total, vector, has = np.empty(TILE, np.float32), np.empty(TILE), np.empty(TILE), np.empty(TILE, np.bool_)
    for i in range(rows):
        at = first + i if by_row else ((first + i) * columns) % factors.shape[1]
        for start in range(0, columns, TILE):
            size, place = min(TILE, columns - start), i * columns + start
            total[:] = 0.0
            for k in range(sources.shape[0]):
                _load_row(base_source, base, edits, sources[k], place, size, theta, has, vector)
                for j in range(size):
                    factor = factors[k, at] if by_row else factors[k, at + start + j]
                    total[j] += factor * vector[j]
            if edits:
                for j in range(size):
                    total[j] = np.float64(base[j]) + lam * total[j]
            store(total, size, kind, address, place, theta)


def _table(thetas: Sequence[Rows]) -> NDArray[Any]:
    return np.array([source_of(theta)[()] for theta in thetas], SOURCE)


def row_products(base: Rows | None, thetas: Sequence[Rows], rows: int) -> F64:
    """⟨x_a, x_b⟩ of every row: float64 (R, pairs), the pairs (0, 0), (0, 1), …, (1, 1), … of ``exact.pair_index``.

    base, thetas: R·C elements as stored, contiguous; x is a model's row, less the base's where there is one.
    """
    found, table, start = np.empty((rows, pair_count(len(thetas)))), _table(thetas), start_of(base, thetas)
    source = table[0] if start is None else source_of(start)[()]
    _row_products(source, tile_of(start), base is not None, table, rows, thetas[0].size // rows, found)
    return found


def add_column_products(base: Rows | None, pair: Sequence[Rows], first: int, sums: F64) -> None:
    """Add ⟨a, a⟩, ⟨a, b⟩, ⟨b, b⟩ of rows from ``first`` on to ``sums``, float64 (D, 3): of each place along a tensor's first axis, D = C for a matrix.

    base, pair: (r, C) as stored. Rows must come in their order: each place has one sum.
    """
    rows, columns = pair[0].held.shape
    table, start = _table(pair), start_of(base, pair)
    source = table[0] if start is None else source_of(start)[()]
    _column_products(source, tile_of(start), base is not None, table, rows, columns, first, sums)


def add_up_block(
    base: Rows | None, thetas: Sequence[Rows], out: Rows, factors: F64, *, first: int, by_row: bool, lam: float
) -> None:  # fmt: skip
    """θ₀ + λ·Σ f·(θ − θ₀), or without a base Σ f·θ, rounded into ``out``: float32, bfloat16 or float64, (r, C), contiguous.

    factors: float64 (M, rows of the tensor) with ``by_row``, else (M, D), one for each place along the tensor's first axis. first: the block's first row.
    """
    rows, columns = out.held.shape
    table, start = _table(thetas), start_of(base, thetas)
    source = table[0] if start is None else source_of(start)[()]
    _add_up(
        source, tile_of(start), base is not None, table, rows, columns, first, by_row, factors, lam, WRITTEN[out.dtype], out.address
    )  # fmt: skip


@compiled
def _products_of(vectors: Any, out: Any) -> None:
    for i in range(vectors.shape[1]):
        pair = 0
        for a in range(vectors.shape[0]):
            for b in range(a, vectors.shape[0]):
                out[i, pair] = dot(vectors[a, i], vectors[b, i])
                pair += 1


def products_of(vectors: F64) -> F64:
    """``row_products`` of vectors in memory, float64 (K, R, C), contiguous: the same bits."""
    found = np.empty((vectors.shape[1], pair_count(vectors.shape[0])))
    _products_of(vectors, found)
    return found
