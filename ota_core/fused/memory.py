"""How compiled loops reach tensors: by address and storage type, so that one compiled loop serves any number of experts and types.

A tile is what ``load`` and ``store`` move: up to 1,024 elements as float32 or float64 in the cache, from or to any storage type.
Addresses are valid as long as the tensors behind them live; who calls a compiled loop holds them.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from ota_core.compute.loops import compiled
from ota_core.files import rows
from ota_core.files.rows import Rows
from ota_core.fused.sources import BF16, F16, F32, F64, TILE


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
    """Elements first … first + count − 1 of a block into the tile ``out``, float32. A number that is not finite is noted where the source says."""
    if source.kind == BF16:
        worst = _load_bfloat16(source, first, count, out)
    elif source.kind == F32:
        worst = _load_float32(source, first, count, out)
    elif source.kind == F16:
        worst = _load_float16(source, first, count, out)
    else:
        worst = _load_rank1(source, first, count, out)
    if worst & np.uint32(0x80000000) and source.bad:
        _array(source.bad, 1, np.int64)[0] = 1


@compiled
def _exponent(bits: np.uint32) -> np.uint32:
    """A float32's bits so that an exponent of all ones, infinite or NaN, carries into the upper bit, which is 0 otherwise."""
    # numba widens integers unless told at each step not to, and wide ones take twice as long.
    return np.uint32(np.uint32(bits & np.uint32(0x7FFFFFFF)) + np.uint32(0x00800000))


@compiled
def _load_bfloat16(source: Any, first: int, count: int, out: NDArray[np.float32]) -> np.uint32:
    half = _array(source.address + np.uint64(2 * first), count, np.uint16)
    bits, worst = out.view(np.uint32), np.uint32(0)
    for i in range(count):
        value = np.uint32(np.uint32(half[i]) << np.uint32(16))
        bits[i] = value
        worst = np.uint32(worst | _exponent(value))
    return worst


@compiled
def _load_float32(source: Any, first: int, count: int, out: NDArray[np.float32]) -> np.uint32:
    single = _array(source.address + np.uint64(4 * first), count, np.uint32)
    bits, worst = out.view(np.uint32), np.uint32(0)
    if source.bad:
        for i in range(count):
            value = single[i]
            bits[i] = value
            worst = np.uint32(worst | _exponent(value))
    else:  # second moments have a check of their own
        for i in range(count):
            bits[i] = single[i]
    return worst


@compiled
def _load_float16(source: Any, first: int, count: int, out: NDArray[np.float32]) -> np.uint32:
    half = _array(source.address + np.uint64(2 * first), count, np.uint16)
    bits, worst = out.view(np.uint32), np.uint32(0)
    for i in range(count):
        # The exponent's bias differs by 112; the product is exact, for subnormal numbers too.
        bits[i] = np.uint32(half[i] & 0x7FFF) << np.uint32(13)
        out[i] = out[i] * np.float32(2.0**112)
        if half[i] & 0x7C00 == 0x7C00:  # infinite or NaN
            bits[i] = np.uint32(0x7F800000) | (np.uint32(half[i] & 0x3FF) << np.uint32(13))
        bits[i] |= np.uint32(half[i] & 0x8000) << np.uint32(16)
    for i in range(count):
        worst = np.uint32(worst | _exponent(bits[i]))
    return worst


@compiled
def _load_rank1(source: Any, first: int, count: int, out: NDArray[np.float32]) -> np.uint32:
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
    return np.uint32(0)


@compiled
def load_base(source: Any, first: int, count: int, out: NDArray[Any]) -> None:
    """The same for θ₀ into a tile of float32, or of float64 where its source is (``start_of``)."""
    if source.kind == F64:
        double = _array(source.address + np.uint64(8 * first), count, np.float64)
        for i in range(count):
            out[i] = double[i]
    else:
        load(source, first, count, out)


def tile_of(base: Rows | None) -> NDArray[Any]:
    """A tile that ``load_base`` takes for this base. Loops are compiled once for each of the two types."""
    return np.empty(TILE, np.float32 if base is None or base.dtype != rows.F64 else np.float64)


@compiled
def lacks(source: Any, first: int, count: int, has: NDArray[np.bool_]) -> bool:
    """Whether the model lacks rows of the block; then the tile ``has`` tells of each element whether the model has it."""
    if source.present == 0:
        return False
    width, done = source.columns_of_rows, 0
    while done < count:
        row, column = (first + done) // width, (first + done) % width
        size = min(width - column, count - done)
        here = _array(source.present + np.uint64(row), 1, np.bool_)[0]
        for i in range(done, done + size):
            has[i] = here
        done += size
    return True


@compiled
def clear_absent(source: Any, first: int, count: int, has: NDArray[np.bool_], values: NDArray[Any]) -> None:
    """Set to 0 what stands in rows that the model lacks. ``has``: a tile, overwritten."""
    if lacks(source, first, count, has):
        for i in range(count):
            if not has[i]:
                values[i] = 0


def start_of(base: Rows | None, thetas: Sequence[Rows]) -> Rows | None:
    """θ₀ of a block with the mean of the experts that have it in every row that the base lacks, as ``rules.rows.base_rows`` makes it.

    base, thetas: as stored, n elements. The base itself where it lacks no row. Without a base: the rows that stand in for those of experts
    that lack some; None where none does. Else float64, with the base's ``present``.
    """
    absent = [theta.present for theta in thetas if theta.present is not None]
    if (base.present is None) if base is not None else not absent:
        return base
    present = base.present if base is not None else np.logical_and.reduce(absent)
    assert present is not None
    filled = np.zeros(thetas[0].held.shape) if base is None else base.to_float32().astype(np.float64)
    places = np.flatnonzero(~present)
    total, count = np.zeros((len(places), *filled.shape[1:])), np.zeros((len(places), 1))
    for theta in thetas:
        # Where a model lacks a row, its rows are zeros.
        total += Rows(theta.dtype, theta.held[places]).to_float32()
        count += 1.0 if theta.present is None else theta.present[places, None]
    filled[places] = total / np.maximum(count, 1.0)
    return Rows(rows.F64, filled, present=present)


@compiled
def load_bytes(address: int, first: int, count: int, out: NDArray[np.bool_]) -> None:
    """The same for a mask, one byte an element."""
    kept = _array(np.uint64(address) + np.uint64(first), count, np.bool_)
    for i in range(count):
        out[i] = kept[i]


@compiled
def store(values: NDArray[np.float64], count: int, kind: int, address: int, first: int, scratch: NDArray[np.float32]) -> None:
    """Write a tile as elements first … of an output block: float32 by one rounding, bfloat16 from that float32, as torch rounds; float64."""
    if kind == F64:
        double = _array(np.uint64(address) + np.uint64(8 * first), count, np.float64)
        for i in range(count):
            double[i] = values[i]
    elif kind == F32:
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
