"""Rows of a vocabulary that a model takes from elsewhere before the merge (``tokenizer`` in a recipe): another model's, a mean, or zeros.

A token that a model lacks begins there as it stands elsewhere, so that every method sees whole matrices. As a block is read, its few rows
of that kind are put in; nothing is held but the mean of a whole embedding, a row, which stands behind the last token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ota_core.files.rows import F32, F64, Rows

Fill = tuple[tuple[int, int], ...]
"""(Model, row in it) of every row whose mean is taken; empty: zeros."""
CHUNK = 4096
"""Rows that are read at once for the mean of all."""


class Reads(Protocol):
    """A model's rows: its own by its own numbers, float32 or float64 (n, C), and those of the output."""

    def own_rows(self, name: str, start: int, stop: int) -> NDArray[Any]: ...
    def rows(self, name: str, start: int, stop: int) -> Rows: ...


@dataclass(kw_only=True)
class Filled:
    """What of one model's vocabulary is not its own."""

    given: Mapping[int, Fill]
    """By the output's row."""
    padding: int
    """Rows from here on are the mean of all before; the number of rows where there are none."""
    models: Sequence[Reads]
    """Of the merge, base first: what ``given`` names by position."""
    _means: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    _lock: Any = field(default_factory=Lock)

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        return np.array(sorted(self.given), np.int64)

    def within(self, start: int, stop: int) -> list[int]:
        """The rows of the output in this range that are not the model's own."""
        first, last = np.searchsorted(self._places, (start, min(stop, self.padding)))
        return [*self._places[first:last].tolist(), *range(max(start, self.padding), stop)]

    def into(self, view: Reads, name: str, start: int, stop: int, rows: Rows) -> Rows:
        """The view's rows start:stop of the output with these in their places: float32, float64 where the view is stored so."""
        wanted = self.within(start, stop)
        if not wanted:
            return rows
        kind = F64 if rows.dtype == F64 else F32
        values = np.array(rows.held if kind == F64 else rows.to_float32(), kind.held)
        present = None if rows.present is None else rows.present.copy()
        for row in wanted:
            values[row - start] = (
                self._mean(view, name) if row >= self.padding else self._row(name, self.given[row], values.shape[1])
            )
            if present is not None:
                present[row - start] = True
        return Rows(kind, values, present=None if present is None or present.all() else present)

    def _row(self, name: str, fill: Fill, columns: int) -> NDArray[np.float64]:
        """The mean of the rows that are named, float64 (C,): one alone as it is."""
        total = np.zeros(columns)
        for model, row in fill:
            total += self.models[model].own_rows(name, row, row + 1)[0]
        return total / max(1, len(fill))

    def _mean(self, view: Reads, name: str) -> NDArray[np.float64]:
        """The mean over all rows of the view with a token, float64 (C,): in their order, so that threads and blocks do not matter."""
        with self._lock:
            if name not in self._means:
                total: NDArray[np.float64] | None = None
                for start in range(0, self.padding, CHUNK):
                    rows = view.rows(name, start, min(start + CHUNK, self.padding))
                    part = (rows.held if rows.dtype == F64 else rows.to_float32()).sum(axis=0, dtype=np.float64)
                    total = part if total is None else total + part
                assert total is not None
                self._means[name] = total / self.padding
            return self._means[name]
