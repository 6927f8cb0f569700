"""Tiers: capabilities of a suite that are looked at and do not decide, their averages, and that nothing changes where none is named."""

import math
from pathlib import Path

import pytest

from tasks.evaluation.comparison import tier_rows
from tasks.evaluation.harness import score_model
from tasks.evaluation.scores import ModelScores, scores_table
from tasks.evaluation.subject import Subject
from tasks.evaluation.suites import Suite, SuiteError, load_suite, suite_digest
from tests.tasks.experiments.study.study_results import scores as full
from tests.tiny_suite import edited

FACTS = "knowledge: {tasks: [{task: tiny_facts, metric: acc}]}"


def with_tiers(values: dict[str, float | None], **tiers: str) -> ModelScores:
    return ModelScores.model_validate(full(values).model_dump() | {"tiers": tiers})


def test_averages_are_over_what_is_for_development() -> None:
    scores = with_tiers({"math": 0.5, "code": 0.25, "toxic": 1.0, "german": None}, toxic="safety", german="multilingual")
    assert (scores.average, scores.measured) == (0.375, ("math", "code", "toxic"))
    assert scores.by_tier() == {"development": ("math", "code"), "safety": ("toxic",)}
    assert scores.objective() == {"math": 0.5, "code": 0.25}
    table = scores_table(scores, {}, {"ota": with_tiers({"math": 0.1, "code": 0.3, "toxic": 0.0}, toxic="safety")})
    assert table["average"].tolist() == [0.375, pytest.approx(0.2)] and table["toxic"].tolist() == [1.0, 0.0]
    # What was to be for development and was not measured is not made up for by another tier; where none is, all decide.
    assert with_tiers({"code": None, "toxic": 1.0}, toxic="safety").average is None
    assert with_tiers({"toxic": 1.0, "refusal": 0.5}, toxic="safety", refusal="safety").average == 0.75


def test_rows_of_tiers_are_over_what_all_models_were_measured_on() -> None:
    tiers = {"toxic": "safety", "refusal": "safety", "german": "multilingual"}
    found = {
        "base": with_tiers({"math": 0.5, "toxic": 1.0, "refusal": 0.5, "german": 0.1}, **tiers),
        "merged": with_tiers({"math": 0.7, "toxic": 0.8, "refusal": 0.5, "german": None}, **tiers),
    }
    errors = {"toxic": 0.03, "refusal": 0.04}
    found["base"] = found["base"].model_copy(
        update={
            "capabilities": {
                name: one.model_copy(update={"stderr": errors.get(name)}) for name, one in found["base"].capabilities.items()
            }
        }
    )
    subjects = {key: Subject(name=name, role=role, path=None, digest=key)
                for key, name, role in (("base", "base", "base"), ("merged", "ota", "merge"))}  # fmt: skip
    rows = tier_rows(found, subjects)
    assert rows[["model", "role", "tier", "score", "capabilities"]].values.tolist() == [
        ["base", "base", "development", 0.5, 1], ["ota", "merge", "development", 0.7, 1],
        ["base", "base", "safety", 0.75, 2], ["ota", "merge", "safety", 0.65, 2],
    ]  # fmt: skip
    assert rows["score_stderr"][2] == pytest.approx(0.025) and math.isnan(rows["score_stderr"][0])
    assert tier_rows({}, {}).empty


def test_a_task_of_another_tier_is_a_capability_of_its_own(model: Path, tiny: tuple[Path, Path]) -> None:
    plain = load_suite(str(tiny[0]))
    both = FACTS.replace("metric: acc}]", "metric: acc, tier: safety}, {task: tiny_sums, metric: exact_match}]")
    suite = edited(tiny[0], (FACTS, both))
    assert {name: (one.tier, [entry.task for entry in one.tasks]) for name, one in suite.capabilities.items()} == {
        "math": ("development", ["tiny_sums"]),
        "knowledge-safety": ("safety", ["tiny_facts"]),
        "knowledge": ("development", ["tiny_sums"]),
    }
    assert Suite.model_validate_json(suite.model_dump_json()) == suite
    scores = score_model(model, suite, data_dir=tiny[1], limit=4)
    assert scores.tiers == {"knowledge-safety": "safety"}
    assert scores.by_tier() == {"development": ("math", "knowledge"), "safety": ("knowledge-safety",)}
    assert suite_digest(suite) != suite_digest(plain)
    with pytest.raises(SuiteError, match="become the capability 'knowledge-safety', which is listed as well"):
        edited(tiny[0], ("capabilities:\n", f"capabilities:\n  {FACTS.replace('knowledge', 'knowledge-safety')}\n"))
    with pytest.raises(SuiteError, match="tier"):
        edited(tiny[0], (both, FACTS.replace("acc}]", "acc}], tier: saftey")))


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("public", "cfe978c9e718e6c2c4ae0919634361b8"),
        ("demo", "d1ebf212a25ba32a3da00fd9dfa21dd2"),
        ("real-validation", "7143e1e06dca2106831558e8bb8b6198"),
    ],
)
def test_suites_without_the_later_keys_keep_their_digests(name: str, digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded before there were tiers; a change of the suite itself, of its task files or of lm-eval changes them rightly."""
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.4.13")
    assert suite_digest(load_suite(name)) == digest
