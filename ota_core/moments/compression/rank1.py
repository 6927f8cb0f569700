"""Rank-1 second moments: a matrix v is kept as its row sums r and column sums c, ṽ_ij = (r_i / s) · c_j with s = Σ v.

AdaFactor: Shazeer & Stern 2018, arXiv 1804.04235, algorithm 1; used for merging in arXiv 2509.11167, section 4.

One pass over v. While a row is in the processor's cache, three sums grow: r_i, c_j, and w_j = Σ_i √r_i · √v_ij, which gives the error
without a second look: Σ(√v − √ṽ)² = Σv − 2 Σ√v·√ṽ + Σṽ = 2s − 2 Σ_j √(c_j / s) · w_j. The difference cancels, so that a relative
error below about 1e-7 cannot be told from 0; it is never negative and never NaN.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape, row_blocks
from ota_core.compute.stream import Stream
from ota_core.errors import MomentsError
from ota_core.moments.base import Moments
from ota_core.moments.compression.base import CompressionReport, FactoredMoments
from ota_core.moments.compression.cuts import CHUNK, InOrder, matrices, refuse
from ota_core.moments.compression.header import Header

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
ROW, COL = "#row", "#col"


class RankOneMoments(FactoredMoments):
    """Rank-1 second moments, from a file or straight from ``compress``: the same numbers either way."""

    def __init__(self, path: Path, header: Header, stored: Mapping[str, F32]) -> None:
        """``stored``: N for a vector; N#row (…, R) and N#col (…, C) for matrices; float32."""
        super().__init__(path, header, stored)
        self._share = {name: _share(stored[name + ROW]) for name in header.shapes if name + ROW in stored}

    @staticmethod
    def keys(name: str, shape: tuple[int, ...], rank: int | None = None) -> dict[str, tuple[int, ...]]:
        return {name: shape} if len(shape) < 2 else {name + ROW: shape[:-1], name + COL: (*shape[:-2], shape[-1])}

    def factors(self, name: str) -> tuple[F32, F32] | None:
        """r / s, float32 (…, R), and c, float32 (…, C), of a tensor that is factored; None for one that is stored whole."""
        return (self._share[name], self._stored[name + COL]) if name in self._share else None

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> F32:
        """Rows start:stop of ṽ, float32 (stop − start, C). The factors were checked once, so that ``check`` changes nothing."""
        if name not in self._share:
            return self._stored[name].reshape(matrix_shape(self.header.shapes[name]))[start:stop]
        share, cols = self._share[name], self._stored[name + COL]
        if cols.ndim == 1:
            return share[start:stop, None] * cols
        # Stacks of matrices: each row belongs to the column sums of its own matrix.
        height = self.header.shapes[name][-2]
        flat = cols.reshape(-1, cols.shape[-1])
        return share.reshape(-1)[start:stop, None] * flat[np.arange(start, stop) // height]


def _share(rows: F32) -> F32:
    """r / s for each matrix; zeros where the whole matrix is zero. Divided first: r·c underflows. rows: float32 (…, R)."""
    flat = rows.astype(np.float64).reshape(-1, rows.shape[-1])
    sums = np.array([math.fsum(matrix.tolist()) for matrix in flat])[:, None]
    return np.where(sums > 0, flat / np.maximum(sums, np.finfo(np.float64).tiny), 0.0).astype(np.float32).reshape(rows.shape)


class _TensorSums:
    """r, c and w of one tensor, as its parts bring them. float64: (S·R,), (S, C), (S, C)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        stacks, height, width = matrices(shape)
        self.rows = np.zeros(stacks * height)
        self.cols, self.weighted = np.zeros((stacks, width)), np.zeros((stacks, width))
        self.order = [InOrder(self._add) for _ in range(stacks)]

    def _add(self, matrix: int, cols: F64, weighted: F64) -> None:
        self.cols[matrix] += cols
        self.weighted[matrix] += weighted

    def error(self) -> tuple[float, float]:
        """Σ(√v − √ṽ)² and Σv."""
        lost, totals = [], []
        for c, w, rows in zip(self.cols, self.weighted, self.rows.reshape(len(self.cols), -1), strict=True):
            total = math.fsum(rows.tolist())
            totals.append(total)
            if total > 0:
                lost.append(max(0.0, 2 * (total - math.fsum((np.sqrt(c / total) * w).tolist()))))
        return math.fsum(lost), math.fsum(totals)


@dataclass(frozen=True)
class _Part:
    """Rows start:stop of a tensor: several whole matrices from ``matrix`` on, or chunk number ``chunk`` of one."""

    name: str
    start: int
    stop: int
    matrix: int
    height: int
    chunk: int = 0


def _parts(name: str, shape: tuple[int, ...]) -> list[_Part]:
    stacks, height, width = matrices(shape)
    if stacks * height * width == 0:
        return []
    if height * width > CHUNK:
        return [
            _Part(name, matrix * height + a, matrix * height + b, matrix, b - a, chunk)
            for matrix in range(stacks)
            for chunk, (a, b) in enumerate(row_blocks((height, width), CHUNK))
        ]
    group = CHUNK // (height * width)
    return [
        _Part(name, matrix * height, min(matrix + group, stacks) * height, matrix, height) for matrix in range(0, stacks, group)
    ]


def compress_rank1(moments: Moments, *, stream: Stream, what: str) -> tuple[RankOneMoments, CompressionReport]:
    """Rank-1 compression of one expert's second moments. Vectors are kept whole. Raises MomentsError on bad values."""
    from ota_core.moments.compression.rank1_loops import sums as sums_of

    header = Header.of(moments, "rank1")
    shapes = header.shapes
    sums = {name: _TensorSums(shape) for name, shape in shapes.items() if len(shape) > 1}

    def work(part: _Part) -> None:
        v = moments.read(part.name, part.start, part.stop, check=False)
        stream.count_read(v.nbytes)
        stacks = v.shape[0] // part.height
        cols, weighted = np.zeros((stacks, v.shape[1])), np.zeros((stacks, v.shape[1]))
        found, rows = sums[part.name], np.empty(v.shape[0])
        sums_of(v, part.height, rows, cols, weighted)
        # The root of a negative number is NaN and spreads to w, a NaN or an infinite entry to r: nothing bad stays unseen.
        if not (np.isfinite(weighted).all() and np.isfinite(rows).all()):
            refuse(moments, part.name, part.start, part.stop)
        found.rows[part.start : part.stop] = rows
        for i in range(stacks):
            found.order[part.matrix + i].put(part.chunk, part.matrix + i, cols[i], weighted[i])

    parts = [part for name in sorted(sums) for part in _parts(name, shapes[name])]
    stream.map(work, parts, what=what, size=lambda part: part.stop - part.start)
    stored, errors = {}, {}
    for name, shape in sorted(shapes.items()):
        if len(shape) < 2:
            stored[name], errors[name] = keep_whole(moments, name)
            continue
        _check_range(moments, name, sums[name])
        keys = list(RankOneMoments.keys(name, shape).items())
        for (key, form), values in zip(keys, (sums[name].rows, sums[name].cols), strict=True):
            stored[key] = values.astype(np.float32).reshape(form)
        errors[name] = sums[name].error()
    compressed = RankOneMoments(moments.path, header, stored)
    return compressed, CompressionReport.of(compressed, compressed.size, errors)


def keep_whole(moments: Moments, name: str) -> tuple[F32, tuple[float, float]]:
    """A tensor as it is, float32, with its error of 0 and Σv. Raises MomentsError on bad values."""
    shape = moments.shapes()[name]
    whole = moments.read(name, 0, matrix_shape(shape)[0]).reshape(shape).copy()
    return whole, (0.0, math.fsum(whole.reshape(-1).tolist()))


def _check_range(moments: Moments, name: str, sums: _TensorSums) -> None:
    largest = max(sums.rows.max(initial=0.0), sums.cols.max(initial=0.0))
    if largest > np.finfo(np.float32).max:
        raise MomentsError(
            f"{moments.path}: a row or column of '{name}' adds up to {largest:.3g}, more than float32 holds; second moments are usually "
            "1e-22 to 1e-8: is this the right file? With compression: none they are used as they are"
        )
