"""The 8-bit code of ``log8`` as compiled loops in integer arithmetic.

Non-negative floats order as their bit patterns, and the pattern of a float32 is a piecewise linear logarithm: 2^23 steps an octave,
straight lines between powers of two (subnormal numbers continue the lowest line). A block of 256 elements keeps its smallest and
largest positive value, lo and hi; code 0 is zero, and codes 1 … 255 are 254 equal steps from the bits of lo to those of hi. No
logarithm or exponential is computed, so that every processor gives the same bits.

Error: at most half a step, (hi − lo) / 508 of bits, which is 1/508 of the block's range in octaves up to the curvature of an octave
(a factor of at most 1 / ln 2 on the relative error). A block whose bits span 254 or less comes back exactly, as do lo and hi of any.
"""

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled
from ota_core.moments.compression.cuts import BLOCK

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
U32 = NDArray[np.uint32]
U8 = NDArray[np.uint8]
# 2^24 / 254, rounded up: (x · 66053) >> 24 is ⌊x / 254⌋ for every x up to 254 · 253 + 127 (a test tries them all), within 32 bits.
RECIPROCAL, SHIFT = 66053, 24
_INFINITY, _NEGATIVE_ZERO = 0x7F800000, np.uint32(1 << 31)


@compiled
def _decode_block(codes: U8, lo: np.int64, hi: np.int64, out: I32) -> None:
    """Bits of the values. Step (c − 1)·(hi − lo) / 254, rounded, in 32 bits: quotient and remainder of the span apart."""
    span = np.int32(hi - lo)
    quotient = np.int32(span // 254)
    rest = np.int32(span - quotient * 254)
    first = np.int32(lo)
    for i in range(codes.shape[0]):
        step = np.int32(codes[i]) - np.int32(1)
        fine = np.uint32(np.uint32(step * rest + 127) * np.uint32(RECIPROCAL)) >> np.uint32(SHIFT)
        bits = np.int32(first + step * quotient + np.int32(fine))
        out[i] = bits if step >= 0 else np.int32(0)


@compiled
def decode(codes: U8, ranges: I32, skip: int, out: I32) -> bool:
    """Values from ``codes`` (n,), whose first lies ``skip`` elements behind the start of the block of ``ranges``' first row.

    ranges: bits of (lo, hi), (blocks, 2); out: bits of float32 (n,). False where a range is not one: then the file is damaged.
    """
    good = True
    start = 0
    for block in range(ranges.shape[0]):
        stop = min((block + 1) * BLOCK - skip, codes.shape[0])
        lo, hi = np.int64(ranges[block, 0]), np.int64(ranges[block, 1])
        if not (0 <= lo <= hi < _INFINITY):
            good = False
        else:
            _decode_block(codes[start:stop], lo, hi, out[start:stop])
        start = stop
    return good


@compiled
def _range(bits: U32) -> tuple[np.int64, np.int64]:
    """Bits of the smallest positive and of the largest value. A largest of infinity's bits or more: something there is no v."""
    lo, hi = np.uint32(0xFFFFFFFF), np.uint32(0)
    for i in range(bits.shape[0]):
        b = bits[i] if bits[i] != _NEGATIVE_ZERO else np.uint32(0)
        below = np.uint32(b - np.uint32(1))  # wraps around for 0, which is not looked for
        lo = below if below < lo else lo
        hi = b if b > hi else hi
    return np.int64(lo) + 1, np.int64(hi)


@compiled
def _encode_block(bits: I32, lo: np.int64, hi: np.int64, codes: U8) -> None:
    scale = 254.0 / np.float64(hi - lo) if hi > lo else 0.0
    first = np.int32(lo)
    for i in range(bits.shape[0]):
        step = np.int32(np.float64(np.int32(bits[i] - first)) * scale + 0.5)
        codes[i] = np.uint8(step + 1) if bits[i] > 0 else np.uint8(0)  # zero and the negative zero are not positive


@compiled
def _add_error(values: F32, approximate: F32, sums: F64, squares: F64, lanes: F64) -> None:
    """Σ(√v − √ṽ)² and Σv of a block, eight running sums each, whose order is fixed."""
    size = values.shape[0]
    for i in range(size):  # apart from the sums, because this loop then runs in the processor's vector units
        difference = np.float64(np.sqrt(values[i]) - np.sqrt(approximate[i]))
        squares[i] = difference * difference
    lanes[:] = 0.0
    whole = size - size % 8
    for i in range(0, whole, 8):
        for lane in range(8):
            lanes[lane] += squares[i + lane]
    for i in range(0, whole, 8):
        for lane in range(8):
            lanes[8 + lane] += np.float64(values[i + lane])
    for i in range(whole, size):
        lanes[0] += squares[i]
        lanes[8] += np.float64(values[i])
    for lane in range(8):
        sums[0] += lanes[lane]
        sums[1] += lanes[8 + lane]


@compiled
def encode(values: F32, codes: U8, ranges: I32, sums: F64) -> bool:
    """Codes (n,) and ranges (⌈n / 256⌉, 2) of float32 values (n,). False when a value is negative, NaN or infinite.

    sums: Σ(√v − √ṽ)² and Σv are added to it, float64 (2,), block after block.
    """
    bits, patterns = values.view(np.int32), values.view(np.uint32)
    decoded, squares, lanes = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.float64), np.empty(16, np.float64)
    approximate = decoded.view(np.float32)
    for block in range(ranges.shape[0]):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, values.shape[0])
        lo, hi = _range(patterns[start:stop])
        if hi >= _INFINITY:
            return False
        if hi == 0:
            codes[start:stop] = 0
            ranges[block, 0], ranges[block, 1] = 0, 0
            continue
        ranges[block, 0], ranges[block, 1] = lo, hi
        _encode_block(bits[start:stop], lo, hi, codes[start:stop])
        _decode_block(codes[start:stop], lo, hi, decoded)
        _add_error(values[start:stop], approximate[: stop - start], sums, squares, lanes)
    return True
