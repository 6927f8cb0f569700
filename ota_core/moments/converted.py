"""Second moments of a model's parameters as those of its checkpoint's tensors: a stack split into experts, q, k and v put together.

v goes the way of the weights: what moves a weight elsewhere moves its v there. Only the rows that a block needs are read.
"""

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import MomentsError
from ota_core.moments.base import Moments, Shape, Stored, View
from ota_core.moments.check import checked

Span = tuple[View, int, int]
"""A view and a half-open range of its elements."""


def whole(parameter: str, shape: Shape) -> Stored:
    """A parameter under another name."""
    axes = shape or (1,)
    return Stored(shape, (View(parameter, 0, axes, tuple(prod(axes[i + 1 :]) for i in range(len(axes)))),))


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
        steps = {self._moments.step(view.parameter) for view in self._stored[name].views}
        if len(steps) > 1:
            said = ", ".join(str(step or "none") for step in sorted(steps, key=lambda step: step or 0))
            raise MomentsError(
                f"{self.path}: the parameters that make {name!r} took different numbers of steps ({said}); one was expected: save "
                "the second moments by name as exp_avg_sq.safetensors"
            )
        return steps.pop()

    def stored_bytes(self, name: str) -> int:
        held = self._moments.shapes()
        share = ((prod(view.shape), view.parameter) for view in self._stored[name].views)
        return sum(count * self._moments.stored_bytes(one) // max(prod(held[one]), 1) for count, one in share)

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        one = self._stored[name]
        columns = matrix_shape(one.shape)[1]
        pieces = [self._elements(*span) for span in _spans(one, start * columns, stop * columns)]
        values = np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).reshape(stop - start, columns)
        return checked(values, path=self.path, name=name, shape=one.shape, start=start) if check else values

    def prefetch(self, name: str, start: int, stop: int) -> None:
        one = self._stored[name]
        columns = matrix_shape(one.shape)[1]
        for span in _spans(one, start * columns, stop * columns):
            self._moments.prefetch(span[0].parameter, *self._rows(*span))

    def drop_pages(self) -> None:
        self._moments.drop_pages()

    def close(self) -> None:
        self._moments.close()

    def _rows(self, view: View, start: int, stop: int) -> tuple[int, int]:
        """The rows of the parameter in which these elements of the view lie."""
        low, high = _reach(view, *_slices(view, start, stop))
        return low // self._columns[view.parameter], high // self._columns[view.parameter] + 1

    def _elements(self, view: View, start: int, stop: int) -> NDArray[np.float32]:
        """Elements start:stop of the view, flat."""
        a, b = _slices(view, start, stop)
        first, last = self._rows(view, start, stop)
        block = self._moments.read(view.parameter, first, last, check=False).reshape(-1)
        begin = view.offset + a * view.strides[0] - first * self._columns[view.parameter]
        seen = as_strided(block[begin:], (b - a, *view.shape[1:]), [block.itemsize * s for s in view.strides], writeable=False)
        skipped = a * prod(view.shape[1:])
        return seen.reshape(-1)[start - skipped : stop - skipped]


def _spans(one: Stored, start: int, stop: int) -> Iterator[Span]:
    """Which elements of which views are the elements start:stop of the tensor."""
    before = 0
    for view in one.views:
        size = prod(view.shape)
        a, b = max(start - before, 0), min(stop - before, size)
        if a < b:
            yield view, a, b
        before += size


def _slices(view: View, start: int, stop: int) -> tuple[int, int]:
    """The range of the view's first axis that holds its elements start:stop."""
    inner = prod(view.shape[1:])
    return start // inner, -(-stop // inner)


def _reach(view: View, a: int, b: int) -> tuple[int, int]:
    """The first and the last element of the parameter that slices a:b of the view's first axis touch."""
    low = view.offset + a * view.strides[0]
    return low, low + sum((n - 1) * s for n, s in zip((b - a, *view.shape[1:]), view.strides, strict=True))
