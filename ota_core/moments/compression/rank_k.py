"""Second moments as the square of a matrix of low rank: √v ≈ L·M with L (R, k) and M (k, C), ṽ_ij = (Σ_p L_ip M_pj)² ≥ 0.

Legend: R rows, C columns, s = Σ v, A = √v (R, C), k the rank, m rows of the sketch, l = k + 4 directions.

√v is what weighs and ranks in a merge, and its error is what a report states; the best approximation of rank k of A in that norm is
its truncated singular value decomposition (Eckart & Young 1936). It is found in three passes over v:
1. sketch: the rows of A are added with random signs to m random rows (Clarkson & Woodruff 2013, arXiv 1207.6365), and
   w = Aᵀ√r is summed, with r the row sums of v. l leading directions P of the sketch, w among them, come from subspace iteration;
2. project: Y = A·Pᵀ; the k leading eigenvectors E of YᵀY give L = Y·E, M = Eᵀ·P: the best of rank k within the span of P;
3. the error, measured.
With k = 1 it never loses more than ``rank1``: A's best approximation with the column space √r has the error s − ‖w‖² / s, rank1's
is no smaller, and the span of P holds w, along which A keeps at least ‖w‖² / s. Rows and columns of zeros stay zeros.
Where factors would take no less than the tensor itself (vectors, small matrices), the tensor is stored whole.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape, row_blocks
from ota_core.compute.stream import Stream
from ota_core.moments.base import Moments
from ota_core.moments.compression.base import DEFAULT_RANK, CompressionReport, FactoredMoments
from ota_core.moments.compression.cuts import CHUNK, InOrder, matrices, refuse
from ota_core.moments.compression.header import Header
from ota_core.moments.compression.rank1 import COL, ROW, keep_whole

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Chunk = tuple[int, int, int]
Result = TypeVar("Result")

# Directions beyond the rank, rows of the sketch at most and at least, elements of it at most, and rounds of subspace iteration.
_EXTRA, _SKETCH_ROWS, _FEW_ROWS, _SKETCH, _ROUNDS = 3, 256, 32, 1 << 21, 4


def stored_whole(shape: tuple[int, ...], rank: int) -> bool:
    """Whether factors of this rank would take no less than the tensor itself."""
    return len(shape) < 2 or rank * (shape[-2] + shape[-1]) >= shape[-2] * shape[-1]


class RankKMoments(FactoredMoments):
    """Second moments of rank k, from a file or straight from ``compress``: the same numbers either way.

    Stored are N where a tensor is whole, else N#row (…, R, k) and N#col (…, k, C).
    """

    @staticmethod
    def keys(name: str, shape: tuple[int, ...], rank: int | None) -> dict[str, tuple[int, ...]]:
        rank = rank or DEFAULT_RANK
        if stored_whole(shape, rank):
            return {name: shape}
        return {name + ROW: (*shape[:-1], rank), name + COL: (*shape[:-2], rank, shape[-1])}

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> F32:
        """Rows start:stop of ṽ, float32 (stop − start, C). Squares are ≥ 0 and kept finite, so that ``check`` changes nothing."""
        shape = self.header.shapes[name]
        if name in self._stored:
            return self._stored[name].reshape(matrix_shape(shape))[start:stop]
        from ota_core.moments.compression.rank_k_loops import decode_rows

        left, right = self._stored[name + ROW], self._stored[name + COL]
        out = np.empty((stop - start, shape[-1]), np.float32)
        rows = left.reshape(-1, left.shape[-1])[start:stop]
        decode_rows(rows, right.reshape(-1, *right.shape[-2:]), start, shape[-2], out)
        return out


def compress_rank_k(moments: Moments, *, rank: int, stream: Stream, what: str) -> tuple[RankKMoments, CompressionReport]:
    """Compression of one expert's second moments to rank ``rank`` ≥ 1. Raises MomentsError on bad values."""
    header = Header.of(moments, "rank_k", rank)
    shapes = header.shapes
    stored: dict[str, F32] = {}
    errors: dict[str, tuple[float, float]] = {}
    for name, shape in shapes.items():
        if stored_whole(shape, rank):
            stored[name], errors[name] = keep_whole(moments, name)
        else:
            stored |= {key: np.empty(form, np.float32) for key, form in RankKMoments.keys(name, shape, rank).items()}
    factored = [(name, matrix) for name in sorted(shapes) if name not in stored for matrix in range(matrices(shapes[name])[0])]
    lost: dict[tuple[str, int], tuple[float, float]] = {}

    def factor(item: tuple[str, int], run: "_Run") -> None:
        name, matrix = item
        _, height, width = matrices(shapes[name])
        left, right, *sums = _factor(_Matrix(moments, stream, name, matrix * height, height, width), rank, run)
        stored[name + ROW].reshape(-1, height, rank)[matrix] = left
        stored[name + COL].reshape(-1, rank, width)[matrix] = right
        lost[item] = (sums[0], sums[1])

    def elements(item: tuple[str, int]) -> int:
        return shapes[item[0]][-2] * shapes[item[0]][-1]

    # A matrix of one chunk is one thread's work; the chunks of a larger one are spread over all threads.
    small = [item for item in factored if elements(item) <= CHUNK]
    stream.map(lambda item: factor(item, _run_here), small, what=what, size=elements)
    for item in factored:
        if elements(item) > CHUNK:
            factor(item, partial(stream.map, what=f"{what}: {item[0]}"))
    for name in shapes.keys() - errors.keys():
        mine = [lost[name, matrix] for matrix in range(matrices(shapes[name])[0])]
        errors[name] = (math.fsum(sums[0] for sums in mine), math.fsum(sums[1] for sums in mine))
    compressed = RankKMoments(moments.path, header, stored)
    return compressed, CompressionReport.of(compressed, compressed.size, errors)


