"""Second moments whose parameters are rows of another reader's: renamed, turned, or cut out of a tensor that holds several."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.moments.base import Moments
from ota_core.moments.check import checked

# Below this many rows in a row of rows it is cheaper to read all that lies between the first and the last one.
LONG_RUN = 16


@dataclass(frozen=True)
class Taken:
    """Where one parameter comes from."""

    source: str
    shape: tuple[int, ...]
    """Of the parameter."""
    rows: NDArray[np.int64] | None = None
    """Row of the source's matrix per row of the parameter's; None where they are the same."""
    row: int | None = None
    """For a vector that is part of one row of a matrix: that row; ``rows`` are then elements of it."""


class TakenMoments(Moments):
    """v by the names of ``taken``, read from another reader, which it closes."""

    def __init__(self, path: Path, inner: Moments, taken: Mapping[str, Taken]) -> None:
        self.path, self.beta2, self._inner, self._taken = path, inner.beta2, inner, dict(taken)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: one.shape for name, one in self._taken.items()}

    def step(self, name: str) -> int | None:
        return self._inner.step(self._taken[name].source)

    def stored_bytes(self, name: str) -> int:
        one = self._taken[name]
        return prod(one.shape) * self._inner.stored_bytes(one.source) // max(prod(self._inner.shapes()[one.source]), 1)

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        one = self._taken[name]
        rows, cols = matrix_shape(one.shape)
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {name!r} asked, which has rows 0:{rows}")
        if one.rows is None:
            values = self._inner.read(one.source, start, stop, check=False).reshape(stop - start, cols)
        elif one.row is not None:
            values = (
                self._inner.read(one.source, one.row, one.row + 1, check=False).reshape(-1)[one.rows[start:stop]].reshape(-1, 1)
            )
        else:
            values = self._gathered(one.source, one.rows[start:stop], cols)
        return checked(values, path=self.path, name=name, shape=one.shape, start=start) if check else values

    def _gathered(self, source: str, rows: NDArray[np.int64], cols: int) -> NDArray[np.float32]:
        if not len(rows):
            return np.empty((0, cols), np.float32)
        edges = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows)]
        if len(rows) >= LONG_RUN * (len(edges) - 2):
            runs = [rows[a:b] for a, b in pairwise(edges)]
            parts = [self._inner.read(source, int(run[0]), int(run[-1]) + 1, check=False) for run in runs]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        first = int(rows.min())
        return self._inner.read(source, first, int(rows.max()) + 1, check=False)[rows - first]

    def prefetch(self, name: str, start: int, stop: int) -> None:
        one = self._taken[name]
        if one.rows is None:
            self._inner.prefetch(one.source, start, stop)
        elif one.row is not None:
            self._inner.prefetch(one.source, one.row, one.row + 1)
        elif len(rows := one.rows[start:stop]):
            self._inner.prefetch(one.source, int(rows.min()), int(rows.max()) + 1)

    def drop_pages(self) -> None:
        self._inner.drop_pages()

    def close(self) -> None:
        self._inner.close()
