"""The gate against independent references: the binomial distribution, every sign pattern, and hand-made scores."""

import itertools
import math
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.evaluation.gate import GateDecision, GateError, GateSettings, best, decide
from tasks.evaluation.pairs import sign_flips
from tasks.evaluation.scores import CapabilityScore, ModelScores
from tasks.evaluation.suites import Capability, Suite, TaskEntry
from tests.tiny_suite import edited, write_tiny_suite

ROOT = Path(__file__).parents[4]

Samples = Mapping[str, Mapping[str, Sequence[float]]]
"""Capability to task to its documents' scores."""

SUITE = Suite(
    name="s",
    include_defaults=True,
    capabilities={
        "math": Capability(tasks=(TaskEntry(task="sums", metric="acc"),)),
        "code": Capability(tasks=(TaskEntry(task="easy", metric="acc"), TaskEntry(task="hard", metric="acc", weight=3))),
    },
)


def scored(samples: Samples, *, suite: Suite = SUITE, **changes: object) -> ModelScores:
    """A model's scores as the benchmark gives them, for suites without groups."""
    capabilities = {}
    for name, tasks in samples.items():
        weights = {entry.task: entry.weight for entry in suite.capabilities[name].tasks}
        means = {task: statistics.fmean(values) for task, values in tasks.items()}
        score = math.fsum(weights[task] * mean for task, mean in means.items()) / sum(weights[task] for task in means)
        capabilities[name] = capability(score, {task: {"acc.none": mean} for task, mean in means.items()})
    return model(capabilities, {name: hashed(tasks) for name, tasks in samples.items()}, **changes)


def hashed(tasks: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    return {task: {f"{task}{i:05d}": float(v) for i, v in enumerate(values)} for task, values in tasks.items()}


def share_of_patterns(parts: Sequence[float]) -> float:
    """How many of all sign patterns have a sum as low as that of ``parts``."""
    patterns = list(itertools.product((1, -1), repeat=len(parts)))
    low = sum(sum(s * part for s, part in zip(signs, parts, strict=True)) <= sum(parts) + 1e-12 for signs in patterns)
    return low / len(patterns)


def capability(score: float | None, tasks: dict[str, dict[str, float]]) -> CapabilityScore:
    return CapabilityScore(score=score, stderr=None, n_samples=1, tasks=tasks)


def model(capabilities: Mapping[str, CapabilityScore], samples: object, **changes: object) -> ModelScores:
    values = {"suite": "s", "suite_digest": "d", "limit": None, "lm_eval_version": "0", "seconds": 1.0}
    return ModelScores(**(values | {"capabilities": capabilities, "samples": samples} | changes))


def decided(candidate: ModelScores, champion: ModelScores | None, base: ModelScores, **options: object) -> GateDecision:
    values = {"suite": SUITE} | options
    return decide("new", candidate, champion=champion, base=base, **values)  # type: ignore[arg-type]


def ones(right: int, wrong: int) -> list[float]:
    return [1.0] * right + [0.0] * wrong


# ---- the test of noise


@settings(deadline=None)  # the first example imports scipy
@given(st.integers(0, 7), st.integers(0, 6))
def test_binary_scores_give_mcnemars_exact_test(won: int, lost: int) -> None:
    parts = np.array([1.0] * won + [-1.0] * lost + [0.0] * 50) / 63
    # As many wins or fewer, of won + lost fair coins.
    expected = sum(math.comb(won + lost, k) for k in range(won + 1)) / 2 ** (won + lost)
    assert sign_flips(parts, resamples=9999, seed=0) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9))
@example([-2, -9, 11])  # adds up to nothing, which sevenths do only up to rounding
def test_any_scores_give_the_share_of_all_sign_patterns(differences: list[int]) -> None:
    seen = sign_flips(np.array(differences, dtype=float) / 7, resamples=9999, seed=3)
    assert seen == pytest.approx(share_of_patterns(differences), abs=1e-12)


@pytest.mark.parametrize(("won", "lost"), [(30, 50), (100, 100), (400, 480)])
def test_many_documents_come_near_the_binomial(won: int, lost: int) -> None:
    exact = sum(math.comb(won + lost, k) for k in range(won + 1)) / 2 ** (won + lost)
    seen = sign_flips(np.array([1.0] * won + [-1.0] * lost), resamples=9999, seed=0)
    assert seen == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 9999) + 1e-4)
    assert seen == sign_flips(np.array([-1.0] * lost + [1.0] * won), resamples=9999, seed=0), "deterministic, in any order"


def test_a_clear_fall_of_many_documents_has_the_least_p_value() -> None:
    assert sign_flips(np.array([-1.0] * 200 + [1.0] * 20), resamples=9999, seed=0) == 1 / 10_000


# ---- the decision


