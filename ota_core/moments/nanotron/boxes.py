"""Parameters that tensor parallelism cut into boxes, put together again as their rows are asked for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ota_core.errors import MomentsError
from ota_core.moments.base import Moments, Shape
from ota_core.moments.check import checked

Range = tuple[int, int]


@dataclass(frozen=True)
class Box:
    """Rows and columns of a parameter, and where they begin in one rank's part of it. A vector has one column."""

    source: str
    rows: Range
    cols: Range
    first_row: int
    first_col: int


@dataclass(frozen=True)
class Joined:
    """One parameter."""

    shape: Shape
    boxes: tuple[Box, ...]


def whole(source: str, shape: Shape) -> Joined:
    """A parameter that one rank has whole."""
    rows, cols = _matrix(shape)
    return Joined(shape, (Box(source, (0, rows), (0, cols), 0, 0),))


def joined(where: str, shape: Shape, parts: Sequence[tuple[str, Shape, str]]) -> Joined:
    """A parameter of several ranks.

    parts: of each rank the name and the shape of its part, and ``local_global_slices_pairs`` as nanotron writes it beside the weights:
    ``start,stop,step|…#start,stop,step|…``, slices of the part and of the whole, several with ``;`` between them.
    Raises MomentsError where they do not cover the parameter, each element once.
    """
    boxes, seen = [], set()
    for source, held, text in parts:
        for pair in text.split(";"):
            local, _, whole_ = pair.partition("#")
            own, place = _ranges(where, local, held), _ranges(where, whole_, shape)
            if [b - a for a, b in own] != [b - a for a, b in place] or any(b > n for (_, b), n in zip(own, held, strict=True)):
                raise MomentsError(f"{where}: the slices {pair!r:.120} do not fit the shapes {list(held)} and {list(shape)}")
            rows, cols = (place[0], place[1] if len(place) > 1 else (0, 1))
            boxes.append(Box(source, rows, cols, own[0][0], own[1][0] if len(own) > 1 else 0))
            seen.add((rows[0], cols[0]))
    size = sum((box.rows[1] - box.rows[0]) * (box.cols[1] - box.cols[0]) for box in boxes)
    if size != prod(shape) or len(seen) != len(boxes):
        raise MomentsError(f"{where}: the ranks' slices do not cover the shape {list(shape)}, each element once")
    return Joined(shape, tuple(boxes))


def _ranges(where: str, text: str, shape: Shape) -> list[Range]:
    parts = [[None if n.strip() == "None" else n.strip() for n in axis.split(",")] for axis in text.split("|")]
    plain = all(len(axis) == 3 and axis[2] in (None, "1") and all(n is None or n.isdigit() for n in axis[:2]) for axis in parts)
    if not plain or len(parts) != len(shape) or len(shape) > 2:
        raise MomentsError(
            f"{where}: the slices {text!r:.120} of a tensor of the shape {list(shape)} are not of the form start,stop,None"
        )
    return [(int(start or 0), size if stop is None else int(stop)) for (start, stop, _), size in zip(parts, shape, strict=True)]


def numbers_in(text: str) -> str:
    """The same text with plain numbers, where numpy wrote ``np.int64(96)``."""
    return re.sub(r"np\.\w+\((\d+)\)", r"\1", text)


def _matrix(shape: Shape) -> tuple[int, int]:
    return (shape[0] if shape else 1, prod(shape[1:]))


class JoinedMoments(Moments):
    """v by parameter, from a reader of the ranks' parts, which this closes."""

    def __init__(self, path: Path, inner: Moments, parameters: Mapping[str, Joined]) -> None:
        self.path, self.beta2, self._inner, self._parameters = path, inner.beta2, inner, dict(parameters)

    def shapes(self) -> Mapping[str, Shape]:
        return {name: one.shape for name, one in self._parameters.items()}

    def step(self, name: str) -> int | None:
        return self._inner.step(self._parameters[name].boxes[0].source)

    def stored_bytes(self, name: str) -> int:
        return sum(self._inner.stored_bytes(source) for source in {box.source for box in self._parameters[name].boxes})

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        one = self._parameters[name]
        rows, cols = _matrix(one.shape)
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {name!r} asked, which has rows 0:{rows}")
        if len(one.boxes) == 1:
            values = self._inner.read(one.boxes[0].source, start, stop, check=False)
        else:
            values = np.empty((stop - start, cols), np.float32)
            for box in one.boxes:
                low, high = max(start, box.rows[0]), min(stop, box.rows[1])
                if low < high:
                    first = box.first_row - box.rows[0]
                    part = self._inner.read(box.source, low + first, high + first, check=False)
                    width = box.cols[1] - box.cols[0]
                    values[low - start : high - start, slice(*box.cols)] = part[:, box.first_col : box.first_col + width]
        return checked(values, path=self.path, name=name, shape=one.shape, start=start) if check else values

    def prefetch(self, name: str, start: int, stop: int) -> None:
        for box in self._parameters[name].boxes:
            low, high = max(start, box.rows[0]), min(stop, box.rows[1])
            if low < high:
                first = box.first_row - box.rows[0]
                self._inner.prefetch(box.source, low + first, high + first)

    def drop_pages(self) -> None:
        self._inner.drop_pages()

    def close(self) -> None:
        self._inner.close()
