"""Picture of what the masks keep of each expert of a mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import altair as alt

from tasks.pages.pictures.grids import Shade, layer_axis, layer_count, side_by_side
from tasks.pages.pictures.picture import Picture
from tasks.pages.pictures.style import PANEL

if TYPE_CHECKING:
    import pandas as pd

_WRITE_VALUES = 6  # layers: with more the cells are too narrow for numbers
_TALL = 24  # experts: with more their rows are too low for numbers
_HEIGHT = 480
"""Pixels of a panel with many experts; each has a row of whole pixels."""


def mixture_pictures(table: pd.DataFrame) -> dict[str, Picture]:
    """Expert of the mixture × layer, a panel for each merged expert; nothing of a model that is no mixture."""
    rows = table[(table["analysis"] == "moe") & (table["measure"] == "density") & (table["role"] == "all")]
    rows = rows[rows["variant"] == "curvature"][["expert", "layer", "at", "value", "elements"]]
    cells = rows[rows["layer"].notna()].reset_index(drop=True)
    if cells.empty:
        return {}
    shade = Shade.of(cells["value"], "kept by FFG", ".2~p")
    named = list(dict.fromkeys(cells["expert"]))
    return {
        "mixture": Picture(
            "Which experts of the mixture does FFG keep?",
            "Share of elements that FFG's mask keeps of each expert of the mixture (its number from top to bottom), by layer; a panel for each of "
            f"the merged models. {_ends(rows[rows['layer'].isna()])}",
            side_by_side(_panel(cells, shade), "expert", named),
        )
    }


def _ends(whole: pd.DataFrame) -> str:
    """Of which expert of the mixture most and least is kept over all layers, by merged model."""
    said = []
    for name, rows in whole.groupby("expert", sort=False):
        low, high = rows.loc[rows["value"].idxmin()], rows.loc[rows["value"].idxmax()]
        said.append(
            f"{name} from {100 * low['value']:.3g} % (number {low['at']:.0f}) to {100 * high['value']:.3g} % (number {high['at']:.0f})"
        )
    return f"Over all layers: {'; '.join(said)}." if said else ""


def _panel(cells: pd.DataFrame, shade: Shade) -> alt.LayerChart:
    layers, count = layer_count(cells), int(cells["at"].max()) + 1
    step = 20 if count <= _TALL else max(3, _HEIGHT // count)
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, count) if count / step <= 24)
    base = alt.Chart(cells).transform_calculate(
        left="datum.layer - 0.5", right="datum.layer + 0.5", top="datum.at - 0.5", bottom="datum.at + 0.5"
    )
    scale = alt.Scale(domain=[-0.5, count - 0.5], nice=False, zero=False, reverse=True)
    axis = alt.Axis(values=list(range(0, count, every)), format="d", grid=False, domain=False, labelOverlap=False)
    shown = base.mark_rect(stroke="white", strokeWidth=0.5 if layers <= 16 and step == 20 else 0).encode(
        x=layer_axis("left", layers), x2="right:Q", y=alt.Y("top:Q", title="number", scale=scale, axis=axis), y2="bottom:Q",
        color=shade.colour(),
        tooltip=[
            "expert:N", alt.Tooltip("layer:Q", format="d"), alt.Tooltip("at:Q", title="expert of the mixture", format="d"),
            alt.Tooltip("value:Q", title="kept", format=".4~p"), alt.Tooltip("elements:Q", format=","),
        ],
    )  # fmt: skip
    numbers = (
        base.transform_filter("true" if layers <= _WRITE_VALUES and step == 20 else "false")
        .mark_text(fontSize=11)
        .encode(
            x=layer_axis("layer", layers), y=alt.Y("at:Q", scale=scale, axis=axis), text=alt.Text("value:Q", format=shade.format), color=shade.ink()
        )
    )  # fmt: skip
    return cast("alt.LayerChart", alt.layer(shown, numbers)).properties(
        width=layers * max(3, PANEL // layers), height=step * count
    )
