"""Second moments of a model's parameters as those of its checkpoint's tensors: a stack split into experts, q, k and v put together.

v goes the way of the weights: what moves a weight elsewhere moves its v there. Only the rows that a block needs are read.
"""

from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.files.layouts.stored import read_rows, rows_read
from ota_core.files.layouts.stored import whole as whole
from ota_core.moments.base import Moments, Shape, Stored
from ota_core.moments.check import checked


class ConvertedMoments(Moments):
    """v under the names of the checkpoint, read from v under the names of the model, which this closes."""

    def __init__(self, moments: Moments, stored: Mapping[str, Stored]) -> None:
        """stored: every tensor that has v, by its name in the checkpoint."""
        self.path, self.beta2, self._moments, self._stored = moments.path, moments.beta2, moments, stored
        self.estimated, self.unbiased = moments.estimated, moments.unbiased
        self._columns = {name: matrix_shape(shape)[1] for name, shape in moments.shapes().items()}

    def shapes(self) -> Mapping[str, Shape]:
        return {name: one.shape for name, one in self._stored.items()}

    def step(self, name: str) -> int | None:
        parts = [view.parameter for view in self._stored[name].views]
        advice = "save the second moments by name as exp_avg_sq.safetensors"
        return self._moments.one_step(parts, f"the parameters that make {name!r}", advice)

    def stored_bytes(self, name: str) -> int:
        held = self._moments.shapes()
        share = ((prod(view.shape), view.parameter) for view in self._stored[name].views)
        return sum(count * self._moments.stored_bytes(one) // max(prod(held[one]), 1) for count, one in share)

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        one = self._stored[name]
        values = read_rows(one, self._columns, lambda *rows: self._moments.read(*rows, check=False), start, stop)
        return checked(values, path=self.path, name=name, shape=one.shape, start=start) if check else values

    def prefetch(self, name: str, start: int, stop: int) -> None:
        for rows in rows_read(self._stored[name], self._columns, start, stop):
            self._moments.prefetch(*rows)

    def drop_pages(self) -> None:
        self._moments.drop_pages()

    def close(self) -> None:
        self._moments.close()
