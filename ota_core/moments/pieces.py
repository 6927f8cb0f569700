"""Second moments that lie in pieces: every parameter is a sequence of runs of numbers, in one or several files of torch.save."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import MomentsError
from ota_core.files.torch_file import TorchFile
from ota_core.moments.base import Moments
from ota_core.moments.check import checked
from ota_core.moments.safetensors_file import DROP_BYTES


@dataclass(frozen=True)
class Run:
    """Numbers of one tensor of a file: ``tensor`` is the file's, as a column (n, 1)."""

    file: TorchFile
    tensor: torch.Tensor

    @classmethod
    def of(cls, file: TorchFile, tensor: torch.Tensor, start: int, stop: int) -> "Run":
        """Elements start:stop of a vector of the file."""
        return cls(file, tensor.view(-1, 1)[start:stop])

    def __len__(self) -> int:
        return int(self.tensor.shape[0])

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Numbers start:stop, shape (stop − start,), in their own dtype; read-only."""
        return self.file.read_rows(self.tensor, start, stop).view(-1)


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
        parts = [run.read(a, b).to(torch.float32) for run, a, b in self._parts(name, start, stop)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)
        found: NDArray[np.float32] = whole.numpy()
        return found

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
            run.file.prefetch(run.tensor, a, b)

    def drop_pages(self) -> None:
        for file in self._files:
            file.drop_pages()

    def close(self) -> None:
        self._runs = {}
        for file in self._files:
            file.close()


def check_places(file: TorchFile, tensors: Sequence[torch.Tensor]) -> None:
    """Raises MomentsError where the bytes of a file's tensors do not lie where torch puts them."""
    try:
        file.check(tensors)
    except ValueError as error:
        raise MomentsError(f"{file.path}: {error}. Fetch the file again") from None
