"""The report of a merge says what is in it, loads nothing, and runs nothing that a recipe or a name brings along."""

from __future__ import annotations

import json
import math
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import ValidationError

from tasks.evaluation.gate import Check, GateDecision
from tasks.pages.report import MergeReport, report_html
from tasks.tracking.run import InputRef
from tests.tasks.pages.analysis_table import EXPERTS, analysis_table, score_rows
from tests.tasks.pages.page_reader import find, loads, specs

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
RECORD = {
    "fingerprint": "f" * 32,
    "results": {"densities": {"math": {"kept": 1234, "total": 10000, "density": 0.1234}}},
    "provenance": {"host": "h"},
}


def gate(promoted: bool, reason: str = "The average, 60.0 %, is higher.") -> GateDecision:
    check = Check(
        capability="math", reference="champion", n=200, candidate_score=0.5, reference_score=0.625, difference=-0.125,
        standard_error=0.0125, p_value=0.004, falls_below=not promoted,
    )  # fmt: skip
    return GateDecision(
        candidate="ota", promoted=promoted, reasons=(reason, "Second reason."), average=0.6, champion_average=0.5, base_average=0.2,
        suite="demo", suite_digest="d", confidence=0.95, checks=(check,),
    )  # fmt: skip


def report(**more: Any) -> MergeReport:
    inputs = [InputRef(name="base", source="s3://b/base", digest="xxh3:0", role="base")]
    inputs += [InputRef(name=name, source=f"s3://b/{name}", digest=f"xxh3:{name}", role="expert") for name in EXPERTS]
    parts: dict[str, Any] = {
        "name": "ota math+code", "method": "ota", "recipe_yaml": "merge_method: ota\nmodels:\n  - model: a\n", "record": RECORD,
        "inputs": tuple(inputs), "created": datetime(2026, 1, 2, 3, 4, tzinfo=timezone(timedelta(hours=1))),
        "scores": tuple(score_rows()),
    }  # fmt: skip
    return MergeReport(**parts | more)


def verdict(html: str) -> tuple[str, str]:
    """(mood, text)."""
    (found,) = [one for one in find(html, "p") if one.attributes.get("class", "").startswith("verdict")]
    return found.attributes["class"].removeprefix("verdict").strip(), found.text


@pytest.fixture(scope="module")
def full() -> str:
    return report_html(
        report(
            analysis=analysis_table(layers=2), analysis_notes=("Taken over all elements.",), gate=gate(True),
            links={"MLflow run": "https://mlflow/#/runs/1"}, versions={"ota-merging": "0.1.0"}, model_uri="s3://m", model_digest="xxh3:m",
        )
    )  # fmt: skip


def test_it_holds_every_part(full: str) -> None:
    assert [one.text for one in find(full, "h2")] == ["Scores", "The gate's decision", "Analysis", "Recipe", "Inputs", "Record"]
    assert [one.text for one in find(full, "h1")] == ["ota math+code"]
    header = find(full, "dl")[0].text
    for said in ("2026-01-02 02:04 UTC with ota-merging 0.1.0", "s3://m", "xxh3:m", "f" * 32, "MLflow run"):
        assert said in header
    assert find(full, "pre", id="recipe")[0].text == "merge_method: ota\nmodels:\n  - model: a"
    assert json.loads(find(full, "pre")[1].text) == RECORD
    assert "open" not in find(full, "details")[0].attributes
    assert {"Taken over all elements.", "Second reason."} <= {one.text for one in find(full, "p") + find(full, "li")}
    assert len(specs(full)) == 13


def test_it_loads_nothing_and_stays_small(full: str) -> None:
    assert loads(full) == []
    assert {one.attributes["href"] for one in find(full, "a")} == {
        "https://mlflow/#/runs/1",
        *(f"#part-{i}" for i in range(1, 7)),
    }
    assert len(full) < 2_000_000


def test_tables_tell_the_numbers(full: str) -> None:
    rows = [one.text for one in find(full, "tr")]
    merge = score_rows()[-1]
    cells = [f"{100 * merge[name]:.1f} ± {100 * merge[f'{name}_stderr']:.1f}" for name in (*EXPERTS, "average")]
    assert f"ota rho=0.40 rank1{''.join(cells)}80.0none" in rows
    assert "mathchampion20050.062.5−12.50 ± 1.250.004no" in rows
    assert "math1,23410,00012.34" in rows
    assert "mathexperts3://b/mathxxh3:math" in rows
    assert [one.text for one in find(full, "tr", **{"class": "strong"})] == [row for row in rows if row.startswith("ota rho")]


def test_losses_stand_below_the_scores_where_the_suite_measures_them() -> None:
    losses = tuple(
        {"model": model, "role": role, "loss/math": value, "loss/math_stderr": 0.01, "loss/average": value}
        for model, role, value in (("base", "base", 2.0), (EVIL, "merge", 1.5))
    )
    html = report_html(report(losses=losses))
    assert {"modelmathaverage", "base2.000 ± 0.0102.000"} <= {one.text for one in find(html, "tr")}
    assert find(html, "img") == [] and "bits per byte" in html and "bits per byte" not in report_html(report())


def test_it_says_what_was_measured_and_on_how_many_documents() -> None:
    html = report_html(report(suite="demo", documents={"math": 1200, "code": 5}))
    (suite,) = [one.text for one in find(html, "p") if one.text.startswith("Suite")]
    assert all(part in suite for part in ("demo", "math 1,200", "code 5")) and "a quick look" not in html
    html = report_html(report(suite="demo", documents={"math": 5}, limit=5))
    assert [one.text for one in find(html, "p", **{"class": "bad-text"})] == ["5 documents per task: a quick look"]
    assert verdict(html)[1].endswith("5 documents per task: a quick look.")
    assert "1 document per task" in report_html(report(limit=1))


