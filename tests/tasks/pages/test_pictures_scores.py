"""The pictures of scores show the table's numbers, and retention as the tables of scores count it."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd
import pytest

from ota_core.errors import OtaError
from tasks.evaluation.scores import retention
from tasks.pages.pictures.picture import Picture, spec
from tasks.pages.pictures.scores import pictures_of_scores
from tests.tasks.pages.analysis_table import EXPERTS, score_rows
from tests.tasks.pages.page_reader import svg


def data(picture: Picture) -> list[dict[str, Any]]:
    (rows,) = spec(picture.chart)["datasets"].values()
    return rows


def test_every_score_with_its_error_and_role() -> None:
    rows = score_rows()
    drawn = data(pictures_of_scores(rows)["scores"])
    found = {(r["model"], r["capability"]): (r["score"], r["stderr"], r["face"]) for r in drawn}
    assert set(found) == {(row["model"], name) for row in rows for name in (*EXPERTS, "average")}
    for row in rows:
        for name in EXPERTS:
            own = row["role"] == "expert" and row["capability"] == name
            face = "expert on its own capability" if own else row["role"]
            assert found[row["model"], name] == (row[name], row[f"{name}_stderr"], face)
        assert found[row["model"], "average"][:2] == (row["average"], row["average_stderr"])
    for r in drawn:
        assert r["base"] == rows[0][r["capability"]]
        if r["stderr"] is not None:
            assert (r["low"], r["high"]) == pytest.approx((r["score"] - r["stderr"], r["score"] + r["stderr"]))


def test_models_stand_in_the_order_of_their_roles() -> None:
    rows = score_rows()
    drawn = svg(pictures_of_scores(rows[:1:-1] + rows[:2])["scores"].chart)  # the merge first, the base last but one
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", drawn)
    order = ["base", "knowledge", "general_if", "precise_if", "code", "math", "ota rho=0.40 rank1"]
    assert any(texts[i : i + len(order)] == order for i in range(len(texts)))
    assert {"accuracy", f"{100 * rows[0]['math']:.1f}%"} <= set(texts)


def test_retention_is_that_of_the_tables() -> None:
    rows = score_rows(merges=("one", "two"))
    scores = {row["model"]: {name: row[name] for name in EXPERTS} for row in rows}
    experts = {name: (name, scores[name]) for name in EXPERTS}
    drawn = data(pictures_of_scores(rows)["retention"])
    for merge in ("one", "two"):
        assert {r["capability"]: r["retention"] for r in drawn if r["model"] == merge} == pytest.approx(
            retention(scores[merge], experts)
        )
    assert {r["capability"]: r["base"] for r in drawn} == pytest.approx({n: scores["base"][n] / scores[n][n] for n in EXPERTS})


def test_of_two_experts_on_one_capability_the_best_counts() -> None:
    rows = score_rows(experts=["math"])
    rows.insert(1, {**rows[1], "model": "math2", "math": 0.999})
    (bar,) = data(pictures_of_scores(rows)["retention"])
    assert bar["retention"] == pytest.approx(rows[-1]["math"] / 0.999)


def test_what_was_not_measured_says_so() -> None:
    rows = score_rows(experts=["math", "code"])
    rows[1] |= {"math": None, "math_stderr": None}
    pictures = pictures_of_scores(rows)
    assert svg(pictures["scores"].chart).count(">not measured<") == 1
    assert [r["capability"] for r in data(pictures["retention"])] == ["code"]  # there is no expert's score on math


def test_without_a_base_nothing_is_drawn_for_it() -> None:
    pictures = pictures_of_scores(score_rows()[1:])
    assert "base" not in pictures["scores"].caption
    assert all(r["base"] is None for r in data(pictures["retention"]))
    assert ">base<" not in svg(pictures["scores"].chart) and svg(pictures["retention"].chart)


def test_a_table_of_base_and_experts_has_no_retention() -> None:
    assert list(pictures_of_scores(score_rows(merges=()))) == ["scores"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "lacks the columns"),
        ([{"model": "a", "role": "teacher", "math": 0.5}], "roles \\['teacher'\\]"),
        ([{"model": "a", "role": "base", "math": None}], "no model of the table has a score \\(math\\)"),
    ],
)
def test_tables_that_cannot_be_drawn_say_why(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(OtaError, match=message):
        pictures_of_scores(rows)


def test_a_data_frame_will_do() -> None:
    rows = score_rows()
    assert data(pictures_of_scores(pd.DataFrame(rows))["scores"]) == data(pictures_of_scores(rows)["scores"])