def test_three_losses_of_three_are_noise_and_five_are_not() -> None:
    champion = scored({"math": {"sums": ones(50, 50)}, "code": {"easy": ones(20, 20), "hard": ones(20, 20)}})
    for lost, falls in ((3, False), (4, False), (5, True)):
        sums = [0.0] * lost + ones(50 - lost, 50)
        candidate = scored({"math": {"sums": sums}, "code": {"easy": ones(40, 0), "hard": ones(40, 0)}})
        decision = decided(candidate, champion, champion)
        check = decision.checks[0]
        assert (check.capability, check.reference, check.n) == ("math", "champion", 100)
        assert check.p_value == pytest.approx(2.0**-lost)
        assert check.difference == pytest.approx(-lost / 100)
        assert check.falls_below is falls
        assert decision.promoted is not falls, "the average is far higher"
        assert any(reason.startswith("math falls below the champion: ") for reason in decision.reasons) is falls


def test_a_fall_below_the_base_alone_is_enough() -> None:
    base = scored({"math": {"sums": ones(60, 40)}, "code": {"easy": ones(0, 4), "hard": ones(0, 4)}})
    champion = scored({"math": {"sums": ones(40, 60)}, "code": {"easy": ones(1, 3), "hard": ones(1, 3)}})
    candidate = scored({"math": {"sums": ones(45, 55)}, "code": {"easy": ones(2, 2), "hard": ones(2, 2)}})
    decision = decided(candidate, champion, base)
    assert [(c.reference, c.falls_below) for c in decision.checks if c.capability == "math"] == [
        ("champion", False),
        ("base", True),
    ]
    assert not decision.promoted
    assert decision.average > decision.champion_average
    assert "math falls below the base: 45.0 % against 60.0 % on the same 100 documents (−15.00 ± 3.59 points, p = 0.0001)." in (
        decision.reasons
    )


def test_without_a_champion_the_base_is_to_be_beaten() -> None:
    base = scored({"math": {"sums": ones(40, 60)}})
    decision = decided(scored({"math": {"sums": ones(41, 59)}}), None, base)
    assert decision.promoted and decision.champion_average is None
    assert decision.reasons[0] == (
        "There is no champion yet. The average, 41.0 %, is higher than the base's, 40.0 % (+1.00 points)."
    )
    assert "No capability falls below the base by more than the noise" in decision.reasons[1]
    assert {c.reference for c in decision.checks} == {"base"}
    assert not decided(base, None, base).promoted


def test_an_average_that_is_not_higher_is_not_promoted() -> None:
    base = scored({"math": {"sums": ones(10, 90)}})
    champion = scored({"math": {"sums": ones(50, 50)}})
    same = decided(champion, champion, base)
    assert not same.promoted and "is not higher than the champion's" in same.reasons[0]
    assert not any(check.falls_below for check in same.checks)
    assert not decided(scored({"math": {"sums": ones(49, 51)}}), champion, base).promoted


def test_the_weights_and_the_paired_error_of_several_tasks() -> None:
    champion = scored({"code": {"easy": ones(5, 5), "hard": ones(5, 15)}})
    candidate = scored({"code": {"easy": [0.0, *ones(9, 0)], "hard": ones(4, 16)}})
    (check,) = [c for c in decided(candidate, champion, champion).checks if c.reference == "champion"]
    # Of the differences by hand: easy −1 once and +1 five times of 10, hard −1 once of 20; weights 1/4 and 3/4.
    assert check.difference == pytest.approx(0.25 * 0.4 - 0.75 * 0.05)
    easy, hard = [-1] + [0] * 4 + [1] * 5, [-1] + [0] * 19
    variance = 0.25**2 * statistics.variance(easy) / 10 + 0.75**2 * statistics.variance(hard) / 20
    assert check.standard_error == pytest.approx(math.sqrt(variance))
    assert check.p_value == pytest.approx(share_of_patterns([-0.025, *[0.025] * 5, -0.0375]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=40), st.randoms(use_true_random=False))
def test_equal_scores_never_fall_below_and_the_order_of_documents_is_nothing(values: list[float], rng: random.Random) -> None:
    base = scored({"math": {"sums": values}})
    check = decided(base, None, base).checks[0]
    assert (check.falls_below, check.p_value, check.difference, check.standard_error) == (False, 1.0, 0.0, 0.0)

    candidate = scored({"math": {"sums": [rng.choice([0.0, 0.5, 1.0]) for _ in values]}})
    rows = list(candidate.samples["math"]["sums"].items())
    rng.shuffle(rows)
    other = candidate.model_copy(update={"samples": {"math": {"sums": dict(rows)}}})
    assert decided(other, None, base) == decided(candidate, None, base)


