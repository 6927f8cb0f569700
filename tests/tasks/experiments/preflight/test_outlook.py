"""From a preflight's table to what is said of a merge: features by expert, who hurts and why, tables, sentences, JSON."""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd
import pytest

from ota_core.analysis.preflight import PREFLIGHT
from ota_core.analysis.table import Row, row
from ota_core.plan.roles import WHOLE
from tasks.experiments.preflight import page
from tasks.experiments.preflight.features import MEASURES, features, metrics, of_metrics
from tasks.experiments.preflight.outlook import Known, Outlook, outlook
from tasks.experiments.preflight.predict import Example
from tasks.pages.analysis import frame
from tests.tasks.experiments.preflight.test_predict import made_up

NAMES = ("math", "code", "noise")
SAID: dict[str, Any] = {"settings": {"refined": False}, "left_out": [], "notes": []}
CLEAN = {"math": 0.8, "code": 0.7, "noise": 0.1}
"""Reach of two experts that get on, and of one that disturbs both."""


def alone(name: str, reach: float, **more: Any) -> list[Row]:
    """An expert whose merged edit disturbs nothing beside its reach."""
    values = {"reach": reach, "disturbance": 0.2, "fit": 1 - (1 - reach) ** 2 - 0.04}
    return [row(PREFLIGHT, name, WHOLE, measure, value, 10, **more) for measure, value in values.items()]


def table(*, disturbed: float = 0.4, acts: float = 3.0, kept: float = 0.1) -> pd.DataFrame:
    """Without noise, math and code reach further by ``disturbed``. kept: noise's own reach."""
    rows: list[Row] = [row(PREFLIGHT, "", WHOLE, "lambda", 1.4, 10, variant="auto")]
    for name in NAMES:
        rows.append(row(PREFLIGHT, name, WHOLE, "norm", 1.0, 10))
        rows += alone(name, CLEAN[name] - disturbed if name != "noise" else kept)
        for left in NAMES:
            gained = CLEAN[name] if left == "noise" else CLEAN[name] - disturbed
            rows += alone(name, -0.5 if name == left else gained, variant=f"without {left}")
        for other in NAMES:
            if other != name:
                rows.append(row(PREFLIGHT, name, WHOLE, "interference", acts if other == "noise" else 0.3, 10, other=other))
    for one, other, shared in (("math", "code", 0.1), ("math", "noise", 0.2), ("code", "noise", 0.4)):
        rows.append(row(PREFLIGHT, one, WHOLE, "row_space", shared, 10, other=other))
        rows.append(row(PREFLIGHT, one, WHOLE, "sign_conflict", 0.5, 10, other=other))
    return frame(rows)


def of(examples: Sequence[Example] = (), known: Known | None = None, **numbers: float) -> Outlook:
    return outlook(table(**numbers), SAID, examples, known)


def scores(**own: float) -> Known:
    """Of base and experts, each on the capability that it is called after; the base scores 0.1 everywhere."""
    return Known(base=dict.fromkeys(own, 0.1), experts={name: (name, score) for name, score in own.items()})


def test_features_are_an_experts_own_and_means_over_the_others() -> None:
    found = features(table())
    assert found["math"] == pytest.approx(
        {"reach": 0.4, "disturbance": 0.2, "fit": 0.6, "row_space": 0.15, "interference": 1.65, "sign_conflict": 0.5}
    )
    assert found["code"]["row_space"] == pytest.approx(0.25) and found["noise"]["interference"] == pytest.approx(0.3)
    without = features(table(), "noise")
    assert without.keys() == {"math", "code"}
    assert without["math"] == pytest.approx(
        {"reach": 0.8, "disturbance": 0.2, "fit": 0.92, "row_space": 0.1, "interference": 0.3, "sign_conflict": 0.5}
    )


def test_mlflow_gives_features_back() -> None:
    logged = metrics(table())
    assert logged["preflight/lambda"] == 1.4 and logged["preflight/row_space"] == pytest.approx(0.7 / 3)
    assert of_metrics(logged, "code") == pytest.approx({name: features(table())["code"][name] for name in MEASURES})
    assert of_metrics({key: value for key, value in logged.items() if key != "preflight/reach/code"}, "code") is None


