"""Tensors that are elements of others in another order: which, and how rows of them are read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape

Shape = tuple[int, ...]
ReadRows = Callable[[str, int, int], NDArray[Any]]
"""Rows of one tensor's matrix (``blocks.matrix_shape``), (n, C), contiguous."""


@dataclass(frozen=True)
class View:
    """Elements of one parameter, in the order in which a tensor of the checkpoint holds them; shape and strides as torch has them."""

    parameter: str
    offset: int
    """Of the first element, in elements of the parameter."""
    shape: Shape
    """At least one axis; not always the tensor's own shape, only its number of elements."""
    strides: tuple[int, ...]
    """In elements; none is negative."""


@dataclass(frozen=True)
class Stored:
    """How a tensor of the checkpoint comes from the model's parameters: an expert from a stack, one of two halves, q, k and v in one."""

    shape: Shape
    views: tuple[View, ...]
    """One, or several whose elements follow one another."""


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint's tensors become when transformers loads it."""

    own: Mapping[str, str]
    """Tensor to the parameter that it is, whatever each is called."""
    made: Mapping[str, Stored]
    """Tensor to the parts of parameters that make it."""
    shapes: Mapping[str, Shape]
    """Of the parameters, by their names."""
    beside: frozenset[str] = frozenset()
    """Tensors of modules that the model does not have: it is loaded without them."""
    bare: frozenset[str] = frozenset()
    """Matrices, and stacks of them, that a module of the model's own holds and multiplies itself: no layer of torch's."""


Span = tuple[View, int, int]
"""A view and a half-open range of its elements."""


def whole(parameter: str, shape: Shape) -> Stored:
    """A parameter under another name."""
    axes = shape or (1,)
    return Stored(shape, (View(parameter, 0, axes, tuple(prod(axes[i + 1 :]) for i in range(len(axes)))),))


def rows_read(one: Stored, columns: Mapping[str, int], start: int, stop: int) -> Iterator[tuple[str, int, int]]:
    """The rows of parameters that rows start:stop of a tensor are read from. columns: of each parameter's matrix."""
    width = matrix_shape(one.shape)[1]
    for span in _spans(one, start * width, stop * width):
        yield span[0].parameter, *_rows(*span, columns[span[0].parameter])


def read_rows(one: Stored, columns: Mapping[str, int], read: ReadRows, start: int, stop: int) -> NDArray[Any]:
    """Rows start:stop of a tensor's matrix, from rows of the parameters: contiguous."""
    width = matrix_shape(one.shape)[1]
    pieces = [_elements(*span, columns[span[0].parameter], read) for span in _spans(one, start * width, stop * width)]
    if not pieces:
        return read(one.views[0].parameter, 0, 0).reshape(0, width)
    return np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).reshape(stop - start, width)


def _rows(view: View, start: int, stop: int, columns: int) -> tuple[int, int]:
    """The rows of the parameter in which these elements of the view lie."""
    low, high = _reach(view, *_slices(view, start, stop))
    return low // columns, high // columns + 1


def _elements(view: View, start: int, stop: int, columns: int, read: ReadRows) -> NDArray[Any]:
    """Elements start:stop of the view, flat."""
    a, b = _slices(view, start, stop)
    first, last = _rows(view, start, stop, columns)
    block = read(view.parameter, first, last).reshape(-1)
    begin = view.offset + a * view.strides[0] - first * columns
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
