"""Pictures of a search: how its best average grew with what was spent, and which densities and λ the good trials have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from tasks.experiments.search.search import Tuned
from tasks.experiments.search.space import Dimension, Options
from tasks.pages.pictures import style

HOLDS, MISSES, STOPPED = "holds all floors", "misses a floor", "stopped early"
_STATES = alt.Scale(domain=[HOLDS, MISSES, STOPPED], range=[style.CATEGORIES[0], style.CATEGORIES[1], "#999999"])
_SHAPES = alt.Scale(domain=[HOLDS, MISSES, STOPPED], range=["circle", "triangle-up", "cross"])
COLUMNS = 3
_PERCENT = alt.Tooltip("average:Q", format=".2f", title="average, %")


def table_of(tuned: Tuned) -> pd.DataFrame:
    """One row a trial: number, origin, state, evaluations spent until then, documents, scores, average, violation, best so far, values.

    ``average`` is in percent, as is ``best``: the best average of trials on all documents under the floors, missing before there is one.
    """
    rows: list[dict[str, Any]] = []
    spent, best = 0.0, None
    top = max(limit for trial in tuned.trials for limit in trial.scores)
    for trial in tuned.trials:
        spent += sum(limit / top for limit in trial.scores)
        state = STOPPED if not trial.complete else MISSES if trial.shortfall else HOLDS
        if state == HOLDS:
            best = max(best or 0.0, 100 * trial.average)
        scores = {f"score/{name}": value for name, value in trial.last.items()}
        rows.append(
            {"trial": trial.number, "origin": trial.origin, "state": state, "spent": spent, "documents": max(trial.scores),
             "average": 100 * trial.average, "violation": trial.violation, "best": best, **scores, **trial.values}
        )  # fmt: skip
    return pd.DataFrame(rows)


def best_so_far(tuned: Tuned) -> alt.LayerChart:
    """Average over the evaluations spent: every trial a point, the best of those that hold the floors a line."""
    table = table_of(tuned)
    x = alt.X("spent:Q", title="evaluations spent (on all documents)")
    points = _trials(
        table[["spent", "average", "state", "trial", "documents", "origin"]], x, "average score, validation (%)",
        ["trial:Q", "origin:N", _PERCENT, "documents:Q", "state:N"],
    )  # fmt: skip
    line = (
        alt.Chart(table[["spent", "best"]].dropna()).mark_line(interpolate="step-after", color=style.INK).encode(x=x, y="best:Q")
    )
    start = pd.DataFrame({"start": [100 * tuned.start.average], "label": ["the recipe as given"]})
    rule = alt.Chart(start).mark_rule(color="#888888", strokeDash=[4, 3]).encode(y="start:Q")
    text = (
        alt.Chart(start)
        .mark_text(align="right", dy=-7, fontSize=12, color="#555555")
        .encode(x=alt.value(556), y="start:Q", text="label:N")
    )
    return (line + points + rule + text).properties(width=560, height=260, title="Best average under the floors")


def _trials(rows: pd.DataFrame, x: alt.X, title: str, tooltip: list[Any]) -> alt.Chart:
    """A point a trial, at its average."""
    return alt.Chart(rows).mark_point(opacity=0.85).encode(
        x=x, y=alt.Y("average:Q", title=title, scale=alt.Scale(zero=False)), tooltip=tooltip,
        color=alt.Color("state:N", title=None, scale=_STATES), shape=alt.Shape("state:N", title=None, scale=_SHAPES),
    )  # fmt: skip


def values_against_average(tuned: Tuned, dimensions: Sequence[Dimension]) -> alt.ConcatChart:
    """A panel for each choice, density, λ or weight: its value against the average, of every trial that had it."""
    table = table_of(tuned)
    panels = []
    for one in dimensions:
        if one.name not in table:  # of a method that no trial had
            continue
        rows = table[["average", "state", "trial"]].assign(value=table[one.name]).dropna()
        title, kind = _title(one.name), "value:N" if isinstance(one.within, Options) else "value:Q"
        if isinstance(one.within, Options):
            x = alt.X(kind, title=title, axis=alt.Axis(labelAngle=0), scale=alt.Scale(domain=list(one.within.words)))
        else:
            scale = alt.Scale(
                type="log" if one.within.log else "linear", domain=[one.within.low, one.within.high], nice=False, zero=False
            )
            x = alt.X(kind, title=title, scale=scale)
        marks = _trials(rows, x, "average (%)", ["trial:Q", alt.Tooltip(kind, title=title), _PERCENT, "state:N"])
        best = alt.Chart(rows[rows["trial"] == tuned.best.number]).mark_point(
            size=220, filled=False, stroke=style.INK, strokeWidth=2
        )
        panels.append((marks + best.encode(x=kind, y="average:Q")).properties(width=style.PANEL, height=180))
    return alt.concat(*panels, columns=COLUMNS).properties(title="What the trials chose (ring: the winner)")


def _title(name: str) -> str:
    key, _, expert = name.partition("/")
    label = {"lambda": "scale λ", "t": "position t"}.get(key, key.replace("_", " "))
    return f"{label} of {expert}" if expert else label
