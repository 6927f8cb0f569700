"""The trade-offs between capabilities that a search found: trials that no other beats in every capability, as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd

from tasks.experiments.search.search import Trial, Tuned
from tasks.pages.pictures import style

WINNER, GIVEN, FRONT, BEATEN = "the winner", "the recipe as given", "beaten by no trial in everything", "beaten"
_KINDS = [WINNER, GIVEN, FRONT, BEATEN]
_COLOURS = alt.Color(
    "kind:N", title=None, sort=_KINDS, legend=alt.Legend(symbolOpacity=1),
    scale=alt.Scale(domain=_KINDS, range=[style.CATEGORIES[1], style.INK, style.CATEGORIES[0], "#c4c4c4"]),
)  # fmt: skip


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Of the trials on all documents those that no other equals or exceeds in every capability, and exceeds in one (Pareto)."""
    whole = [one for one in trials if one.complete]

    def beats(other: Trial, one: Trial) -> bool:
        pairs = [(other.last[name], one.last[name]) for name in one.last]
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [one for one in whole if not any(beats(other, one) for other in whole)]


def rows_of(tuned: Tuned) -> pd.DataFrame:
    """A row a capability of every trial on all documents: ``trial``, ``capability``, ``score`` (percent), ``average`` (percent), ``kind``
    (of the four), ``on_front``."""
    kept = {one.number for one in front(tuned.trials)}
    rows = []
    for one in tuned.trials:
        kind = WINNER if one is tuned.best else GIVEN if one is tuned.start else FRONT if one.number in kept else BEATEN
        for name, value in one.last.items() if one.complete else ():
            rows.append([one.number, name, 100 * value, 100 * one.average, kind, one.number in kept])
    return pd.DataFrame(rows, columns=["trial", "capability", "score", "average", "kind", "on_front"])


def trade_offs(tuned: Tuned) -> alt.LayerChart | alt.FacetChart:
    """Two capabilities: one against the other. More: a line a trial across all of them; where lines of the front cross, one capability is
    bought with another. Floors are short bars."""
    rows, names = rows_of(tuned), list(tuned.best.last)
    return _plane(rows, names, tuned) if len(names) == 2 else _lines(rows, names, tuned)


def _lines(rows: pd.DataFrame, names: list[str], tuned: Tuned) -> alt.LayerChart | alt.FacetChart:
    x = alt.X(
        "capability:N", title=None, sort=names, axis=alt.Axis(labelAngle=0, grid=True), scale=alt.Scale(type="point", padding=0.3)
    )
    y = alt.Y("score:Q", title="score, validation (%)", scale=alt.Scale(zero=False))
    tips = ["trial:Q", "capability:N", alt.Tooltip("score:Q", format=".1f"), alt.Tooltip("average:Q", format=".2f"), "kind:N"]
    layers = []
    for kind, width, opacity in ((BEATEN, 1, 0.55), (FRONT, 1.8, 0.75), (GIVEN, 2, 1), (WINNER, 3, 1)):
        own = rows[rows["kind"] == kind]
        dash = [5, 4] if kind == GIVEN else [1, 0]
        line = alt.Chart(own).mark_line(strokeWidth=width, opacity=opacity, strokeDash=dash)
        points = alt.Chart(own).mark_point(filled=True, size=34, opacity=opacity)
        layers += [mark.encode(x=x, y=y, color=_COLOURS, detail="trial:N", tooltip=tips) for mark in (line, points)]
    layers += _floors(
        pd.DataFrame([[name, 100 * value] for name, value in tuned.best.floors.items()], columns=["capability", "score"]), x, y
    )
    return alt.layer(*layers).properties(width=max(300, 110 * len(names)), height=320, title=_TITLE)


def _floors(floors: pd.DataFrame, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    if floors.empty:
        return []
    return [alt.Chart(floors).mark_tick(thickness=3, size=26, color=style.INK, orient="horizontal").encode(x=x, y=y)]


def _plane(rows: pd.DataFrame, names: list[str], tuned: Tuned) -> alt.LayerChart | alt.FacetChart:
    wide = rows.pivot(index=["trial", "average", "kind", "on_front"], columns="capability", values="score").reset_index()
    wide = wide.rename(columns={names[0]: "x", names[1]: "y"})
    x, y = (
        alt.X("x:Q", title=f"{names[0]} (%)", scale=alt.Scale(zero=False)),
        alt.Y("y:Q", title=f"{names[1]} (%)", scale=alt.Scale(zero=False)),
    )
    stairs = alt.Chart(wide[wide["on_front"]]).mark_line(interpolate="step-before", color=style.CATEGORIES[0], opacity=0.5)
    tips = [
        "trial:Q",
        alt.Tooltip("x:Q", title=names[0], format=".1f"),
        alt.Tooltip("y:Q", title=names[1], format=".1f"),
        "kind:N",
    ]
    points = alt.Chart(wide).mark_point(filled=True, size=90, opacity=0.9).encode(x=x, y=y, color=_COLOURS, tooltip=tips)
    layers = [stairs.encode(x=x, y=y, order="x:Q"), points]
    for i, name in enumerate(names):
        if (floor := tuned.best.floors.get(name)) is not None:
            rule = alt.Chart(pd.DataFrame({"xy"[i]: [100 * floor]})).mark_rule(color="#888888", strokeDash=[4, 3])
            layers.append(rule.encode(**{"xy"[i]: f"{'xy'[i]}:Q"}))
    return alt.layer(*layers).properties(width=420, height=320, title=_TITLE)


_TITLE = "What one capability costs another"
