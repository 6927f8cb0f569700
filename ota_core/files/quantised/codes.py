"""What codes of 4 and 8 bits stand for, and the compiled loops that turn codes and scales into float32."""

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled
from ota_core.files.rows import BF16, F16, F32, Dtype, Rows

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32)
"""FP4 of the Open Compute Project's microscaling formats (MX v1.0, section 5.3.3): sign, two bits of exponent, one of mantissa."""


def float8_table(exponent_bits: int, *, infinity: bool) -> NDArray[np.float32]:
    """The 256 numbers of an 8-bit float: float32 (256,). ``infinity``: IEEE 754's kind (E5M2); without it only all ones are NaN (E4M3)."""
    mantissa_bits, bias = 7 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    code = np.arange(128)
    exponent, mantissa = code >> mantissa_bits, (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
    values = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent.astype(float) - bias))
    if infinity:
        top = exponent == 2**exponent_bits - 1
        values = np.where(top, np.where(mantissa == 0, np.inf, np.nan), values)
    else:
        values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


def exponent_table() -> NDArray[np.float32]:
    """E8M0, 2^(code − 127), the scales of the MX formats: float32 (256,); 255 is NaN."""
    values = np.ldexp(np.ones(256), np.arange(256) - 127)
    values[255] = np.nan
    return values.astype(np.float32)


TABLES: dict[str, NDArray[np.float32]] = {
    "F8_E4M3": float8_table(4, infinity=False),
    "F8_E5M2": float8_table(5, infinity=True),
    "F8_E8M0": exponent_table(),
    "I8": np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32),
    "U8": np.arange(256, dtype=np.float32),
}
"""Code of a type of one byte to its numbers, float32 (256,), by the byte."""


@compiled
def scale_codes(
    codes: NDArray[np.uint8], table: NDArray[np.float32], scales: NDArray[np.float32], zeros: NDArray[np.float32],
    rows: NDArray[np.int64], width: int, out: NDArray[np.float32],
) -> None:  # fmt: skip
    """(table[code] − zero) · scale. codes, out: (n, C); scales: (G, c); rows: the row of the scales for each of the n rows; width: columns
    that share a scale; zeros: as the scales, or of size 0 where there are none."""
    columns, offset = codes.shape[1], zeros.size > 0
    for i in range(codes.shape[0]):
        g = rows[i]
        for b in range(scales.shape[1]):
            scale, zero = scales[g, b], zeros[g, b] if offset else np.float32(0)
            for j in range(b * width, min((b + 1) * width, columns)):
                out[i, j] = (table[codes[i, j]] - zero) * scale


@compiled
def scale_flat(
    packed: NDArray[np.uint8], odd: int, table: NDArray[np.float32], absmax: NDArray[np.float32], skipped: int, block: int,
    out: NDArray[np.float32],
) -> None:  # fmt: skip
    """table[code] · absmax of its block, codes of 4 bits, the high half of a byte first. out: (n,), flat; ``odd``: 1 where the first element is a
    low half; ``skipped``: elements of the first block that come before."""
    for i in range(out.size):
        place = np.int64(i) + odd
        byte = np.int64(packed[place >> 1])
        code = byte & 15 if place & 1 else byte >> 4
        out[i] = table[code] * absmax[(np.int64(i) + skipped) // block]


@compiled
def _to_bfloat16(values: NDArray[np.float32], out: NDArray[np.uint16]) -> None:
    bits = values.view(np.uint32)
    for i in range(bits.size):
        value = bits[i]
        even = (value + np.uint32(0x7FFF) + ((value >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        out[i] = np.uint16(0x7FC0) if (value & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else np.uint16(even)


def as_rows(values: NDArray[np.float32], dtype: Dtype) -> Rows:
    """float32 (n, C), contiguous, rounded to float32, bfloat16 or float16 as torch rounds."""
    if dtype == F32:
        return Rows.float32(values)
    if dtype == F16:
        with np.errstate(over="ignore"):  # what overflows is infinite, and is reported as such by who checks it
            return Rows(F16, values.astype(np.float16))
    assert dtype == BF16, dtype
    held = np.empty(values.shape, np.uint16)
    _to_bfloat16(values.reshape(-1), held.reshape(-1))
    return Rows(BF16, held)


def to_float32(rows: Rows) -> NDArray[np.float32]:
    """Scales of any type as float32, (n, C); bytes without a sign are exponents (E8M0), as transformers takes them."""
    if rows.dtype.code in {"U8", "F8_E8M0"}:
        exponents: NDArray[np.float32] = TABLES["F8_E8M0"][rows.held]
        return exponents
    if rows.dtype.code not in TABLES:
        return rows.to_float32()
    found: NDArray[np.float32] = TABLES[rows.dtype.code][rows.held.view(np.uint8)]
    return found
