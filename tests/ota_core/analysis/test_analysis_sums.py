"""Sums over pairs of rows: correctly rounded over rows, in whatever pieces and order they are added."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ota_core.compute.exact import PairDots, pair_count, pair_index


def test_pairs_are_numbered_row_by_row() -> None:
    pairs = [pair_index(a, b, 5) for a in range(5) for b in range(a, 5)]
    assert pairs == list(range(pair_count(5)))


@settings(deadline=None)  # the first call compiles the loop
@given(st.lists(st.floats(-1e150, 1e150), min_size=1, max_size=40), st.integers(1, 40), st.randoms(use_true_random=False))
def test_sums_over_rows_are_exact_in_any_pieces(values: list[float], size: int, random) -> None:
    x = np.array([values, [1.0] * len(values)])[:, :, None]  # rows of one column: a dot is the value itself
    pieces = [np.ascontiguousarray(x[:, i : i + size]) for i in range(0, len(values), size)]
    random.shuffle(pieces)
    total = PairDots(2)
    for piece in pieces:
        local = PairDots(2)
        assert local.add_rows(piece)
        total.add(local)
    assert Fraction(total.get(0, 1)) == Fraction(math.fsum(values))
    assert total.get(1, 1) == len(values)


def test_cancellation_leaves_what_is_small() -> None:
    total = PairDots(2)
    total.add_rows(np.array([[[1e100], [3.0], [-1e100], [1e-30]], [[1.0]] * 4]))
    assert total.get(0, 1) == 3.0 + 1e-30


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_told(bad: float) -> None:
    total = PairDots(2)
    assert total.add_rows(np.ones((2, 3, 4)))
    assert not total.add_rows(np.array([[[1.0, bad]], [[1.0, 1.0]]]))


def test_cosine_of_tiny_vectors_does_not_underflow() -> None:
    total = PairDots(3)
    total.add_rows(np.stack([np.full((2, 5), 1e-120), np.full((2, 5), 3e-120), np.zeros((2, 5))]))
    assert total.cosine(0, 1) == pytest.approx(1.0) and math.isnan(total.cosine(0, 2))
