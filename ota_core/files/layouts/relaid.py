"""A checkpoint's tensors in the layout of another: as one more file of tensors, which is nowhere on the disk."""

from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ota_core.files.layouts.relayout import Relayout
from ota_core.files.rows import F32, F64, Dtype, Rows
from ota_core.files.safetensors_io import TensorInfo


class Held(Protocol):
    """The tensors that are there, see ``checkpoint.Checkpoint``."""

    path: Path

    def info(self, name: str) -> TensorInfo: ...

    def read_rows(self, name: str, start: int, stop: int) -> Rows: ...

    def prefetch(self, name: str, start: int, stop: int) -> None: ...


class RelaidWeights:
    """What is asked of a ``checkpoint.WeightFile`` is answered from the tensors of another layout."""

    def __init__(self, held: Held, layout: Relayout) -> None:
        """``held``: the checkpoint as it is (``Checkpoint.as_it_is``), which is closed by others."""
        self.path, self._held, self._layout = held.path, held, layout
        self.infos = {name: self._info(name) for name in layout.made}

    def _info(self, name: str) -> TensorInfo:
        dtypes = {self._held.info(tensor).dtype for tensor in self._layout.needed(name)}
        # float32 holds the numbers of all narrower types.
        dtype = dtypes.pop() if len(dtypes) == 1 else F64 if F64 in dtypes else F32
        shape = self._layout.made[name].shape
        return TensorInfo(name, dtype, shape, 0, prod(shape) * dtype.itemsize)

    def read_rows(self, name: str, start: int, stop: int) -> Rows:
        dtype = self.infos[name].dtype
        return Rows(dtype, self._layout.read(name, lambda tensor, a, b: self._numbers(tensor, a, b, dtype), start, stop))

    def _numbers(self, tensor: str, start: int, stop: int, dtype: Dtype) -> NDArray[Any]:
        rows = self._held.read_rows(tensor, start, stop)
        if rows.dtype == dtype:
            return rows.held
        return rows.held.astype(np.float64) if rows.dtype == F64 else rows.to_float32().astype(dtype.held, copy=False)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        for rows in self._layout.rows_read(name, start, stop):
            self._held.prefetch(*rows)

    def drop_pages(self) -> None:
        """The files that hold the tensors do it."""

    def close(self) -> None:
        """The files that hold the tensors do it."""
