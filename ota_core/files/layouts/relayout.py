"""From one layout of a model's tensors to another, by way of the model's parameters: no more than the rows that a block needs are read.

A tensor of the wanted layout is elements of parameters (``stored.Stored``); the parameters are put together from the tensors that are there.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.files.layouts.stored import Loaded, ReadRows, Shape, Stored, View, read_rows, rows_read, whole


@dataclass(frozen=True)
class Source:
    """A part of a parameter, and the tensor that holds it."""

    tensor: str
    width: int
    """Columns of the tensor's matrix."""
    before: int
    """Elements of the tensor before the first of the part."""
    view: View
    """Where the part's elements lie in the parameter."""


@dataclass(frozen=True)
class Relayout:
    """Tensors of a wanted layout, made from those of another."""

    made: Mapping[str, Stored]
    """Wanted tensor to its elements of parameters."""
    sources: Mapping[str, tuple[Source, ...]]
    """Parameter to the tensors that hold it."""
    shapes: Mapping[str, Shape]
    """Of the parameters."""

    @cached_property
    def columns(self) -> dict[str, int]:
        """Columns of each parameter's matrix."""
        return {parameter: matrix_shape(self.shapes[parameter])[1] for parameter in self.sources}

    def needed(self, name: str) -> list[str]:
        """The tensors that hold something of a wanted one."""
        return list(dict.fromkeys(one.tensor for view in self.made[name].views for one in self.sources[view.parameter]))

    def read(self, name: str, read: ReadRows, start: int, stop: int) -> NDArray[Any]:
        """Rows start:stop of a wanted tensor's matrix. read: of the tensors that are there, all of one numpy type."""

        def parameter(one: str, first: int, last: int) -> NDArray[Any]:
            return self._parameter(one, read, first, last)

        return read_rows(self.made[name], self.columns, parameter, start, stop)

    def rows_read(self, name: str, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """The rows of the tensors that are there from which these are made."""
        for parameter, first, last in rows_read(self.made[name], self.columns, start, stop):
            columns = self.columns[parameter]
            for source in self.sources[parameter]:
                part = _within(source.view, first * columns, last * columns)
                if part is not None:
                    yield source.tensor, *_tensor_rows(source, *part)

    def _parameter(self, name: str, read: ReadRows, start: int, stop: int) -> NDArray[Any]:
        """Rows start:stop of a parameter's matrix, from all tensors that hold something of them."""
        sources, columns = self.sources[name], self.columns[name]
        if start == stop:
            return read(sources[0].tensor, 0, 0).reshape(0, columns)
        if len(sources) == 1 and sources[0].view == whole(name, self.shapes[name]).views[0]:
            return read(sources[0].tensor, start, stop)
        low, high = start * columns, stop * columns
        out: NDArray[Any] | None = None
        for source in sources:
            part = _within(source.view, low, high)
            if part is None:
                continue
            values = _values(source, *part, read)
            out = np.empty(high - low, values.dtype) if out is None else out
            _place(values, source.view, part, out, low)
        assert out is not None, f"no tensor holds rows {start}:{stop} of {name}"
        return out.reshape(stop - start, columns)


def relayout(wanted: Mapping[str, Stored], loaded: Loaded, held: Mapping[str, Shape]) -> Relayout | None:
    """How the wanted tensors come from those that a checkpoint holds; only those of which every element is there.

    held: the checkpoint's tensors and their shapes, by the names that ``loaded`` has. None where nothing can be made.
    """
    sources = _sources(loaded, held)
    made = {name: one for name, one in wanted.items() if all(view.parameter in sources for view in one.views)}
    if not made:
        return None
    used = {view.parameter for one in made.values() for view in one.views}
    return Relayout(made, {name: sources[name] for name in used}, {name: loaded.shapes[name] for name in used})


def _sources(loaded: Loaded, held: Mapping[str, Shape]) -> dict[str, tuple[Source, ...]]:
    """The tensors of each parameter that a checkpoint holds whole."""
    found: dict[str, list[Source]] = {}
    for tensor, parameter in loaded.own.items():
        if held.get(tensor) == loaded.shapes[parameter] and parameter not in found:
            width = matrix_shape(held[tensor])[1]
            found[parameter] = [Source(tensor, width, 0, whole(parameter, held[tensor]).views[0])]
    stacks: dict[str, list[Source]] = {}
    for tensor, one in loaded.made.items():
        before = 0
        for view in one.views if held.get(tensor) == one.shape else ():
            stacks.setdefault(view.parameter, []).append(Source(tensor, matrix_shape(one.shape)[1], before, view))
            before += prod(view.shape)
    for parameter, parts in stacks.items():
        if sum(prod(part.view.shape) for part in parts) == prod(loaded.shapes[parameter]):
            found.setdefault(parameter, parts)
    return {parameter: tuple(parts) for parameter, parts in found.items()}


def _outer(view: View) -> int:
    """The axis along which a view's elements lie furthest apart in the parameter."""
    return max(range(len(view.shape)), key=lambda axis: (view.shape[axis] > 1, view.strides[axis], -axis))


def _rest(view: View, axis: int) -> int:
    return sum((n - 1) * s for i, (n, s) in enumerate(zip(view.shape, view.strides, strict=True)) if i != axis)


Part = tuple[int, int, int]
"""An axis of a view, and a half-open range of its slices along it."""


def _within(view: View, low: int, high: int) -> Part | None:
    """The slices of a view that touch elements low:high of the parameter."""
    axis = _outer(view)
    step, rest = max(1, view.strides[axis]), _rest(view, axis)
    first = max(0, -(-(low - view.offset - rest) // step))
    last = min(view.shape[axis], (high - 1 - view.offset) // step + 1)
    return (axis, first, last) if first < last else None


def _tensor_rows(source: Source, axis: int, first: int, last: int) -> tuple[int, int]:
    """The rows of the tensor in which these slices lie: all of the part where they are not slices of its first axis."""
    inner = prod(source.view.shape[1:])
    a, b = (first * inner, last * inner) if axis == 0 else (0, prod(source.view.shape))
    return (source.before + a) // source.width, -(-(source.before + b) // source.width)


def _values(source: Source, axis: int, first: int, last: int, read: ReadRows) -> NDArray[Any]:
    """These slices of a part, as an array of the view's axes."""
    top, bottom = _tensor_rows(source, axis, first, last)
    flat = read(source.tensor, top, bottom).reshape(-1)
    inner, shape = prod(source.view.shape[1:]), source.view.shape
    begin = source.before + (first * inner if axis == 0 else 0) - top * source.width
    count = (last - first) * inner if axis == 0 else prod(shape)
    values = flat[begin : begin + count].reshape(-1, *shape[1:])
    return values if axis == 0 else values[(slice(None),) * axis + (slice(first, last),)]


def _place(values: NDArray[Any], view: View, part: Part, out: NDArray[Any], low: int) -> None:
    """Put slices of a view where they belong in ``out``, elements of the parameter from ``low`` on; what lies outside is left away."""
    axis, first, last = part
    begin = view.offset + first * view.strides[axis] - low
    end = begin + (last - first - 1) * view.strides[axis] + _rest(view, axis)
    if begin >= 0 and end < out.size:
        as_strided(out[begin:], values.shape, [out.itemsize * stride for stride in view.strides])[...] = values
        return
    places = np.full((), begin, np.int64)
    for i, (count, stride) in enumerate(zip(values.shape, view.strides, strict=True)):
        places = places + (np.arange(count) * stride).reshape([-1 if i == j else 1 for j in range(values.ndim)])
    inside = (places >= 0) & (places < out.size)
    out[places[inside]] = values[inside]


def gone(made: Relayout, kept: Collection[str]) -> set[str]:
    """The tensors whose place the wanted ones take. kept: names that the wanted layout has, too."""
    return {tensor for name in made.made for tensor in made.needed(name)} - set(kept)
