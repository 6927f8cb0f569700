"""The tables: worked examples by hand, and what must hold for any scores."""

import csv
import io
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from tasks.evaluation.scores import (
    CapabilityScore,
    ModelScores,
    best_experts,
    caption,
    mlflow_metric_name,
    negative_transfer,
    render,
    retention,
    scores_table,
    to_csv,
    to_markdown,
)

BASE = {"math": 0.2, "code": 0.1, "knowledge": 0.3}
EXPERTS = {
    "math-a": ("math", {"math": 0.8, "code": 0.05, "knowledge": 0.25}),
    "math-b": ("math", {"math": 0.6, "code": 0.1, "knowledge": 0.3}),
    "coder": ("code", {"math": 0.2, "code": 0.5, "knowledge": 0.2}),
}
MERGE = {"math": 0.6, "code": 0.4, "knowledge": 0.29}


def full(values: dict[str, float | None]) -> ModelScores:
    capabilities = {
        name: CapabilityScore(score=value, stderr=None, n_samples=4, tasks={}, skipped=() if value is not None else ("off",))
        for name, value in values.items()
    }
    return ModelScores(
        suite="s", suite_digest="d", capabilities=capabilities, samples={}, limit=None, lm_eval_version="0", seconds=1.0
    )


def test_retention_is_against_the_best_expert_of_each_capability() -> None:
    assert best_experts(EXPERTS) == {"math": 0.8, "code": 0.5}
    assert retention(MERGE, EXPERTS) == {"math": pytest.approx(0.75), "code": pytest.approx(0.8)}


def test_retention_where_it_is_not_defined() -> None:
    zero = {"a": ("math", {"math": 0.0, "code": 0.5}), "b": ("code", {"math": 0.1, "code": None}), "c": ("facts", {"math": 1.0})}
    assert retention({"math": 0.5, "code": 0.5, "facts": 0.5}, zero) == {}
    assert retention({"math": None, "code": 0.4}, EXPERTS) == {"code": pytest.approx(0.8)}


def test_negative_transfer() -> None:
    assert negative_transfer(MERGE, BASE) == ["knowledge"]
    assert negative_transfer({"math": 0.2, "code": None}, BASE) == []
    assert negative_transfer({"math": 0.1, "code": 0.0}, BASE) == ["math", "code"]


def test_average_is_over_measured_capabilities() -> None:
    scores = full({"math": 0.5, "code": None, "knowledge": 0.25})
    assert (scores.average, scores.measured) == (0.375, ("math", "knowledge"))
    assert (full({"code": None}).average, full({"code": None}).measured) == (None, ())


def test_table() -> None:
    table = scores_table(full(BASE), EXPERTS, {"ota": MERGE, "linear": full({"math": 0.9, "code": 0.5, "knowledge": 0.3})})
    assert list(table.index) == ["base", "math-a", "math-b", "coder", "ota", "linear"]
    assert list(table["kind"]) == ["base", "expert", "expert", "expert", "merge", "merge"]
    assert table.loc["ota", "retention"] == pytest.approx((0.75 + 0.8) / 2)
    assert table.loc["linear", "retention"] == pytest.approx((0.9 / 0.8 + 1) / 2)
    assert table.loc["base", "average"] == pytest.approx(0.2)
    assert table.loc["ota", "negative_transfer"] == 1 and table.loc["ota", "below_base"] == "knowledge"
    assert table.loc["linear", "negative_transfer"] == 0
    assert table["retention"].isna().tolist() == [True] * 4 + [False] * 2
    assert table["negative_transfer"].isna().tolist() == [True] * 4 + [False] * 2


def test_averages_of_a_table_are_over_the_same_capabilities() -> None:
    table = scores_table({"math": 0.2, "code": None}, {}, {"ota": {"math": 0.4, "code": 0.9}})
    assert table["average"].tolist() == [0.2, 0.4]
    assert "Average over 1 of 2 capabilities; not measured for every model: code." in caption(table)
    assert math.isnan(scores_table({"code": None}, {}, {}).loc["base", "average"])


def test_one_name_for_two_models_is_refused() -> None:
    with pytest.raises(ValueError, match="got twice: coder"):
        scores_table(BASE, EXPERTS, {"coder": MERGE})
    with pytest.raises(ValueError, match="got twice: base"):
        scores_table(BASE, {}, {"base": MERGE})


def test_on_screen_and_on_paper() -> None:
    table = scores_table({**BASE, "code": None}, EXPERTS, {"ota": MERGE})
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(render(table))
    screen = console.export_text()
    cells = {line.split()[0]: line.split()[1:] for line in screen.splitlines() if line.split()}
    assert cells["ota"] == ["60.0", "40.0", "29.0", "44.5", "77.5", "1"]
    assert cells["base"] == ["20.0", "–", "30.0", "25.0"]
    assert "ota: below the base on knowledge" in screen


def test_five_capabilities_fit_eighty_columns() -> None:
    names = ["math", "code", "precise_if", "general_if", "knowledge"]
    table = scores_table(
        dict.fromkeys(names, 0.1), {n: (n, dict.fromkeys(names, 1.0)) for n in names}, {"OTA + FFG": dict.fromkeys(names, 0.3)}
    )
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(render(table))
    screen = console.export_text()
    assert "…" not in screen
    assert {"knowledge", "retention", "avg", "below"} <= set(screen.split())


def test_on_paper() -> None:
    table = scores_table({**BASE, "code": None}, EXPERTS, {"ota": MERGE})
    paper = to_markdown(table).splitlines()
    assert paper[0] == "| model | math | code | knowledge | average | retention | below base |"
    assert paper[1] == "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
    assert paper[2] == "| base | 20.0 | – | 30.0 | 25.0 |  |  |"
    assert paper[6] == "| ota | 60.0 | 40.0 | 29.0 | 44.5 | 77.5 | 1 (knowledge) |"
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert rows[0]["model"] == "base" and rows[0]["code"] == "" and rows[0]["negative_transfer"] == ""
    assert (float(rows[4]["math"]), rows[4]["negative_transfer"]) == (0.6, "1")


fractions = st.dictionaries(st.sampled_from(["math", "code", "facts"]), st.none() | st.floats(0, 1), min_size=1)


@given(base=fractions, own=fractions, merged=fractions)
def test_what_holds_for_any_scores(
    base: dict[str, float | None], own: dict[str, float | None], merged: dict[str, float | None]
) -> None:
    experts = {name: (name, own) for name in own}
    assert set(retention(own, experts).values()) <= {1.0}
    assert negative_transfer(base, base) == []
    table = scores_table(base, experts, {"merge": merged})
    for name, value in merged.items():
        assert (value is None and math.isnan(table.loc["merge", name])) or table.loc["merge", name] == value
    assert len(to_markdown(table).splitlines()) >= len(table) + 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("exact_match,strict-match", "exact_match.strict-match"),
        ("pass@1,create_test", "pass_at_1.create_test"),
        ("demo/acc norm:x", "demo/acc norm:x"),
        ("größe%", "gr__e_"),
    ],
)
def test_mlflow_names(name: str, expected: str) -> None:
    assert mlflow_metric_name(name) == expected


@settings(deadline=None)  # the first example imports mlflow
@given(st.text(min_size=1))
def test_mlflow_accepts_every_name(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    safe = mlflow_metric_name(name)
    assert mlflow_metric_name(safe) == safe
    _validate_metric_name(safe)
    _validate_metric_name(f"task/{safe}")
