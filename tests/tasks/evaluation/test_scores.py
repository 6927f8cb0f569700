"""The tables: worked examples by hand, and what must hold for any scores."""

import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.evaluation.scores import (
    ModelScores,
    best_experts,
    capability_columns,
    loss_rows,
    mlflow_metric_name,
    negative_transfer,
    retention,
    rows_of,
    scores_table,
)
from tasks.pages.scores import caption
from tests.tasks.experiments.study.study_results import scores as full

BASE = {"math": 0.2, "code": 0.1, "knowledge": 0.3}
EXPERTS = {
    "math-a": ("math", {"math": 0.8, "code": 0.05, "knowledge": 0.25}),
    "math-b": ("math", {"math": 0.6, "code": 0.1, "knowledge": 0.3}),
    "coder": ("code", {"math": 0.2, "code": 0.5, "knowledge": 0.2}),
}
MERGE = {"math": 0.6, "code": 0.4, "knowledge": 0.29}


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
    assert list(table["role"]) == ["base", "expert", "expert", "expert", "merge", "merge"]
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
    assert "1 of 2" in caption(table)[1] and caption(table)[1].endswith(": code.")
    assert math.isnan(scores_table({"code": None}, {}, {}).loc["base", "average"])


def test_one_name_for_two_models_is_refused() -> None:
    with pytest.raises(ValueError, match="got twice: coder"):
        scores_table(BASE, EXPERTS, {"coder": MERGE})
    with pytest.raises(ValueError, match="got twice: base"):
        scores_table(BASE, {}, {"base": MERGE})


def test_errors_stand_beside_their_numbers_where_there_are_any() -> None:
    def of(math_error: float | None, **losses: float) -> ModelScores:
        found = full({"math": 0.5, "code": 0.25})
        measured = {
            name: one.model_copy(update={"stderr": math_error if name == "math" else 0.04})
            for name, one in found.capabilities.items()
        }
        return found.model_copy(update={"capabilities": measured, "losses": losses, "loss_stderr": dict.fromkeys(losses, 0.03)})

    table = scores_table(
        of(0.03, math=2.0, code=1.0), {"m": ("math", of(None, math=1.5))}, {"ota": of(0.03, math=1.25, code=1.5)}
    )
    assert table["math_stderr"].tolist()[::2] == [0.03, 0.03] and math.isnan(table.loc["m", "math_stderr"])
    assert table.loc["ota", "average_stderr"] == pytest.approx(0.025) and math.isnan(table.loc["m", "average_stderr"])
    # The expert has no loss on code: the average is over what all have.
    assert table["loss/average"].tolist() == [2.0, 1.5, 1.25] and table.loc["ota", "loss/code_stderr"] == 0.03
    rows, losses = rows_of(table), loss_rows(table)
    assert rows[1] == {
        "model": "m", "role": "expert", "capability": "math", "math": 0.5, "code": 0.25, "code_stderr": 0.04, "average": 0.375, "retention": None,
    }  # fmt: skip
    assert losses[1] == {
        "model": "m", "role": "expert", "loss/math": 1.5, "loss/math_stderr": 0.03, "loss/code": None, "loss/average": 1.5, "loss/average_stderr": 0.03,
    }  # fmt: skip
    plain = scores_table(BASE, EXPERTS, {"ota": MERGE})
    columns = ["role", "capability", "math", "code", "knowledge", "average", "retention", "negative_transfer", "below_base"]
    assert list(plain.columns) == columns and loss_rows(plain) == []
    assert capability_columns(pd.DataFrame(rows).assign(code=None)) == ["math", "code", "average"]


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