def test_without_known_merges_measures_alone_are_told() -> None:
    found = of()
    assert found.why_not and found.average is None and all(one.retention is None and one.change is None for one in found.experts)
    assert [one.name for one in found.hurting] == ["noise"] and found.hurting[0].surely
    said = " ".join(page.sentences(found))
    assert "No retention is predicted: 0 values" in said and "noise hurts: it acts on the inputs of the others 3.0 times" in said
    assert [one.name for one in of(acts=0.5).hurting] == [] and "No expert is expected to hurt." in [
        *page.sentences(of(acts=0.5))
    ]


def test_predictions_name_who_lowers_the_average() -> None:
    found = of(made_up(1, 30, noise=0.02), scores(math=1.0, code=1.0, noise=0.3), acts=0.5)
    assert found.average and found.average.low < found.average.value < found.average.high
    (worst,) = found.hurting
    assert worst.name == "noise" and worst.change and worst.change[0] > 0.1 and worst.surely and worst.change[1] < 0.05
    # What it keeps of its own capability would be missed, were the others hardly disturbed.
    assert [
        one.name
        for one in of(
            made_up(1, 30, noise=0.02), scores(math=1.0, code=1.0, noise=0.9), disturbed=0.01, acts=0.5, kept=0.6
        ).hurting
    ] == []
    table_of = page.experts_table(found)
    assert table_of.strong == [False, False, True] and "(" in table_of.cells().rows[0][1]


def test_an_expert_no_better_than_the_base_is_named_whatever_is_predicted() -> None:
    found = of(known=scores(math=1.0, code=0.1, noise=0.9), acts=0.5)
    assert [one.name for one in found.hurting] == ["code"] and "scores 10.0 % on code, no more than the base" in found.hurting[
        0
    ].hurts


def test_what_nobody_measures_weighs_nothing() -> None:
    """Of an expert without a capability in the suite nothing can be lost."""
    examples = made_up(1, 30, noise=0.02)
    known = Known(base={"math": 0.1, "code": 0.1}, experts={"math": ("math", 1.0), "code": ("code", 1.0)})
    lost, free = (
        next(one.change for one in of(examples, what, disturbed=0.0, acts=0.5, kept=0.6).experts if one.name == "noise")
        for what in (scores(math=1.0, code=1.0, noise=1.0), known)
    )
    assert lost and free and free[0] > lost[0] and free[0] == pytest.approx(0.0, abs=0.05)


def test_json_holds_everything() -> None:
    found = of(made_up(1, 3, merges=1))
    held = json.loads(json.dumps(page.to_json(found)))
    assert held["scale"] == 1.4 and held["average"]["high"] is None and held["said"] and len(held["pairs"]) == 3
    assert {one["name"] for one in held["experts"]} == set(NAMES)
    text = page.to_markdown(found, "ota rho=0.40")
    assert text.startswith("## Will it merge? ota rho=0.40") and "| math | code |" in text


def test_of_many_pairs_those_that_act_on_each_other_most_are_shown() -> None:
    names = [f"e{i}" for i in range(8)]
    rows = [row(PREFLIGHT, name, WHOLE, "norm", 1.0, 10) for name in names] + [one for name in names for one in alone(name, 0.8)]
    strength = {(a, b): i * 8 + j for i, a in enumerate(names) for j, b in enumerate(names) if i < j}
    rows += [row(PREFLIGHT, a, WHOLE, "interference", float(value), 10, other=b) for (a, b), value in strength.items()]
    shown = page.pairs_table(found := outlook(frame(rows), SAID, ()))
    assert shown is not None and "The 20 of 28 pairs with the most interference" in shown.caption[0]
    want = sorted(strength, key=lambda pair: -strength[pair])[:20]
    assert list(zip(shown.frame["expert"], shown.frame["other"], strict=True)) == want
    assert len(page.to_json(found)["pairs"]) == 28
