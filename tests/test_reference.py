"""The references themselves, on examples small enough to be worked out on paper."""

import numpy as np
import pytest

from tests import reference_baselines as baselines
from tests.reference import Expert, kept_count, masks, ota, ota_without_base, rank1, threshold

BASE = {"w": np.zeros(4, np.float32)}
# √v = 1, 2, 3, 0 and 3, 2, 1, 0.
A = Expert(weights={"w": np.array([4, 2, 1, 5], np.float32)}, v={"w": np.array([1, 4, 9, 0], np.float32)})
B = Expert(weights={"w": np.array([0, -2, 3, 7], np.float32)}, v={"w": np.array([9, 4, 1, 0], np.float32)})


def with_density(expert: Expert, density: float) -> Expert:
    return Expert(weights=expert.weights, v=expert.v, density=density)


def test_ota_by_hand() -> None:
    # (1·4 + 3·0)/4, (2·2 − 2·2)/4, (3·1 + 1·3)/4, no curvature.
    np.testing.assert_allclose(ota(BASE, [A, B])["w"], [1, 0, 1.5, 0])
    np.testing.assert_allclose(ota(BASE, [A, B], lambda_=2.0)["w"], [2, 0, 3, 0])
    np.testing.assert_allclose(ota(BASE, [A, B], power=1.0)["w"], [0.4, 0, 1.2, 0])
    np.testing.assert_allclose(ota(BASE, [A, B], epsilon=1.0)["w"], [8 / 6, 0, 10 / 6, 6])


def test_masks_and_denominators_by_hand() -> None:
    # Scores 4, 4, 3, 0 and 0, 4, 3, 0: two of four keep the first two, and elements 1 and 2.
    a, b = with_density(A, 0.5), with_density(B, 0.5)
    kept_a, kept_b = masks(BASE, a, a.v), masks(BASE, b, b.v)
    assert kept_a is not None and kept_b is not None
    assert kept_a["w"].tolist() == [True, True, False, False] and kept_b["w"].tolist() == [False, True, True, False]
    np.testing.assert_allclose(ota(BASE, [a, b])["w"], [4, 0, 3, 0])
    np.testing.assert_allclose(ota(BASE, [a, b], denominator="all")["w"], [1, 0, 0.75, 0])
    np.testing.assert_allclose(ota(BASE, [a, b], fallback="mean")["w"], [4, 0, 3, 6])
    np.testing.assert_allclose(ota(BASE, [a, b], masked_merge="linear")["w"], [4, 0, 3, 0])
    np.testing.assert_allclose(ota(BASE, [a, b], masked_merge="ties")["w"], [4, 0, 3, 0])
    # ‖Δ‖ = √46 and √62, ‖mask·Δ‖ = √20 and √13.
    up_a, up_b = np.sqrt(46 / 20), np.sqrt(62 / 13)
    np.testing.assert_allclose(ota(BASE, [a, b], rescale=True)["w"], [4 * up_a, (2 * up_a - 2 * up_b) / 2, 3 * up_b, 0])


def test_an_element_that_never_moved_is_never_kept() -> None:
    kept = masks(BASE, with_density(B, 0.9), B.v)
    assert kept is not None and kept["w"].tolist() == [False, True, True, False]
    assert masks(BASE, with_density(B, 1.0), B.v) is None


def test_scaling_normalising_and_no_base() -> None:
    twice = Expert(weights=A.weights, v=A.v, scaling_factor=2.0)
    np.testing.assert_allclose(ota(BASE, [twice, B])["w"], [8 / 5, 4 / 6, 9 / 7, 0])
    large = Expert(weights=B.weights, v={"w": B.v["w"] * 100})
    np.testing.assert_allclose(ota(BASE, [A, large], normalise="global")["w"], [1, 0, 1.5, 0], atol=1e-12)
    np.testing.assert_allclose(ota_without_base([A, B])["w"], [1, 0, 1.5, 6])


def test_missing_curvature_and_ties_between_names() -> None:
    base = {"w": np.zeros(2, np.float32), "twin": np.zeros(2, np.float32)}
    expert = Expert(
        weights={name: np.array([1, 2], np.float32) for name in base}, v={"w": np.array([1, 4], np.float32)}, density=0.5
    )
    with pytest.raises(ValueError, match="twin"):
        ota(base, [expert])
    np.testing.assert_allclose(ota(base, [expert], missing_curvature="mean")["twin"], [1, 2])
    np.testing.assert_allclose(ota(base, [expert], tied={"twin": "w"})["twin"], [0, 2])


def test_rank1_and_thresholds() -> None:
    np.testing.assert_allclose(rank1(np.array([[1, 2], [3, 6]], np.float32)), [[1, 2], [3, 6]], rtol=1e-6)
    np.testing.assert_allclose(rank1(np.array([[2, 0], [0, 2]], np.float32)), [[1, 1], [1, 1]])
    assert not rank1(np.zeros((2, 2), np.float32)).any()
    assert [kept_count(density, 10) for density in (0.04, 0.05, 0.25, 1.0)] == [0, 1, 3, 10]
    assert threshold(np.array([3, 1, 2], np.float32), 2 / 3) == 2


def test_baselines_by_hand() -> None:
    base = {"w": np.zeros(4)}
    a, b = {"w": np.array([1.0, -2, 3, -4])}, {"w": np.array([4.0, 3, -2, -1])}
    assert baselines.linear([a, b], [1, 3])["w"].tolist() == [3.25, 1.75, -0.75, -1.75]
    assert baselines.add_up(base, [a, b], [1, 0.5], lambda_=2.0)["w"].tolist() == [6, -1, 4, -9]
    elected = {"elect": True, "normalize": True}
    half = baselines.add_up(base, [a, b], [1, 1], lambda m, name, x: baselines.trim(x, 0.5), **elected)["w"]
    assert half.tolist() == [4, 3, 3, -4]
    assert baselines.add_up(base, [a, b], [1, 1], **elected)["w"].tolist() == [2.5, 3, 3, -2.5]
    crumbs = baselines.add_up(base, [a, b], [1, 1], lambda m, name, x: baselines.breadcrumb(x, 0.5, 0.25))
    assert crumbs["w"].tolist() == [0, 1, 1, 0]
    keep = np.array([[True, False, True, False], [True, True, False, False]])
    assert baselines.add_up(base, [a, b], [1, 1], lambda m, name, x: baselines.dare(x, keep[m], 0.5))["w"].tolist() == [
        10,
        6,
        6,
        0,
    ]
    assert baselines.fisher(base, [a, b], [{"w": np.array([1.0, 1, 0, 0])}, {"w": np.array([3.0, 1, 0, 1])}], [1, 1])[
        "w"
    ].tolist() == [3.25, 0.5, 0, -1]
    right = baselines.slerp({"w": np.array([2.0, 0])}, {"w": np.array([0, 1.0])}, 1 / 3)["w"]
    np.testing.assert_allclose(right, [2 * np.sin(np.pi / 3), np.sin(np.pi / 6)])
