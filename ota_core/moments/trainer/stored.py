"""How the second moment of one parameter lies in a file: in full, or as codes of 8 or 4 bits with a scale for each block.

Codes: Dettmers et al. 2022, arXiv 2110.02861 (bitsandbytes, torchao); Li et al. 2023, arXiv 2309.01507 (4 bits).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import SavedTensor
from ota_core.files.rows import NAMED, Rows

F32 = NDArray[np.float32]


class Stored(Protocol):
    """One parameter's v, of which any rows can be read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        ...

    def tensors(self) -> Iterator[SavedTensor]:
        """The tensors of the file that it is read from."""
        ...

    def read(self, file: TorchFile, start: int, stop: int) -> F32:
        """Rows start:stop of v as the matrix of ``blocks.matrix_shape``: float32 (stop − start, C); read-only."""
        ...

    def prefetch(self, file: TorchFile, start: int, stop: int) -> None:
        """The same rows are read soon."""
        ...


@dataclass(frozen=True, eq=False)
class Whole:
    """v as a tensor of any float type."""

    tensor: SavedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def tensors(self) -> Iterator[SavedTensor]:
        yield self.tensor

    def read(self, file: TorchFile, start: int, stop: int) -> F32:
        return file.read_rows(self.tensor, start, stop).to_float32()

    def prefetch(self, file: TorchFile, start: int, stop: int) -> None:
        file.prefetch(self.tensor, start, stop)


@dataclass(frozen=True, eq=False)
class Coded:
    """v_i = table[code_i] · scale[i // block], element by element in the order of memory: the product that the optimizer forms itself.

    Only the codes and scales of the rows that are asked for are read.
    """

    shape: tuple[int, ...]
    codes: SavedTensor
    """Contiguous: uint8, one code a byte or, with a table of 16, two, the first in the high half; float8 without a table."""
    table: SavedTensor | None
    """The value of each code, (256,) or (16,)."""
    scale: SavedTensor
    """(blocks,)."""
    block: int
    """Elements of a block; the last may be shorter."""

    def tensors(self) -> Iterator[SavedTensor]:
        yield from (self.codes, self.scale) if self.table is None else (self.codes, self.scale, self.table)

    def read(self, file: TorchFile, start: int, stop: int) -> F32:
        from ota_core.moments.trainer.code_loops import (
            decode,
            decode_halves,
        )  # numba takes long to import; `ota inspect` reads nothing

        columns = matrix_shape(self.shape)[1]
        a, b = start * columns, stop * columns
        out = np.empty(b - a, np.float32)
        if a < b:
            first, last = a // self.block, (b - 1) // self.block
            blocks = file.read_flat(self.scale, first, last + 1), self.block, a - first * self.block
            if self._packed:
                decode_halves(file.read_flat(self.codes, a // 2, -(-b // 2)), a % 2, self._values(file), *blocks, out)
            else:
                decode(file.read_flat(self.codes, a, b), self._values(file), *blocks, out)
        return out.reshape(stop - start, columns)

    def prefetch(self, file: TorchFile, start: int, stop: int) -> None:
        columns = matrix_shape(self.shape)[1]
        a, b = start * columns, stop * columns
        share = 2 if self._packed else 1
        file.prefetch_flat(self.codes, a // share, -(-b // share))
        file.prefetch_flat(self.scale, a // self.block, -(-b // self.block))

    @property
    def _packed(self) -> bool:
        return self.table is not None and self.table.numel == 16

    def _values(self, file: TorchFile) -> F32:
        """What each code stands for."""
        if self.table is None:
            return Rows(NAMED[self.codes.dtype], np.arange(256, dtype=np.uint8)).to_float32()
        found: F32 = file.read_flat(self.table, 0, self.table.numel)
        return found
