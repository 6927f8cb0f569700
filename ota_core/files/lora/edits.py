"""What an adapter does to one tensor, by rows: W + s·B·A, its DoRA form, trained rows, a bias that is added.

A tensor is seen as E matrices (O, N), one below the other: E is 1 but for stacks of experts; N is a whole filter for convolutions.
Legend: left (E, O, r) and right (E, r, N) are the factors in the tensor's own layout, so that left·right has the shape of a matrix.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape

Numbers = NDArray[np.floating[Any]]
Factors = tuple[Numbers, Numbers]
ReadRows = Callable[[int, int], Numbers]
"""Rows start:stop of the tensor below the edit, float32 or float64 (n, C)."""

# Elements that are worked on at once: 8 bytes each beside what is returned.
_CHUNK = 1 << 17


@dataclass(kw_only=True, eq=False)
class LowRank:
    """The product of two factors, scaled, on one tensor."""

    shape: tuple[int, ...]
    """Of the tensor."""
    matrix: tuple[int, int, int]
    """(E, O, N)."""
    scale: float
    factors: Callable[[], Factors]
    """Reads left and right from the adapter's file."""
    magnitude: Callable[[], Numbers] | None = None
    """DoRA's: (O,) with ``by_column`` False, else (N,)."""
    by_column: bool = False
    """Whether DoRA's norms run down the stored columns, which are the layer's outputs where the weights are stored transposed."""

    def __post_init__(self) -> None:
        self._lock = Lock()
        self._column_factors: NDArray[np.float64] | None = None

    def rows(self, below: ReadRows, start: int, stop: int, held: type) -> Numbers:
        """Rows start:stop of the edited tensor, (n, C) of the type ``held``."""
        cols = matrix_shape(self.shape)[1]
        width = self.matrix[2]
        if not width or start == stop or not cols:
            return np.empty((stop - start, cols), held)
        first, last = start * cols // width, -(-stop * cols // width)
        result: Numbers = np.empty((last - first, width), held)
        factors = self._factors_by_column(below) if self.by_column and self.magnitude is not None else None
        left, right = self.factors()
        step = max(1, _CHUNK // width)
        for a in range(first, last, step):
            b = min(a + step, last)
            values = self._added(below, left, right, a, b)
            if factors is not None:
                values *= factors
            elif self.magnitude is not None:
                from ota_core.compute.low_rank import scale_rows_to

                scale_rows_to(values, self.magnitude()[a:b])
            result[a - first : b - first] = values
        skipped = start - first * width // cols
        return result.reshape(-1, cols)[skipped : skipped + stop - start]

    def _added(self, below: ReadRows, left: Numbers, right: Numbers, a: int, b: int) -> NDArray[np.float64]:
        """Rows a:b of the E·O rows (N wide) of the sum, float64."""
        from ota_core.compute.low_rank import edited_rows

        cols, (_, outs, width) = matrix_shape(self.shape)[1], self.matrix
        weights = below(a * width // cols, b * width // cols).reshape(b - a, width)
        out = np.empty((b - a, width))
        while a < b:
            expert, row = divmod(a, outs)
            here = min(b - a, outs - row)
            done = out.shape[0] - (b - a)
            edited_rows(
                weights[done : done + here], left[expert, row : row + here], right[expert], self.scale, out[done : done + here]
            )
            a += here
        return out

    def _factors_by_column(self, below: ReadRows) -> NDArray[np.float64]:
        """Magnitude over norm of every column: one pass over the whole matrix, the first time that a row is asked for."""
        from ota_core.compute.low_rank import add_squares

        assert self.magnitude is not None and self.matrix[0] == 1
        with self._lock:
            if self._column_factors is None:
                _, outs, width = self.matrix
                squares, (left, right) = np.zeros(width), self.factors()
                step = max(1, _CHUNK // width)
                for a in range(0, outs, step):
                    add_squares(self._added(below, left, right, a, min(a + step, outs)), squares)
                self._column_factors = self.magnitude() / np.sqrt(squares)
            return self._column_factors


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRows:
    """Rows of an embedding that were trained one by one (PEFT's trainable tokens); their values take the place of the base's."""

    shape: tuple[int, ...]
    indices: tuple[int, ...]
    values: Callable[[], Numbers]
    """(tokens, C)."""

    def rows(self, below: ReadRows, start: int, stop: int, held: type) -> Numbers:
        result: Numbers = below(start, stop).astype(held)
        for place, row in enumerate(self.indices):
            if start <= row < stop:
                result[row - start] = self.values()[place]
        return result


@dataclass(frozen=True, kw_only=True, eq=False)
class Added:
    """A scaled vector on top of a bias (``lora_bias``)."""

    shape: tuple[int, ...]
    scale: float
    values: Callable[[], Numbers]
    """(N, 1), as the rows of the bias."""

    def rows(self, below: ReadRows, start: int, stop: int, held: type) -> Numbers:
        sums: Numbers = below(start, stop).astype(np.float64) + self.scale * self.values()[start:stop].astype(np.float64)
        return sums.astype(held)


Edit = LowRank | TokenRows | Added


def whole_matrix(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(1, O, N) of a layer's weights: outputs by all the rest."""
    return 1, shape[0], prod(shape[1:])
