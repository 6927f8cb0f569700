"""log8 against a numpy reference in 64-bit integers that shares nothing with it, and the bounds that its code promises."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ota_core.engine import engine
from ota_core.moments.compression import open_compressed
from ota_core.moments.compression.cuts import BLOCK
from ota_core.moments.compression.log8_codec import RECIPROCAL, SHIFT, decode, encode

F32 = NDArray[np.float32]


def code(v: F32) -> F32:
    """Round trip: every block's positive values on 254 equal steps of their bit patterns, nearest step, rounded half up."""
    out = np.zeros_like(v)
    for start in range(0, v.size, 256):
        bits = v[start : start + 256].view(np.uint32).astype(np.int64)
        positive = bits[bits > 0]
        if positive.size:
            lo, hi = int(positive.min()), int(positive.max())
            step = [round_half_up((int(b) - lo) * 254, hi - lo) if hi > lo else 0 for b in bits]
            back = [lo + round_half_up(s * (hi - lo), 254) if b else 0 for s, b in zip(step, bits, strict=True)]
            out[start : start + 256] = np.array(back, np.uint32).view(np.float32)
    return out


def round_half_up(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)


def round_trip(v: F32) -> tuple[F32, NDArray[np.uint8], NDArray[np.float64]]:
    codes, ranges, sums = np.empty(v.size, np.uint8), np.empty((-(-v.size // BLOCK), 2), np.int32), np.zeros(2)
    assert encode(v, codes, ranges, sums)
    out = np.empty(v.size, np.int32)
    assert decode(codes, ranges, 0, out)
    return out.view(np.float32), codes, sums


def values(size: int, seed: int, lowest: float, highest: float) -> F32:
    rng = np.random.default_rng(seed)
    with np.errstate(under="ignore"):
        v = (10.0 ** rng.uniform(lowest, highest, size)).astype(np.float32)
    return np.where(rng.random(size) < 0.05, np.float32(0), v)


CASES = {
    "usual": values(5000, 0, -20, -8),
    "subnormal": values(1000, 1, -45, -38),
    "everything": values(5000, 2, -45, 38),
    "narrow": np.arange(254, dtype=np.uint32).view(np.float32) + np.float32(0),
    "narrow and high": (np.arange(255, dtype=np.uint32) + np.uint32(0x2F800000)).view(np.float32),
    "zeros": np.zeros(700, np.float32),
    "one": np.array([3e38], np.float32),
    "smallest and largest": np.array([1e-45, 3.4028235e38, 0, 1e-38, 3e38, 1.1754944e-38], np.float32),
    "equal": np.full(300, 1e-12, np.float32),
    "a zero block between": np.concatenate([values(256, 3, -15, -10), np.zeros(256, np.float32), values(100, 4, -15, -10)]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_code_is_the_references(name: str) -> None:
    v = CASES[name]
    got, codes, sums = round_trip(v)
    expected = code(v)
    steps = np.abs(got.view(np.int32).astype(np.int64) - expected.view(np.int32))
    # The nearest step is sought in float64: where two are equally near, either is right.
    assert (got == expected).mean() > 0.999 and (np.abs(got - v) <= np.abs(expected - v) * (1 + 1e-6)).all(), steps.max()
    assert ((codes == 0) == (v == 0)).all() and ((got == 0) == (v == 0)).all()
    x, y = np.sqrt(v.astype(np.float64)), np.sqrt(got.astype(np.float64))
    np.testing.assert_allclose(sums, [((x - y) ** 2).sum(), (x * x).sum()], rtol=1e-4, atol=1e-14 * float((x * x).sum()))


@pytest.mark.parametrize("name", CASES)
def test_bounds_and_exact_values(name: str) -> None:
    v = CASES[name]
    got, _, _ = round_trip(v)
    for start in range(0, v.size, BLOCK):
        a, b = v[start : start + BLOCK], got[start : start + BLOCK]
        positive = a[a > 0]
        if positive.size == 0:
            continue
        lo, hi = positive.min(), positive.max()
        assert b[a == lo].tolist() == [lo] * int((a == lo).sum()) and b[a == hi].tolist() == [hi] * int((a == hi).sum())
        span = int(hi.view(np.int32)) - int(lo.view(np.int32))
        off = np.abs(b.view(np.int32).astype(np.int64) - a.view(np.int32))[a > 0]
        assert off.max() <= span / 508 + 1
        if span <= 254:
            assert off.max() == 0
        if lo >= np.finfo(np.float32).tiny:
            # Half a step of the logarithm: octaves / 508, and 1 / ln 2 for the straight line in place of the curve.
            half = (np.log2(float(hi)) - np.log2(float(lo)) + 1) / 508
            assert np.abs(np.log2(b[a > 0].astype(float) / a[a > 0])).max() <= half / np.log(2) + 1e-6


def test_the_division_by_254_is_exact() -> None:
    x = np.arange(254 * 253 + 128, dtype=np.int64)
    assert int(x[-1]) * RECIPROCAL < 2**32 and ((x * RECIPROCAL >> SHIFT) == x // 254).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.data())
def test_any_bit_pattern(size: int, data: st.DataObject) -> None:
    low, high = sorted((data.draw(st.integers(0, 0x7F7FFFFF)), data.draw(st.integers(0, 0x7F7FFFFF))))
    v = (
        np.random.default_rng(data.draw(st.integers(0, 99)))
        .integers(low, high, size, endpoint=True)
        .astype(np.uint32)
        .view(np.float32)
    )
    got, _, _ = round_trip(v)
    again, _, _ = round_trip(got)
    assert (got == again).all() and ((got == 0) == (v == 0)).all() and np.isfinite(got).all()


@pytest.mark.parametrize("shape", [(1,), (255,), (257,), (3, 85), (7, 100), (2, 3, 50), (5, 256), (1000, 3)])
def test_blocks_run_over_the_ends_of_rows(tmp_path: Path, shape: tuple[int, ...]) -> None:
    v = values(int(np.prod(shape)), 7, -18, -9)
    save_file({"w": v.reshape(shape)}, tmp_path / "v.safetensors")
    report = engine.compress_moments(tmp_path / "v.safetensors", tmp_path / "c.safetensors", method="log8")
    stored = load_file(tmp_path / "c.safetensors")
    assert stored["w#code"].dtype == np.uint8 and stored["w#range"].shape == (-(-v.size // 256), 2)
    moments = open_compressed(tmp_path / "c.safetensors")
    rows = int(np.prod(shape[:-1])) if len(shape) > 1 else shape[0]
    got = np.concatenate([moments.read("w", i, i + 1) for i in range(rows)]).reshape(-1)
    assert (got == round_trip(v)[0]).all()
    assert report.bytes_per_param == pytest.approx(1 + 8 * -(-v.size // 256) / v.size, rel=1e-12)
    assert report.sqrt_error < 0.02
