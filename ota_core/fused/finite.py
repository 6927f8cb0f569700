"""Counts numbers that are infinite or no numbers (NaN), by their bits, at the memory's speed."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled
from ota_core.files.rows import F64, Rows

# All bits of these set: infinite or NaN (of float8_e4m3fn and float8_e8m0fnu, which have no infinity: NaN).
_NOT_FINITE: dict[str, Any] = {
    "F64": np.uint64(0x7FF0000000000000),
    "F32": np.uint32(0x7F800000),
    "BF16": np.uint16(0x7F80),
    "F16": np.uint16(0x7C00),
    "F8_E5M2": np.uint8(0x7C),
    "F8_E4M3": np.uint8(0x7F),
    "F8_E8M0": np.uint8(0xFF),
}


@compiled
def _count_set(bits: NDArray[Any], mask: Any) -> int:
    """How many numbers have all bits of the mask set."""
    count = 0
    for value in bits:
        count += (value & mask) == mask
    return count


def count_not_finite(rows: Rows) -> int:
    """How many numbers of these rows, of a floating-point type, are infinite or NaN."""
    mask = _NOT_FINITE[rows.dtype.code]
    held = rows.held if rows.held.flags.c_contiguous else np.ascontiguousarray(rows.held)
    return int(_count_set(held.reshape(-1).view(mask.dtype), mask))


def kinds_not_finite(rows: Rows) -> dict[str, int]:
    """``NaN`` and ``infinite`` to how many there are; empty where all numbers are finite."""
    if not count_not_finite(rows):
        return {}
    values = rows.held if rows.dtype == F64 else rows.to_float32()
    return {"NaN": int(np.isnan(values).sum()), "infinite": int(np.isinf(values).sum())}