def test_it_says_why_there_is_no_analysis() -> None:
    html = report_html(report(unanalysed=EVIL))
    assert [one.text for one in find(html, "h2")][1:3] == ["Analysis", "Recipe"] and find(html, "img") == []
    assert [one.text for one in find(html, "p", **{"class": "bad-text"})] == [
        "The merge is complete, but its experts could not be analysed."
    ]
    assert f"Reason: {EVIL}" in [one.text for one in find(html, "p")]


def test_nothing_of_a_name_or_a_recipe_becomes_html() -> None:
    rows = score_rows(merges=(EVIL,))
    rows[1]["model"] = f"{EVIL}2"
    table = analysis_table(layers=1, experts=[EVIL, "b"])
    html = report_html(
        report(
            name=f"a+{EVIL}", method=EVIL, recipe_yaml=EVIL, record={"fingerprint": EVIL, "x": EVIL}, scores=tuple(rows), analysis=table,
            analysis_notes=(EVIL,), gate=gate(False, EVIL), model_uri=EVIL, links={EVIL: f"https://x/{EVIL}"},
            versions={EVIL: EVIL}, inputs=(InputRef(name=EVIL, source=EVIL, digest=EVIL, role="expert"),),
        )
    )  # fmt: skip
    assert find(html, "img") == []
    scripts = [one for one in find(html, "script") if "type" not in one.attributes]
    assert len(scripts) == 2 and "alert(1)" not in "".join(one.text for one in scripts)
    assert find(html, "pre", id="recipe")[0].text == EVIL
    assert find(html, "h1")[0].text == f"a+{EVIL}"
    assert any(row.get("expert") == EVIL for spec in specs(html) for rows in spec["datasets"].values() for row in rows)


def test_the_same_report_gives_the_same_bytes() -> None:
    once, again = (report_html(report(analysis=analysis_table(layers=1, experts=["a", "b"]))) for _ in range(2))
    assert once == again


def test_a_bare_merge_says_that_nobody_measured_it() -> None:
    html = report_html(report(scores=(), record={}))
    assert verdict(html)[0] == "" and "Not benchmarked" in verdict(html)[1]
    assert [one.text for one in find(html, "h2")] == ["Recipe", "Inputs", "Record"]
    assert len(html) < 30_000  # no chart, no scripts for charts


def scores(
    merge: float, code: float = 0.9, base: dict[str, float] | None = None, error: float | None = None
) -> tuple[dict[str, Any], ...]:
    """A base and a merge on math and code, all with the same standard error, where there is one."""
    before = base or {"math": 0.3, "code": 0.3}
    rows = []
    for role, of, retention in (("base", before, None), ("merge", {"math": merge, "code": code}, 0.75)):
        row: dict[str, Any] = {
            "model": role,
            "role": role,
            "capability": None,
            **of,
            "average": sum(of.values()) / 2,
            "retention": retention,
        }
        errors = {} if error is None else {"math": error, "code": error, "average": error / math.sqrt(2)}
        rows.append(row | {f"{name}_stderr": value for name, value in errors.items()})
    return tuple(rows)


@pytest.mark.parametrize(("merge", "mood", "average", "difference", "fallen"), [
    (0.5, "good", "70.0", "40.0 points above", "no capability"), (0.2, "bad", "55.0", "25.0 points above", "math"),
])  # fmt: skip
def test_the_verdict_compares_with_the_base(merge: float, mood: str, average: str, difference: str, fallen: str) -> None:
    found, said = verdict(report_html(report(scores=scores(merge))))
    assert found == mood and all(part in said for part in (average, difference, "75.0", f"below the base on {fallen}"))


@pytest.mark.parametrize(("math_score", "error", "mood", "fallen"), [
    (0.25, 0.05, "", "no more than the noise on math"), (0.25, 0.01, "bad", "on math"), (0.3, 0.05, "good", "on no capability"),
])  # fmt: skip
def test_a_fall_within_the_noise_is_no_bad_news(math_score: float, error: float, mood: str, fallen: str) -> None:
    """0.05 below the base; the noise is 1.645 · √2 standard errors: 0.116 or 0.023."""
    html = report_html(report(scores=scores(math_score, code=0.92, base={"math": 0.3, "code": 0.9}, error=error)))
    found = verdict(html)
    assert found[0] == mood and found[1].endswith(f"{fallen}.")
    assert ("math (within the noise)" in html) == (mood == "")


def test_an_average_below_the_bases_is_bad_only_beyond_the_noise() -> None:
    for error, mood in ((None, "bad"), (0.2, "")):
        rows = scores(0.2, code=0.8, base={"math": 0.3, "code": 0.9}, error=error)
        assert verdict(report_html(report(scores=rows)))[0] == mood


def test_the_gate_has_the_first_word() -> None:
    mood, said = verdict(report_html(report(scores=scores(0.5), gate=gate(False))))
    assert mood == "bad" and said.startswith(f"Kept as challenger. {gate(False).reasons[0]}")
    assert verdict(report_html(report(scores=(), gate=gate(True))))[0] == "good"


def test_without_a_base_nothing_is_compared_with_it() -> None:
    mood, said = verdict(report_html(report(scores=scores(0.5)[1:])))
    assert (mood, "base" in said) == ("", False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"links": {"x": "javascript:alert(1)"}}, "begins with http"),
        ({"created": datetime(2026, 1, 1)}, "without a time zone"),
        ({"nonsense": 1}, "Extra inputs"),
    ],
)
def test_what_cannot_be_shown_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        report(**wrong)
