"""A leaderboard as one picture: a row per merge, its average with the interval, and its capabilities as cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt

from tasks.pages.pictures import style
from tasks.pages.tables import PERCENT

if TYPE_CHECKING:
    import pandas as pd

    from tasks.experiments.leaderboard.leaderboard import Leaderboard

_ROW = 26
_CELL = 62
_WIDE, _NARROW = 330, 240
"""Width of the averages, with few and with many capabilities beside them."""
_LABELS = alt.Axis(labelLimit=380, ticks=False, domain=False)


def leaderboard_chart(board: Leaderboard) -> alt.TopLevelMixin:
    """Rows in the leaderboard's order. Average: a point and its 95 % interval, the base as a line. Capabilities: cells in percent."""
    order = list(board.table["label"])
    row = alt.Y("label:N", sort=order, title=None, axis=_LABELS)
    height = alt.Step(_ROW)
    width = _WIDE if len(board.capabilities) <= 6 else _NARROW
    left = _averages(_average_rows(board), row).properties(width=width, height=height)
    right = _cells(_cell_rows(board), order, board).properties(width=_CELL * len(board.capabilities), height=height)
    return alt.concat(left, right, columns=2, spacing=18).resolve_scale(color="independent")


def _average_rows(board: Leaderboard) -> pd.DataFrame:
    import pandas as pd

    table = board.table
    rows = pd.DataFrame({
        "label": table["label"], "kind": table["kind"], "average": 100 * table["score/avg"], "low": 100 * table["score_low/avg"],
        "high": 100 * table["score_high/avg"], "text": table["score/avg"].map(PERCENT.text), "retention": 100 * table["retention"], "experts": table["experts"],
    })  # fmt: skip
    return rows[rows["average"].notna()]


def _averages(rows: pd.DataFrame, row: alt.Y) -> alt.LayerChart | alt.FacetChart:
    top = float(rows[["average", "high"]].max().max())
    x = alt.X(
        "average:Q",
        title="average score (percent)",
        axis=alt.Axis(orient="top", offset=8),
        scale=alt.Scale(domain=[0, min(100.0, 1.05 * top)], nice=True),
    )
    colour = alt.Color(
        "kind:N", scale=alt.Scale(domain=["merge", "base"], range=[style.FACE["merge"], style.FACE["base"]]), legend=None
    )
    tooltip = [
        alt.Tooltip("label:N", title="merge"),
        alt.Tooltip("average:Q", format=".1f"),
        *(alt.Tooltip(f"{name}:Q", title=f"{name} (95 %)", format=".1f") for name in ("low", "high")),
        alt.Tooltip("retention:Q", format=".1f"),
        "experts:N",
    ]
    chart = alt.Chart(rows)
    base = chart.transform_filter("datum.kind == 'base'").mark_rule(strokeDash=[4, 3], color=style.FACE["base"]).encode(x=x)
    bars = (
        chart.transform_filter("isValid(datum.low)")
        .mark_rule(strokeWidth=2)
        .encode(x=alt.X("low:Q"), x2="high:Q", y=row, color=colour)
    )
    points = chart.mark_point(filled=True, size=80, opacity=1).encode(x=x, y=row, color=colour, tooltip=tooltip)
    numbers = chart.mark_text(dy=-9, fontSize=11, color=style.INK).encode(x=x, y=row, text="text:N")
    return alt.layer(base, bars, points, numbers)


def _cell_rows(board: Leaderboard) -> pd.DataFrame:
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for _, one in board.table.iterrows():
        below = set(filter(None, str(one["below_base"]).split(", ")))
        for name in board.capabilities:
            value = one[f"score/{name}"]
            if pd.isna(value):
                continue
            rows.append({
                "label": one["label"], "capability": name, "score": 100 * value, "low": 100 * one[f"score_low/{name}"],
                "high": 100 * one[f"score_high/{name}"], "retention": 100 * one[f"retention/{name}"],
                "text": f"{PERCENT.text(value)}{' ↓' if name in below else ''}",
            })  # fmt: skip
    return pd.DataFrame(rows)


def _cells(cells: pd.DataFrame, order: list[str], board: Leaderboard) -> alt.LayerChart | alt.FacetChart:
    # Letters on the dark half of the scale are white.
    limit = max(float(cells["score"].max()), 1.0)
    x = alt.X("capability:N", sort=board.capabilities, title="score on each capability (percent); ↓ below the base", axis=alt.Axis(orient="top", labelAngle=0, labelLimit=_CELL + 14,
              ticks=False, domain=False, labelExpr="replace(datum.label, '_', ' ')"))  # fmt: skip
    y = alt.Y("label:N", sort=order, title=None, axis=_LABELS)
    tooltip = [
        alt.Tooltip("label:N", title="merge"),
        "capability:N",
        *(alt.Tooltip(f"{name}:Q", title=title, format=".1f")
          for name, title in (("score", "score"), ("low", "low (95 %)"), ("high", "high (95 %)"), ("retention", "retention"))),
    ]  # fmt: skip
    chart = alt.Chart(cells)
    boxes = chart.mark_rect(stroke="white", strokeWidth=2).encode(
        x=x, y=y, tooltip=tooltip,
        color=alt.Color("score:Q", scale=alt.Scale(scheme=style.SEQUENTIAL, domain=[0, limit]), legend=None),
    )  # fmt: skip
    text = chart.mark_text(fontSize=12).encode(
        x=x, y=y, text="text:N",
        color=alt.condition(f"datum.score < {0.6 * limit!r}", alt.value("white"), alt.value("black")),
    )  # fmt: skip
    return alt.layer(boxes, text)
