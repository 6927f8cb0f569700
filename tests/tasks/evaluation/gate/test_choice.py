"""Choosing among several candidates, against plain enumeration and simulation: the best of six equal ones is not better."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.evaluation.gate import (
    GateDecision,
    GateError,
    GateSettings,
    best,
    choosing_documents,
    decide,
    decide_all,
    first_choice,
)  # fmt: skip
from tasks.evaluation.gate.choice import Split
from tasks.evaluation.pairs import max_t, paired, sign_flips
from tasks.evaluation.scores import ModelScores
from tests.tasks.evaluation.gate.test_gate import SUITE, ones, scored


def sums(values: Sequence[float]) -> ModelScores:
    return scored({"math": {"sums": values}})


def decided(candidates: dict[str, ModelScores], reference: ModelScores, **options: object) -> dict[str, GateDecision]:
    values = {"champion": None, "base": reference, "suite": SUITE} | options
    return decide_all(candidates, **values)  # type: ignore[arg-type]


# ---- the corrected test


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4))
def test_max_t_is_the_share_of_sign_patterns_whose_largest_reaches_it(rows: list[list[int]]) -> None:
    parts = np.array(rows, dtype=float)
    norms = [math.sqrt(sum(x * x for x in row)) or 1.0 for row in rows]
    seen = [sum(row) / norm for row, norm in zip(rows, norms, strict=True)]
    patterns = list(itertools.product((1, -1), repeat=6))
    largest = [
        max(sum(s * x for s, x in zip(signs, row, strict=True)) / n for row, n in zip(rows, norms, strict=True))
        for signs in patterns
    ]
    expected = [sum(one >= t - 1e-9 for one in largest) / len(patterns) for t in seen]
    assert max_t(parts, resamples=9999, seed=0) == pytest.approx(expected)


def test_one_candidate_needs_no_correction_and_a_copy_costs_nothing() -> None:
    rng = np.random.default_rng(0)
    parts = rng.choice((-1.0, 0.0, 1.0), size=11, p=(0.2, 0.3, 0.5))
    (alone,) = max_t(parts[None], resamples=9999, seed=0)
    assert alone == pytest.approx(sign_flips(-parts, resamples=9999, seed=0))
    assert max_t(np.stack([parts, parts, parts]), resamples=9999, seed=0) == pytest.approx([alone] * 3)
    assert max_t(np.zeros((2, 5)), resamples=9999, seed=0).tolist() == [1.0, 1.0]


def test_random_flips_come_near_the_exact_ones() -> None:
    parts = np.random.default_rng(1).choice((-1.0, 1.0), size=(3, 12), p=(0.35, 0.65))
    exact = max_t(parts, resamples=2**12, seed=0)
    assert max_t(parts, resamples=2**12 - 1, seed=0) == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize("several", ["held_out", "corrected", "uncorrected"])
def test_how_often_the_best_of_six_equal_candidates_is_promoted(several: str) -> None:
    """Two hundred nights on which nobody is better than the base: the two rules keep 5 %, without them most nights promote."""
    rng, promoted = np.random.default_rng(5), 0
    options = GateSettings(several=several, resamples=199, least=20)  # type: ignore[arg-type]
    for _ in range(200):
        base = sums(rng.integers(0, 2, 120).tolist())
        night = {f"c{i}": sums(rng.integers(0, 2, 120).tolist()) for i in range(6)}
        promoted += any(one.promoted for one in decided(night, base, settings=options).values())
    # 5 % of 200 nights, and three standard errors.
    assert promoted <= 10 + 3 * math.sqrt(200 * 0.05 * 0.95) if several != "uncorrected" else promoted > 150


def test_a_real_gain_passes_and_only_the_chosen_one() -> None:
    base = sums([i % 2 for i in range(400)])
    good = sums([1 if i % 4 else 0 for i in range(400)])
    same = sums([1 - i % 2 for i in range(400)])
    found = decided({"same": same, "good": good, "base again": base}, base)
    assert {name: one.promoted for name, one in found.items()} == {"same": False, "good": True, "base again": False}
    choice = found["good"].choice
    assert choice and (choice.how, choice.chosen, choice.reference, choice.holds) == ("held_out", "good", "base", True)
    assert choice.choosing + choice.confirming == 400 and 150 < choice.confirming < 250
    assert found["good"].reasons[1] == (
        f"It was chosen from 3 candidates on {choice.choosing} documents; on the {choice.confirming} that chose nothing its average is "
        f"{100 * choice.candidate_score:.1f} % (+{100 * choice.difference:.2f} ± {100 * choice.standard_error:.2f} points to the base, "
        f"p = 0.0001), which confirms it."
    )
    assert found["same"].reasons[1].startswith("Of 3 candidates good was chosen: on the ")
    assert found["good"].metrics()["gate/choice/p_value"] == choice.p_value
    assert GateDecision.model_validate_json(found["good"].model_dump_json()) == found["good"]


def test_the_numbers_of_the_confirming_documents_alone() -> None:
    """By hand, from the rule that says which documents confirm."""
    rng = np.random.default_rng(3)
    base, one, two = (rng.integers(0, 2, 300).tolist() for _ in range(3))
    found = decided({"one": sums(one), "two": sums(two)}, sums(base))
    split = Split(GateSettings(), {})
    held = [i for i in range(300) if split.confirms("math", f"sums{i:05d}")]
    choosing = [i for i in range(300) if i not in held]
    averages = {name: float(np.mean([values[i] for i in choosing])) for name, values in (("one", one), ("two", two))}
    choice = found["one"].choice
    assert choice and choice.averages == pytest.approx(averages) and choice.confirming == len(held)
    assert choice.chosen == max(averages, key=averages.__getitem__)
    gains = np.array([one[i] - base[i] for i in held]) / len(held)
    assert choice.difference == pytest.approx(float(gains.sum()))
    assert choice.p_value == sign_flips(-gains, resamples=9999, seed=0)


def test_which_documents_choose_does_not_depend_on_candidates_and_duplicates_stay_together() -> None:
    split = Split(GateSettings(held_out=0.3), {"safe": "safety"})
    names = [f"{i:016x}" for i in range(3000)]
    share = sum(split.confirms("math", name) for name in names) / len(names)
    assert share == pytest.approx(0.3, abs=0.03)
    assert all(split.chooses("math", name) == split.chooses("math", f"{name}#2") for name in names)
    assert not any(split.chooses("safe", name) for name in names), "only the tier development chooses"
    other = Split(GateSettings(held_out=0.3, seed=1), split.tiers)
    assert any(split.chooses("math", name) != other.chooses("math", name) for name in names)


def test_a_candidate_that_falls_where_it_is_chosen_gives_way_to_the_next() -> None:
    base = scored(
        {"math": {"sums": [i % 2 for i in range(200)]}, "code": {"easy": [i % 2 for i in range(200)], "hard": [1.0] * 200}}
    )
    broken = scored(
        {"math": {"sums": [1.0] * 200}, "code": {"easy": [1.0] * 200, "hard": [float(i % 3 > 0) for i in range(200)]}}
    )
    sound = scored(
        {
            "math": {"sums": [1 if i % 4 else 0 for i in range(200)]},
            "code": {"easy": [i % 2 for i in range(200)], "hard": [1.0] * 200},
        }
    )
    found = decided({"broken": broken, "sound": sound}, base)
    choice = found["broken"].choice
    assert choice and choice.averages["broken"] > choice.averages["sound"] and choice.chosen == "sound"
    assert found["sound"].promoted and not found["broken"].promoted
    assert found["broken"].reasons[1].endswith(", but fell on a capability.")


def test_too_few_documents_are_said_and_corrected_for() -> None:
    base, better = sums(ones(2, 10)), sums(ones(10, 2))
    found = decided({"a": better, "b": sums(ones(3, 9))}, base)
    a, b = found["a"].choice, found["b"].choice
    assert a and b and (a.how, a.chosen, a.choosing, a.confirming) == ("corrected", None, 12, 12)
    assert "No documents are held out, because there are too few: of the 12 of math" in a.why and a.why in found["a"].reasons[1]
    assert found["a"].promoted and a.p_value == pytest.approx(2.0**-8, abs=1e-3)
    assert not found["b"].promoted and "not more than the noise where the best of 2" in found["b"].reasons[1]


def test_what_is_chosen_before_the_gate_sees_only_the_documents_that_choose() -> None:
    split = Split(GateSettings(), {})
    lucky = [float(split.confirms("math", f"sums{i:05d}")) for i in range(200)]
    plain = [float(i % 3 == 0) for i in range(200)]
    candidates = {"lucky": sums(lucky), "plain": sums(plain)}
    assert best(candidates) == "lucky" and first_choice(candidates, SUITE, GateSettings()) == "plain"
    assert first_choice(candidates, SUITE, GateSettings(several="corrected")) == "lucky"
    assert choosing_documents(candidates["plain"], SUITE, GateSettings(least=150)) is None


def test_one_candidate_and_old_settings_decide_as_before() -> None:
    base, higher = sums(ones(40, 60)), sums(ones(41, 59))
    (alone,) = decided({"new": higher}, base).values()
    assert alone == decide("new", higher, champion=None, base=base, suite=SUITE) and alone.promoted and alone.choice is None
    two = decided({"new": higher, "old": base}, base, settings=GateSettings(several="uncorrected"))
    assert two["new"].promoted and two["new"].choice is None
    assert GateSettings(confidence=0.99).said() == {"confidence": 0.99, "resamples": 9999, "seed": 0}
    assert GateSettings(held_out=0.3, margins={"unseen": 0.01}).said().keys() == {
        "confidence",
        "resamples",
        "seed",
        "held_out",
        "margins",
    }
    with pytest.raises(ValidationError):
        GateSettings(held_out=1.0)


# ---- tiers


TIERED = SUITE.model_copy(update={
    "capabilities": SUITE.capabilities | {"code": SUITE.capabilities["code"].model_copy(update={"tier": "safety"})}
})  # fmt: skip


def test_a_tier_with_a_margin_has_to_show_that_it_is_within_it() -> None:
    def night(n: int, lost: int) -> GateDecision:
        base = scored(
            {"math": {"sums": ones(50, 50)}, "code": {"easy": ones(n, 0), "hard": ones(n, 0)}}, tiers={"code": "safety"}
        )
        new = scored(
            {"math": {"sums": ones(80, 20)}, "code": {"easy": ones(n - lost, lost), "hard": ones(n - lost, lost)}},
            tiers={"code": "safety"},
        )
        return decide("new", new, champion=None, base=base, suite=TIERED)

    few, many, worse = night(20, 0), night(2000, 10), night(2000, 80)
    assert not few.promoted and [tier.holds for tier in few.tiers] == [False]
    assert "It is not shown that safety is no more than 2 points below the base: +0.00 points on 40 documents" in few.reasons[1]
    assert many.promoted and many.tiers[0].difference == pytest.approx(-0.005) and many.tiers[0].lower_bound > -0.02
    assert "safety is no more than 2 points below the base" in many.reasons[-1]
    assert not worse.promoted and worse.metrics()["gate/lower_bound/base/safety"] < -0.04
    (code,) = [check for check in many.checks if check.capability == "code"]
    assert code.p_value < 0.05 and not code.falls_below, "a fall within the margin is allowed"


def test_margins_of_tiers_that_are_not_there_are_refused() -> None:
    base = sums(ones(2, 2))
    with pytest.raises(GateError, match=r"gate.margins names unseen, but suite s has the tiers development"):
        decide("new", base, champion=None, base=base, suite=SUITE, settings=GateSettings(margins={"unseen": 0.1}))
    strict = decide(
        "new", sums(ones(3, 1)), champion=None, base=base, suite=SUITE, settings=GateSettings(margins={"development": 0.0})
    )
    assert not strict.promoted and strict.tiers[0].tier == "development"


@pytest.mark.parametrize("n", [40, 200])
def test_how_often_a_tier_at_its_margin_passes(n: int) -> None:
    """Candidates that are lower by just the margin: at 95 % confidence at most about 5 % of them may pass."""
    rng, margin, passed, nights = np.random.default_rng(2), 0.1, 0, 2000
    for _ in range(nights):
        # Won on 5 % of documents, lost on 15 %.
        gains = rng.choice((1.0, -1.0, 0.0), size=n, p=(0.05, 0.15, 0.8))
        base = sums(np.where(gains < 0, 1.0, 0.0).tolist())
        new = sums(np.where(gains > 0, 1.0, 0.0).tolist())
        passed += paired(SUITE, ["math"], "base", new, base).lower_bound(0.95) >= -margin
    assert passed / nights <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / nights)


def test_other_tiers_choose_nothing_and_all_their_documents_confirm() -> None:
    base = scored(
        {"math": {"sums": ones(100, 100)}, "code": {"easy": ones(100, 100), "hard": ones(100, 100)}}, tiers={"code": "safety"}
    )
    gain = scored(
        {"math": {"sums": ones(180, 20)}, "code": {"easy": ones(100, 100), "hard": ones(100, 100)}}, tiers={"code": "safety"}
    )
    found = decided({"a": gain, "b": base}, base, suite=TIERED)
    choice = found["a"].choice
    assert choice and choice.choosing < 130 and choice.choosing + choice.confirming == 200
    assert [tier.n for tier in found["a"].tiers] == [400]
