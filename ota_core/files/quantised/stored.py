"""A tensor as a file holds it, and one that is read through its codes: what the formats are written in."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.files.rows import Dtype, Rows
from ota_core.files.safetensors_io import TensorInfo


class Readable(Protocol):
    """A file of tensors, see ``checkpoint.WeightFile``."""

    infos: dict[str, TensorInfo]

    def read_rows(self, name: str, start: int, stop: int) -> Rows: ...

    def prefetch(self, name: str, start: int, stop: int) -> None: ...


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    file: Readable
    name: str
    """As the file calls it."""

    @property
    def info(self) -> TensorInfo:
        return self.file.infos[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def code(self) -> str:
        """The type, as the header of safetensors has it."""
        return self.info.dtype.code

    def rows(self, start: int, stop: int) -> Rows:
        return self.file.read_rows(self.name, start, stop)

    def whole(self) -> Rows:
        """All rows of the matrix (R, C) of ``blocks.matrix_shape``."""
        return self.rows(0, matrix_shape(self.shape)[0])

    def bytes(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The same rows as their bytes, (n, C · size)."""
        held: NDArray[Any] = self.rows(start, stop).held
        return np.ascontiguousarray(held).view(np.uint8)


class Coded:
    """A weight that is stored as codes and scales. A format says how many numbers there are and how rows of them are made."""

    kind: str
    """What the codes are, in a word: fp8, int8, nf4, …"""
    shape: tuple[int, ...]
    """Of the weight, as the model has it."""

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start:stop of the weight's matrix, float32 (stop − start, C)."""
        raise NotImplementedError

    def prefetch(self, start: int, stop: int) -> None:
        """The codes of these rows are read soon."""
        raise NotImplementedError

    def info(self, name: str, dtype: Dtype) -> TensorInfo:
        """The weight's place among a model's tensors, in the type that it is rounded to."""
        return TensorInfo(name, dtype, self.shape, 0, 0)
