"""The passes of ``rank_k`` over v, and its decoder, as compiled loops. Legend: n rows of a chunk, C columns, m sketch rows, k rank."""

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled, row_sum
from ota_core.compute.subspace import add_scaled, dot, mix

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_LARGEST = np.float32(np.finfo(np.float32).max)


@compiled
def sketch_rows(v: F32, first: int, exact: bool, sketch: F64, weighted: F64, rows: F64) -> None:
    """Pass 1 over rows ``first``… of v (n, C): sketch (m, C) and w (C,) are added to; row sums go to rows (n,)."""
    roots, lanes = np.empty(v.shape[1], np.float64), np.empty(16, np.float64)
    for i in range(v.shape[0]):
        rows[i] = row_sum(v[i], lanes)
        for j in range(v.shape[1]):
            roots[j] = np.sqrt(np.float64(v[i, j]))
        add_scaled(weighted, np.sqrt(rows[i]), roots)
        if exact:
            add_scaled(sketch[first + i], 1.0, roots)
        else:
            number = mix(first + i, 0)
            row = np.int64((number >> np.uint64(1)) % np.uint64(sketch.shape[0]))
            add_scaled(sketch[row], 1.0 if number & np.uint64(1) else -1.0, roots)


@compiled
def project_rows(v: F32, directions: F64, out: F64) -> None:
    """Pass 2: out (n, l) = √v (n, C) · directions (l, C)ᵀ."""
    roots = np.empty(v.shape[1], np.float64)
    for i in range(v.shape[0]):
        for j in range(v.shape[1]):
            roots[j] = np.sqrt(np.float64(v[i, j]))
        for p in range(directions.shape[0]):
            out[i, p] = dot(roots, directions[p])


@compiled
def _root_row(left: F32, right: F32, out: F32) -> None:
    """|√ṽ| of a row but for its sign: out (C,) = left (k,) · right (k, C), float32, term after term."""
    for j in range(out.shape[0]):
        out[j] = left[0] * right[0, j]
    for p in range(1, left.shape[0]):
        for j in range(out.shape[0]):
            out[j] += left[p] * right[p, j]


@compiled
def decode_rows(left: F32, right: F32, first: int, height: int, out: F32) -> None:
    """ṽ of rows first… of a stack of matrices of ``height`` rows. left: (n, k); right: (S, k, C); out: (n, C), finite and ≥ 0."""
    for i in range(out.shape[0]):
        _root_row(left[i], right[(first + i) // height], out[i])
        for j in range(out.shape[1]):
            square = out[i, j] * out[i, j]
            out[i, j] = square if square <= _LARGEST else _LARGEST


@compiled
def squared_error(v: F32, left: F32, right: F32) -> float:
    """Pass 3: Σ(√v − √ṽ)² of rows of one matrix. v: (n, C); left: (n, k); right: (k, C)."""
    approximate, differences = np.empty(v.shape[1], np.float32), np.empty(v.shape[1], np.float32)
    lanes = np.empty(16, np.float64)
    total = 0.0
    for i in range(v.shape[0]):
        _root_row(left[i], right, approximate)
        for j in range(v.shape[1]):
            differences[j] = np.sqrt(v[i, j]) - abs(approximate[j])
        total += _squared_sum(differences, lanes)
    return total


@compiled
def _squared_sum(row: F32, lanes: F64) -> float:
    whole = row.shape[0] - row.shape[0] % 16
    lanes[:] = 0.0
    for j in range(0, whole, 16):
        for lane in range(16):
            lanes[lane] += np.float64(row[j + lane]) * np.float64(row[j + lane])
    total = 0.0
    for lane in range(16):
        total += lanes[lane]
    for j in range(whole, row.shape[0]):
        total += np.float64(row[j]) * np.float64(row[j])
    return total