class _Run(Protocol):
    """Does the work of every chunk, here or spread over threads; results in the order of the chunks."""

    def __call__(self, work: Callable[[Chunk], Result], items: Iterable[Chunk], /) -> list[Result]: ...


def _run_here(work: Callable[[Chunk], Result], items: Iterable[Chunk], /) -> list[Result]:
    return [work(item) for item in items]


class _Matrix:
    """One matrix of v, read in chunks of rows."""

    def __init__(self, moments: Moments, stream: Stream, name: str, start: int, height: int, width: int) -> None:
        self._moments, self._count, self._name, self._start = moments, stream.count_read, name, start
        self.height, self.width = height, width
        self.chunks = [(i, a, b) for i, (a, b) in enumerate(row_blocks((height, width), CHUNK))]

    def read(self, a: int, b: int) -> F32:
        """Rows a:b, float32, not checked."""
        values: F32 = self._moments.read(self._name, self._start + a, self._start + b, check=False)
        self._count(values.nbytes)
        return values

    def refuse(self, a: int, b: int) -> None:
        """Raise MomentsError for the bad entry in these rows."""
        refuse(self._moments, self._name, self._start + a, self._start + b)


def _factor(matrix: _Matrix, rank: int, run: _Run) -> tuple[F32, F32, float, float]:
    """L (R, k), M (k, C), Σ(√v − √ṽ)² and Σv of one matrix."""
    from ota_core.compute.subspace import combinations, eigenvectors, leading_directions
    from ota_core.moments.compression.rank_k_loops import project_rows, sketch_rows, squared_error

    height, width = matrix.height, matrix.width
    count = max(rank + _EXTRA, min(_SKETCH_ROWS, max(_FEW_ROWS, _SKETCH // width)))
    exact = height <= count
    rows, sketch, weighted = np.empty(height), np.zeros((min(height, count), width)), np.zeros(width)

    def add(part: F64, w: F64) -> None:
        np.add(sketch, part, out=sketch)
        np.add(weighted, w, out=weighted)

    order = InOrder(add)

    def look(chunk: tuple[int, int, int]) -> None:
        index, a, b = chunk
        part, w = np.zeros_like(sketch), np.zeros(width)
        sketch_rows(matrix.read(a, b), a, exact, part, w, rows[a:b])
        # As in rank1: the root of a negative number is NaN and spreads to w, a NaN or an infinite entry to the row sums.
        if not (np.isfinite(w).all() and np.isfinite(rows[a:b]).all()):
            matrix.refuse(a, b)
        order.put(index, part, w)

    run(look, matrix.chunks)
    directions = leading_directions(sketch, weighted, min(rank + _EXTRA, *sketch.shape), _ROUNDS)
    projected = np.empty((height, len(directions)))
    run(lambda chunk: project_rows(matrix.read(*chunk[1:]), directions, projected[chunk[1] : chunk[2]]), matrix.chunks)
    gram = np.empty((len(directions), len(directions)))
    combinations(projected, projected, gram)
    _, vectors = eigenvectors(gram)
    left, right = np.empty((height, rank), np.float32), np.empty((rank, width), np.float32)
    leading = np.empty((rank, width))
    combinations(np.ascontiguousarray(vectors[:rank].T), directions, leading)
    right[:] = leading
    rotated = np.empty((rank, height))
    combinations(np.ascontiguousarray(vectors[:rank].T), np.ascontiguousarray(projected.T), rotated)
    left[:] = rotated.T
    lost = run(lambda chunk: squared_error(matrix.read(*chunk[1:]), left[chunk[1] : chunk[2]], right), matrix.chunks)
    return left, right, math.fsum(lost), math.fsum(rows.tolist())
