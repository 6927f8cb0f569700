"""Where compiled loops find the elements of a block: addresses and storage types, which need neither torch nor numba."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.files import rows
from ota_core.files.rows import Rows

TILE = 1024
F32, BF16, F16, RANK1, F64 = 0, 1, 2, 3, 4
KINDS = {rows.F32: F32, rows.BF16: BF16, rows.F16: F16}
"""Types that a checkpoint's tensors may have."""
_LOADED = {**KINDS, rows.F64: F64}
WRITTEN = {rows.F32: F32, rows.BF16: BF16, rows.F64: F64}
"""Types that are stored."""

BY_CURVATURE, BY_MAGNITUDE = 0, 1
"""What an expert's scores are: √v̂·|Δ|, or |Δ|."""

SOURCE = np.dtype(
    [
        ("kind", np.int64),
        ("address", np.uint64),  # of the block's first element; RANK1: of the first row's share r_i / s, float32
        ("columns", np.uint64),  # RANK1: of the column sums of the first matrix, float32 (stacks, width)
        ("width", np.int64),  # RANK1: columns of a matrix
        ("height", np.int64),  # RANK1: rows of a matrix
        ("row", np.int64),  # RANK1: the block's first row
        ("bad", np.uint64),  # of an int64 that becomes 1 where a number is not finite; 0: nobody asks
        ("present", np.uint64),  # one byte for each row, whether the model has it; 0: it has all
        ("columns_of_rows", np.int64),  # with ``present``: elements of a row
    ]
)
"""Where a block's elements come from."""


def source_of(block: Rows) -> NDArray[Any]:
    """A SOURCE, shape (), for a contiguous block of a type in ``KINDS``, or of float64 (``fused.memory.load_base``). The block must outlive it."""
    assert block.held.flags.c_contiguous, "compiled loops walk through a block by address"
    found = np.zeros((), SOURCE)
    found["kind"], found["address"] = _LOADED[block.dtype], block.address
    if block.watch is not None:
        found["bad"] = block.watch.ctypes.data
    if block.present is not None:
        assert block.present.flags.c_contiguous and block.present.shape == block.held.shape[:1]
        found["present"], found["columns_of_rows"] = block.present.ctypes.data, block.held.size // max(1, len(block.present))
    return found


def rank1_source(share: NDArray[np.float32], columns: NDArray[np.float32], row: int) -> NDArray[Any]:
    """A SOURCE for rows from ``row`` on of ṽ_ij = share_i · columns_j.

    share: float32 (…, R); columns: float32 (…, C), with the same leading axes. Both must outlive it.
    """
    assert share.flags.c_contiguous and columns.flags.c_contiguous and share.dtype == columns.dtype == np.float32
    found = np.zeros((), SOURCE)
    found["kind"], found["columns"] = RANK1, columns.ctypes.data
    found["address"] = share.ctypes.data + 4 * row
    found["width"], found["height"], found["row"] = columns.shape[-1], share.shape[-1], row
    return found


@contextmanager
def rounded(out: Rows) -> Iterator[Rows]:
    """Where a compiled pass writes: ``out`` itself, or float32 that is rounded into it at the end (float16)."""
    if out.dtype in WRITTEN:
        yield out
        return
    single = Rows.float32(np.empty(out.held.shape, np.float32))
    yield single
    with np.errstate(over="ignore"):  # what overflows is infinite: who checks what is written says so
        out.held[:] = single.held


@dataclass(frozen=True)
class VSource:
    """Second moments of a block as a compiled pass takes them."""

    source: NDArray[Any]
    """A SOURCE."""
    factor: float
    """What makes v of it v̂."""
    held: Any
    """What the source's addresses point into."""
