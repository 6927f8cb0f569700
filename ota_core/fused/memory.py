"""How compiled loops reach tensors: by address and storage type, so that one compiled loop serves any number of experts and types.

A tile is what ``load`` and ``store`` move: up to 1,024 elements as float32 or float64 in the cache, from or to any storage type.
Addresses are valid as long as the tensors behind them live; who calls a compiled loop holds them.
"""

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

compiled = numba.njit(cache=True, nogil=True, error_model="numpy")

TILE = 1024
F32, BF16, F16, RANK1 = 0, 1, 2, 3
KINDS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}
"""Types that are loaded."""
WRITTEN = {torch.float32: F32, torch.bfloat16: BF16}
"""Types that are stored."""

SOURCE = np.dtype(
    [
        ("kind", np.int64),
        ("address", np.uint64),  # of the block's first element; RANK1: of the first row's share r_i / s, float32
        ("columns", np.uint64),  # RANK1: of the column sums of the first matrix, float32 (stacks, width)
        ("width", np.int64),  # RANK1: columns of a matrix
        ("height", np.int64),  # RANK1: rows of a matrix
        ("row", np.int64),  # RANK1: the block's first row
    ]
)
"""Where a block's elements come from."""


def source_of(block: torch.Tensor) -> NDArray[Any]:
    """A SOURCE, shape (), for a contiguous block of a type in ``KINDS``. The block must outlive it."""
    assert block.is_contiguous(), "compiled loops walk through a block by address"
    found = np.zeros((), SOURCE)
    found["kind"], found["address"] = KINDS[block.dtype], block.data_ptr()
    return found


def rank1_source(share: torch.Tensor, columns: torch.Tensor, row: int) -> NDArray[Any]:
    """A SOURCE for rows from ``row`` on of ṽ_ij = share_i · columns_j.

    share: float32 (…, R); columns: float32 (…, C), with the same leading axes. Both must outlive it.
    """
    assert share.is_contiguous() and columns.is_contiguous() and share.dtype == columns.dtype == torch.float32
    found = np.zeros((), SOURCE)
    found["kind"], found["columns"] = RANK1, columns.data_ptr()
    found["address"] = share.data_ptr() + 4 * row
    found["width"], found["height"], found["row"] = columns.shape[-1], share.shape[-1], row
    return found


@dataclass(frozen=True)
class VSource:
    """Second moments of a block as a compiled pass takes them."""

    source: NDArray[Any]
    """A SOURCE."""
    factor: float
    """What makes v of it v̂."""
    held: Any
    """The tensors that the source's addresses point into."""


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer that ``numba.carray`` takes."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@compiled
def _array(address: Any, count: int, dtype: Any) -> Any:
    """``count`` elements from an address on."""
    return numba.carray(_pointer(address), (count,), dtype)  # type: ignore[attr-defined, call-arg]


@compiled
def load(source: Any, first: int, count: int, out: NDArray[np.float32]) -> None:
    """Elements first … first + count − 1 of a block into the tile ``out``, float32."""
    if source.kind == BF16:
        half = _array(source.address + np.uint64(2 * first), count, np.uint16)
        bits = out.view(np.uint32)
        for i in range(count):
            bits[i] = np.uint32(half[i]) << np.uint32(16)
    elif source.kind == F32:
        single = _array(source.address + np.uint64(4 * first), count, np.float32)
        for i in range(count):
            out[i] = single[i]
    elif source.kind == F16:
        _load_float16(source, first, count, out)
    else:
        _load_rank1(source, first, count, out)


@compiled
def _load_float16(source: Any, first: int, count: int, out: NDArray[np.float32]) -> None:
    half = _array(source.address + np.uint64(2 * first), count, np.uint16)
    bits = out.view(np.uint32)
    for i in range(count):
        # The exponent's bias differs by 112; the product is exact, for subnormal numbers too.
        bits[i] = np.uint32(half[i] & 0x7FFF) << np.uint32(13)
        out[i] = out[i] * np.float32(2.0**112)
        if half[i] & 0x7C00 == 0x7C00:  # infinite or NaN
            bits[i] = np.uint32(0x7F800000) | (np.uint32(half[i] & 0x3FF) << np.uint32(13))
        bits[i] |= np.uint32(half[i] & 0x8000) << np.uint32(16)


@compiled
def _load_rank1(source: Any, first: int, count: int, out: NDArray[np.float32]) -> None:
    width, done = source.width, 0
    while done < count:
        row, column = (first + done) // width, (first + done) % width
        size = min(width - column, count - done)
        share = _array(source.address + np.uint64(4 * row), 1, np.float32)[0]
        matrix = (source.row + row) // source.height
        start = source.columns + np.uint64(4 * (matrix * width + column))
        columns = _array(start, size, np.float32)
        for i in range(size):
            out[done + i] = share * columns[i]
        done += size


@compiled
def load_bytes(address: int, first: int, count: int, out: NDArray[np.bool_]) -> None:
    """The same for a mask, one byte an element."""
    kept = _array(np.uint64(address) + np.uint64(first), count, np.bool_)
    for i in range(count):
        out[i] = kept[i]


@compiled
def store(values: NDArray[np.float64], count: int, kind: int, address: int, first: int, scratch: NDArray[np.float32]) -> None:
    """Write a tile as elements first … of an output block: float32 by one rounding, bfloat16 from that float32, as torch rounds."""
    if kind == F32:
        single = _array(np.uint64(address) + np.uint64(4 * first), count, np.float32)
        for i in range(count):
            single[i] = np.float32(values[i])
    else:
        half = _array(np.uint64(address) + np.uint64(2 * first), count, np.uint16)
        bits = scratch.view(np.uint32)
        for i in range(count):
            scratch[i] = np.float32(values[i])
        for i in range(count):
            value = bits[i]
            even = (value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            half[i] = np.uint16(0x7FC0) if (value & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else np.uint16(even)
