"""Predictions on data whose truth is known: what is learned, how often intervals hold, and when nothing is said."""

import math
from collections.abc import Callable
from statistics import fmean

import numpy as np
import pytest

from tasks.experiments.preflight.predict import CONFIDENCE, GROUPS, LEAST, MEASURES, Example, Point, Predictor, judged_by, why_not

Truth = Callable[[dict[str, float], bool, int], float]


def linear(features: dict[str, float], refined: bool, experts: int) -> float:
    return 0.4 + 0.8 * features["reach"] - 0.3 * features["disturbance"] + 0.2 * refined - 0.05 * math.log(experts)


def made_up(
    seed: int, groups: int, merges: int = 3, *, truth: Truth = linear, noise: float = 0.05, here: bool = True, effects: dict[str, float] | None = None
) -> list[Example]:  # fmt: skip
    """Merges of so many sets of experts. Noise: of a value, half of it shared by all of a set."""
    rng, found = np.random.default_rng(seed), []
    names = list(effects or {"math": 0.0, "code": 0.0, "chat": 0.0})
    for group in range(groups):
        shared = rng.normal(0, noise * math.sqrt(0.5))
        for merge in range(merges):
            refined = bool(rng.integers(2))
            for name in names:
                features = {measure: float(rng.uniform(0.1, 0.9)) for measure in MEASURES}
                value = (
                    truth(features, refined, len(names))
                    + shared
                    + rng.normal(0, noise * math.sqrt(0.5))
                    + (effects or {}).get(name, 0.0)
                )
                found.append(
                    Example(capability=f"suite/{name}", refined=refined, experts=len(names), features=features, merge=f"{seed}-{group}-{merge}",
                            group=f"{seed}-{group}", here=here, retention=value)
                )  # fmt: skip
    return found


def test_a_linear_truth_is_found() -> None:
    learned = Predictor(made_up(1, 40, noise=0.001))
    point = made_up(2, 1, noise=0.0)[0]
    assert learned.retention(point).value == pytest.approx(point.retention, abs=0.01)
    found = learned.coefficients()
    assert found["reach"][0] > 0.15 > 3 * found["reach"][1] and found["disturbance"][0] < -0.05 and learned.error < 0.01


def test_a_measure_counts_only_the_way_that_it_can() -> None:
    def upside_down(features: dict[str, float], *_: object) -> float:
        return 0.5 + 0.5 * features["disturbance"] + 0.2 * features["reach"]

    found = Predictor(made_up(1, 40, truth=upside_down, noise=0.01)).coefficients()
    assert found["disturbance"] == (0.0, 0.0) and found["reach"][0] > 0.02


def test_intervals_hold_as_often_as_they_say() -> None:
    held, means = [], []
    for seed in range(60):
        learned, new = Predictor(made_up(seed, 10)), made_up(1000 + seed, 1, merges=1)
        found = [learned.retention(one) for one in new]
        held += [at.low <= one.retention <= at.high for at, one in zip(found, new, strict=True)]
        mean = learned.average(new)
        means.append(mean.low <= fmean(one.retention for one in new) <= mean.high)
    # 90 % of 180 correlated values, of 60 means: three standard errors of chance below.
    assert fmean(held) > CONFIDENCE - 0.09 and fmean(means) > CONFIDENCE - 0.12


def test_intervals_grow_with_the_noise_and_hold_where_the_truth_is_no_line() -> None:
    def bent(features: dict[str, float], *_: object) -> float:
        return 1 + math.sin(6 * features["reach"]) * features["disturbance"]

    quiet, loud = (Predictor(made_up(3, 20, noise=noise)).retention(made_up(4, 1)[0]) for noise in (0.02, 0.2))
    assert loud.high - loud.low > 4 * (quiet.high - quiet.low)
    learned = Predictor(made_up(5, 40, truth=bent))
    new = made_up(6, 60, truth=bent)
    assert fmean((at := learned.retention(one)).low <= one.retention <= at.high for one in new) > CONFIDENCE - 0.1


def test_capabilities_that_are_known_are_told_apart() -> None:
    learned = Predictor(made_up(7, 20, effects={"easy": 0.3, "hard": -0.3}))
    features = dict.fromkeys(MEASURES, 0.5)
    easy, hard, new = (
        learned.retention(Point(capability=name, refined=False, experts=2, features=features)).value
        for name in ("suite/easy", "suite/hard", "suite/new")
    )
    assert easy - hard == pytest.approx(0.6, abs=0.1) and hard < new < easy


def test_beyond_what_is_known_the_line_goes_no_further() -> None:
    learned = Predictor(made_up(8, 20))
    most, absurd = (
        learned.retention(Point(refined=False, experts=3, features=dict.fromkeys(MEASURES, 0.5) | {"reach": reach})).value
        for reach in (0.9, 900.0)
    )
    assert absurd == pytest.approx(most, abs=0.01)


def test_leaving_an_expert_out_changes_what_the_fit_says() -> None:
    learned = Predictor(made_up(9, 30, noise=0.01))
    low, high = (
        Point(refined=False, experts=3, features=dict.fromkeys(MEASURES, 0.5) | {"reach": reach}) for reach in (0.3, 0.8)
    )
    change, error = learned.change([(low, 0.5), (low, 0.5)], [(high, 0.5)])
    expected = 0.5 * learned.retention(high).value - learned.retention(low).value
    assert change == pytest.approx(expected, abs=1e-9) and 0 < error < 0.05


def test_too_few_merges_predict_nothing() -> None:
    assert "values of 0 sets" in why_not([])
    few = made_up(1, GROUPS - 1, merges=9)
    assert len(few) >= LEAST and why_not(few)
    with pytest.raises(ValueError, match="at least 9 of 3 are needed"):
        Predictor(few)
    assert not why_not(made_up(1, GROUPS, merges=1))


def test_intervals_are_of_this_installation_once_it_knows_enough() -> None:
    foreign, own = made_up(1, 10, noise=0.5, here=False), made_up(2, 10, noise=0.01)
    assert judged_by([*foreign, *own[:4]]) == [*foreign, *own[:4]] and judged_by([*foreign, *own]) == own
    new = made_up(3, 1)[0]
    wide, narrow = Predictor([*foreign, *own[:4]]).retention(new), Predictor([*foreign, *own]).retention(new)
    assert narrow.high - narrow.low < (wide.high - wide.low) / 2


def test_of_fewer_merges_than_a_quantile_needs_the_mean_has_no_ends() -> None:
    learned = Predictor(made_up(1, GROUPS, merges=1))
    found = learned.average(made_up(2, 1, merges=1))
    assert math.isinf(found.high) and math.isinf(found.low) and math.isfinite(learned.retention(made_up(2, 1)[0]).high)