def test_twenty_thousand_documents_in_bounded_memory() -> None:
    """In a process of its own, whose peak is its own."""
    program = """
import resource, numpy as np, scipy.stats
from tasks.evaluation.pairs import sign_flips
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sign_flips(np.linspace(-1.001, 1, 20_000), resamples=299, seed=0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < 120, "MiB; all flips at once take more than three times that"


# ---- groups of tasks


def group_suite(*groups: str) -> Suite:
    return SUITE.model_copy(
        update={"capabilities": {"facts": Capability(tasks=tuple(TaskEntry(task=g, metric="acc") for g in groups))}}
    )


@pytest.mark.parametrize("pooled", [True, False])
def test_a_group_is_weighed_as_its_number_says(pooled: bool) -> None:
    old, new = {"mmlu_a": ones(2, 2), "mmlu_b": ones(8, 8)}, {"mmlu_a": ones(0, 4), "mmlu_b": ones(12, 4)}

    def number(tables: dict[str, list[float]]) -> float:
        means = [statistics.fmean(v) for v in tables.values()]
        return statistics.fmean([x for v in tables.values() for x in v]) if pooled else statistics.fmean(means)

    models = []
    for tables in (new, old):
        score = capability(number(tables), {"mmlu": {"acc.none": number(tables)}})
        models.append(model({"facts": score}, {"facts": hashed(tables)}))
    check = decided(models[0], None, models[1], suite=group_suite("mmlu")).checks[0]
    assert check.difference == pytest.approx(number(new) - number(old))
    parts = [-1 / 20] * 2 + [1 / 20] * 4 if pooled else [-1 / 8] * 2 + [1 / 32] * 4
    assert check.p_value == pytest.approx(share_of_patterns(parts))


def test_two_groups_in_one_capability_are_told_apart_by_name() -> None:
    tables = {"mmlu_a": ones(1, 3), "mmlu_b": ones(2, 2), "mmlu_pro_a": ones(4, 0), "mmlu_pro_b": ones(3, 1)}
    numbers = {"mmlu": {"acc.none": 3 / 8}, "mmlu_pro": {"acc.none": 7 / 8}}
    scores = model({"facts": capability(5 / 8, numbers)}, {"facts": hashed(tables)})
    assert decided(scores, None, scores, suite=group_suite("mmlu", "mmlu_pro")).checks[0].n == 16


def test_scores_of_a_real_benchmark(tmp_path: Path) -> None:
    """Weights, hashes and numbers as lm-eval gives them."""
    from tasks.evaluation.harness import score_model
    from tasks.evaluation.suites import load_suite
    from tests.tiny_models import perturb, write_tiny_llama

    file, data = write_tiny_suite(tmp_path)
    both = "{task: tiny_sums, metric: exact_match, weight: 2}, {task: tiny_facts, metric: acc}"
    edited(file, ("{task: tiny_sums, metric: exact_match}", both))
    base = write_tiny_llama(tmp_path / "base")
    other = perturb(base, tmp_path / "other", seed=1)
    suite = load_suite(str(file))
    mine, theirs = (score_model(path, suite, data_dir=data) for path in (other, base))
    decision = decided(mine, theirs, theirs, suite=suite)
    assert [(c.capability, c.n) for c in decision.checks] == [("math", 24), ("math", 24), ("knowledge", 12), ("knowledge", 12)]
    for check in decision.checks:
        assert check.difference == mine.by_capability()[check.capability] - theirs.by_capability()[check.capability]


# ---- what cannot be compared


def refused(candidate: ModelScores, base: ModelScores, message: str, **options: object) -> None:
    with pytest.raises(GateError, match=message):
        decided(candidate, None, base, **options)


def test_what_does_not_compare_is_refused() -> None:
    base = scored({"math": {"sums": ones(2, 2)}})
    refused(base, base.model_copy(update={"suite_digest": "other"}), "'new' was scored on suite s .d, lm-eval 0.*benchmark both")
    refused(base, base.model_copy(update={"limit": 4}), "limit None, base with limit 4")
    refused(base, scored({"math": {"sums": ones(2, 3)}}), "4 documents of the candidate, 5 of the base, 4 of them the same")
    refused(
        base,
        scored({"math": {"sums": ones(2, 2)}, "code": {"easy": ones(1, 1)}}),
        "code was measured for base, but not for 'new'",
    )
    one = scored({"math": {"sums": [1.0]}})
    refused(one, one, "math has a task with 1 document")
    blank = model({"math": capability(None, {})}, {})
    refused(blank, blank, "no capability of suite s was measured")
    bare = base.model_copy(update={"samples": {"math": {}}})
    refused(bare, bare, "math holds no document's score")
    empty = base.model_copy(update={"samples": {"math": {"sums": {}}}})
    refused(empty, empty, "task sums holds no document's score")


def test_a_score_that_is_no_mean_over_documents_is_refused() -> None:
    base = scored({"math": {"sums": ones(2, 2)}})
    other = model({"math": capability(0.7, {"sums": {"acc.none": 0.7}})}, base.samples)
    refused(other, other, "documents of task sums do not give its acc")


def test_another_suites_weights_are_refused() -> None:
    base = scored({"code": {"easy": ones(2, 2), "hard": ones(1, 3)}})
    equal = tuple(entry.model_copy(update={"weight": 1.0}) for entry in SUITE.capabilities["code"].tasks)
    other = SUITE.model_copy(update={"capabilities": {"code": Capability(tasks=equal)}})
    refused(
        base, base, "weights of suite s give 'code' of the candidate a score of 0.375000, it was reported as 0.3125", suite=other
    )
    refused(
        base, base, "has no task hard", suite=SUITE.model_copy(update={"capabilities": {"code": Capability(tasks=equal[:1])}})
    )
    refused(base, base, "has no capability 'code'", suite=SUITE.model_copy(update={"capabilities": {}}))


def test_all_problems_are_told_at_once() -> None:
    base = scored({"math": {"sums": ones(2, 2)}, "code": {"easy": ones(2, 2), "hard": ones(1, 3)}})
    other = scored({"math": {"sums": ones(2, 3)}, "code": {"easy": ones(2, 1), "hard": ones(1, 3)}})
    with pytest.raises(GateError) as caught:
        decided(base, None, other)
    assert "2 problems found" in str(caught.value) and "task sums" in str(caught.value) and "task easy" in str(caught.value)


def test_settings_that_can_never_refuse_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"can never show a fall at confidence 0\.99; give at least 99"):
        GateSettings(confidence=0.99, resamples=50)
    with pytest.raises(ValidationError, match=r"greater than 0\.5"):
        GateSettings(confidence=0.5)


def test_a_stricter_confidence_lets_more_pass() -> None:
    champion, candidate = scored({"math": {"sums": ones(50, 50)}}), scored({"math": {"sums": ones(45, 55)}})
    assert decided(candidate, None, champion).checks[0].falls_below
    strict = decided(candidate, None, champion, settings=GateSettings(confidence=0.99))
    assert not strict.checks[0].falls_below and strict.confidence == 0.99


# ---- what is told


def test_numbers_and_words_of_a_decision() -> None:
    base = scored({"math": {"sums": ones(20, 80)}, "code": {"easy": ones(1, 3), "hard": ones(1, 3)}})
    champion = scored({"math": {"sums": ones(50, 50)}, "code": {"easy": ones(2, 2), "hard": ones(2, 2)}})
    candidate = scored({"math": {"sums": ones(40, 60)}, "code": {"easy": ones(4, 0), "hard": ones(4, 0)}})
    decision = decided(candidate, champion, base)
    metrics = decision.metrics()
    assert metrics["gate/promoted"] == 0 and metrics["gate/average_difference"] == pytest.approx(0.2)
    assert metrics["gate/difference/champion/math"] == pytest.approx(-0.1)
    assert metrics["gate/p_value/champion/math"] == pytest.approx(2.0**-10)
    assert set(metrics) == {"gate/promoted", "gate/average_difference"} | {
        f"gate/{what}/{which}/{name}"
        for what in ("difference", "p_value")
        for which in ("champion", "base")
        for name in ("math", "code")
    }
    assert GateDecision.model_validate_json(decision.model_dump_json()) == decision
    (check,) = [one for one in decision.checks if (one.capability, one.reference) == ("math", "champion")]
    assert check.falls_below and any("math" in reason and "−10.00 ± 3.02" in reason for reason in decision.reasons)


def test_what_was_not_measured_is_said() -> None:
    base = scored({"math": {"sums": ones(2, 2)}})
    partial = base.model_copy(update={"capabilities": base.capabilities | {"code": capability(None, {})}})
    assert decided(partial, None, partial).reasons[-1] == "Not measured, hence not compared: code."


def test_best() -> None:
    low, high = scored({"math": {"sums": ones(1, 3)}}), scored({"math": {"sums": ones(2, 2)}})
    assert best({"a": low, "b": high, "c": high}) == "b"
    with pytest.raises(GateError, match="no candidate"):
        best({})
    with pytest.raises(GateError, match="'a' was scored with limit None, b with limit 2"):
        best({"a": low, "b": high.model_copy(update={"limit": 2})})
    with pytest.raises(GateError, match="no capability was measured"):
        best({"a": model({}, {})})


def test_the_gate_knows_neither_mlflow_nor_prefect() -> None:
    program = "import sys, tasks.evaluation.gate; print([m for m in ('mlflow', 'prefect', 'boto3', 'torch', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
