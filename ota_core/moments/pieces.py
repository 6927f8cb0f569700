"""Second moments that lie in pieces: every parameter is a sequence of runs of numbers, in one or several files of torch.save."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import MomentsError
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import SavedTensor
from ota_core.files.rows import NAMED, Rows
from ota_core.moments.base import Moments
from ota_core.moments.check import checked
from ota_core.moments.safetensors_file import DROP_BYTES


@dataclass(frozen=True)
class Run:
    """Elements start:stop of one contiguous tensor of a file."""

    file: TorchFile
    tensor: SavedTensor
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Elements start:stop of the run, float32 (stop − start,); read-only."""
        held = self.file.read_flat(self.tensor, self.start + start, self.start + stop)
        return Rows(NAMED[self.tensor.dtype], held).to_float32()

    def prefetch(self, start: int, stop: int) -> None:
        """The same elements are read soon: a hint."""
        self.file.prefetch_flat(self.tensor, self.start + start, self.start + stop)


class PiecedMoments(Moments):
    """v by parameter name, each the concatenation of its runs, in the parameter's own order of elements."""

    def __init__(
        self,
        path: Path,
        files: Sequence[TorchFile],
        runs: Mapping[str, Sequence[Run]],
        shapes: Mapping[str, tuple[int, ...]],
        steps: Mapping[str, int | None],
        beta2: float | None,
    ) -> None:
        """Raises MomentsError where a file is not laid out as torch does it. ``files`` are closed by ``close``."""
        self.path, self.beta2 = path, beta2
        self._files, self._runs, self._shapes, self._steps = list(files), dict(runs), dict(shapes), dict(steps)
        self._ends = {name: list(accumulate(len(run) for run in own)) for name, own in self._runs.items()}
        self._unreleased = 0
        for own in self._runs.values():
            for run in own:
                check_places(run.file, [run.tensor])

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def step(self, name: str) -> int | None:
        return self._steps.get(name)

    def stored_bytes(self, name: str) -> int:
        return sum(len(run) * NAMED[run.tensor.dtype].itemsize for run in self._runs[name])

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        shape = self._shapes[name]
        rows, cols = matrix_shape(shape)
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start}:{stop} of {name!r} asked, which has rows 0:{rows}")
        if self._unreleased > DROP_BYTES:
            self._unreleased = 0
            self.drop_pages()
        values = self._elements(name, start * cols, stop * cols).reshape(stop - start, cols)
        self._unreleased += values.nbytes
        return checked(values, path=self.path, name=name, shape=shape, start=start) if check else values

    def _elements(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Elements start:stop of the flattened parameter: a view where one run has them all, a copy where they are joined."""
        parts = self._parts(name, start, stop)
        if len(parts) == 1:
            run, a, b = parts[0]
            return run.read(a, b)
        whole, at = np.empty(stop - start, np.float32), 0
        for run, a, b in parts:
            whole[at : at + b - a] = run.read(a, b)
            at += b - a
        return whole

    def _parts(self, name: str, start: int, stop: int) -> list[tuple[Run, int, int]]:
        runs, ends = self._runs[name], self._ends[name]
        parts = []
        index = bisect_right(ends, start)
        while start < stop:
            first = ends[index] - len(runs[index])
            until = min(stop, ends[index])
            parts.append((runs[index], start - first, until - first))
            start, index = until, index + 1
        return parts

    def prefetch(self, name: str, start: int, stop: int) -> None:
        rows, cols = matrix_shape(self._shapes[name])
        for run, a, b in self._parts(name, min(start, rows) * cols, min(stop, rows) * cols):
            run.prefetch(a, b)

    def drop_pages(self) -> None:
        for file in self._files:
            file.drop_pages()

    def close(self) -> None:
        self._runs = {}
        for file in self._files:
            file.close()


def check_places(file: TorchFile, tensors: Sequence[SavedTensor]) -> None:
    """Raises MomentsError where a file's tensors do not lie within its bytes."""
    try:
        file.check(tensors)
    except ValueError as error:
        raise MomentsError(f"{file.path}: {error}. Fetch the file again") from None
