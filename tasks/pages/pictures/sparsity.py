"""Pictures of the masks' rows and columns: how many keep how much, FFG beside magnitude."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt

from ota_core.analysis import BINS
from tasks.pages.pictures.grids import BEFORE, BEHIND, IN_BLOCK, side_by_side
from tasks.pages.pictures.picture import Picture
from tasks.pages.pictures.style import PANEL, VARIANT_COLOURS, VARIANT_NAMES

if TYPE_CHECKING:
    import pandas as pd

BIN = 1 / BINS
"""Width of a bin."""
_ALL = "all"
_PANEL = 195
"""Four in a row: rows and columns of two experts."""


def sparsity_pictures(table: pd.DataFrame) -> dict[str, Picture]:
    """Histograms of what rows and columns keep, and the shares of those that keep nothing."""
    rows = table[(table["analysis"] == "sparsity") & table["variant"].isin(list(VARIANT_NAMES))]
    rows = rows.assign(how=rows["variant"].map(VARIANT_NAMES))
    bins = _bins(rows[rows["measure"].isin(["rows", "columns"])])
    pictures = {}
    if not bins.empty:
        pictures["sparsity"] = Picture(
            "How much do rows and columns keep?",
            "Rows and columns of the weight matrices by the share of their elements that a mask keeps, FFG beside magnitude pruning at "
            "the same density. Bars at the left: whole rows or columns fall away; at the right: they stay whole.",
            _histograms(bins),
        )
    empty = rows[rows["measure"].isin(["empty_rows", "empty_columns"]) & (rows["role"] == _ALL) & rows["layer"].isna()]
    if not empty.empty:
        pictures["empty"] = Picture(
            "Rows and columns without a single kept element",
            "Share of all rows and columns of the weight matrices of which a mask keeps nothing, FFG beside magnitude pruning at the same "
            "density.",
            _empty(empty),
        )
    return pictures


def _bins(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows or columns in each bin, by expert and role, over all layers; with their share. ``role`` "all" is the whole expert."""
    import pandas as pd

    if rows.empty:
        return rows
    keys = ["expert", "measure", "how"]
    parts = rows[rows["role"] != _ALL]
    by_role = parts.groupby([*keys, "role", "at"], sort=False, as_index=False)["value"].sum()
    whole = rows[(rows["role"] == _ALL) & rows["layer"].isna()][[*keys, "role", "at", "value"]]
    if whole.empty:  # the sum over all roles is the whole expert
        whole = parts.groupby([*keys, "at"], sort=False, as_index=False)["value"].sum().assign(role=_ALL)
    bins = pd.concat([whole, by_role], ignore_index=True).rename(columns={"value": "count"})
    bins["share"] = bins["count"] / bins.groupby([*keys, "role"])["count"].transform("sum")
    second = bins["how"] == VARIANT_NAMES["magnitude"]
    bins["left"] = bins["at"] + second * BIN / 2
    bins["right"] = bins["left"] + BIN / 2
    bins["panel"] = bins["expert"] + ": " + bins["measure"]
    return bins[bins["count"] > 0]


def _histograms(bins: pd.DataFrame) -> alt.FacetChart:
    experts, there = list(dict.fromkeys(bins["expert"])), set(bins["role"])
    roles = [role for role in dict.fromkeys([_ALL, *BEFORE, *IN_BLOCK, *BEHIND]) if role in there]
    panels = [f"{expert}: {what}" for expert in experts for what in ("rows", "columns")]
    tooltip: list[alt.Tooltip | str] = [
        "expert:N",
        "role:N",
        alt.Tooltip("measure:N", title="of"),
        alt.Tooltip("how:N", title="kept by"),
        alt.Tooltip("range:N", title="kept share"),
    ]
    tooltip += [
        alt.Tooltip("count:Q", title="how many", format=","),
        alt.Tooltip("share:Q", title="share of them", format=".3~p"),
    ]
    menu = alt.binding_select(options=roles, name="role: ") if len(roles) > 1 else alt.Undefined
    bars = (
        alt.Chart(bins)
        .transform_filter("datum.role === role")
        .transform_calculate(range=f"format(datum.at, '.0%') + ' to ' + format(datum.at + {BIN}, '.0%')")
        .mark_rect()
        .encode(
            x=alt.X(
                "left:Q",
                title="kept share of a row or column",
                scale=alt.Scale(domain=[0, 1]),
                axis=alt.Axis(format="%", values=[0, 0.25, 0.5, 0.75, 1], grid=False),
            ),
            x2="right:Q",
            y=alt.Y("share:Q", title="share of them", scale=alt.Scale(nice=4), axis=alt.Axis(format="%", tickCount=4)),
            y2=alt.datum(0),
            color=_colour(),
            tooltip=tooltip,
        )
        .properties(width=_PANEL, height=130)
    )
    return side_by_side(bars, "panel", panels, columns=4).add_params(alt.param(name="role", value=_ALL, bind=menu))


def _empty(empty: pd.DataFrame) -> alt.FacetChart:
    empty = empty.assign(panel=empty["measure"].map({"empty_rows": "rows", "empty_columns": "columns"}))
    tooltip: list[alt.Tooltip | str] = [
        "expert:N",
        alt.Tooltip("how:N", title="kept by"),
        alt.Tooltip("value:Q", title="empty", format=".4~p"),
        alt.Tooltip("elements:Q", title="of", format=","),
    ]
    base = alt.Chart(empty[["panel", "expert", "how", "value", "elements"]]).encode(
        y=alt.Y("expert:N", title=None, sort=None),
        yOffset=alt.YOffset("how:N", sort=list(VARIANT_NAMES.values())),
        x=alt.X("value:Q", title="share with nothing kept", axis=alt.Axis(format="%", tickCount=4)),
        tooltip=tooltip,
    )
    bars = base.mark_bar().encode(color=_colour())
    values = base.mark_text(align="left", dx=3, fontSize=11).encode(text=alt.Text("value:Q", format=".2~p"))
    chart = alt.layer(bars, values).properties(width=PANEL, height=alt.Step(15))
    return side_by_side(chart, "panel", ["rows", "columns"])


def _colour() -> alt.Color:
    scale = alt.Scale(domain=list(VARIANT_COLOURS), range=list(VARIANT_COLOURS.values()))
    return alt.Color("how:N", title="kept by", scale=scale)
