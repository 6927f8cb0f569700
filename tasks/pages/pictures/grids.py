"""Coloured grids: layer × role, one panel after the other, and expert × expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import altair as alt

from ota_core.plan.roles import ROLES
from tasks.pages.pictures.style import DIVERGING, INK, PANEL, SEQUENTIAL

if TYPE_CHECKING:
    import pandas as pd

IN_BLOCK = tuple(role for role in ROLES if role not in {"embed", "head"})
"""Roles inside of transformer blocks, in the order of the forward pass: all but those that a whole model has once."""
# Roles outside of blocks: before the first and behind the last, under the names that the pictures give them.
BEFORE = {"embed": "embed"}
BEHIND = {"norm": "final norm", "head": "head"} | {role: f"{role} (outside)" for role in IN_BLOCK if role != "norm"}
_GAPS = ("", " ")  # two empty rows of a grid need two names
_WRITE_VALUES = 6  # layers: with more the cells are too narrow for numbers


@dataclass(frozen=True)
class Shade:
    """How a value becomes a colour and a number."""

    legend: str
    """Name and unit of the value."""
    format: str
    """d3's format of the numbers in cells."""
    low: float
    high: float
    diverging: bool = False
    """Colours run from a middle to both sides; the middle lies halfway between ``low`` and ``high``."""
    root: bool = False
    """Colours follow the square root, for values that differ by an order of magnitude; ``low`` is 0."""

    @classmethod
    def of(cls, values: pd.Series, legend: str, format: str, *, about: float | None = None, root: bool = False) -> Shade:
        """The range of ``values``: from 0 (or the lowest, if that is below) up, or as far to both sides of ``about``."""
        values = values.dropna()
        if about is None:
            high = float(values.max())
            return cls(legend, format, min(0.0, float(values.min())), high if high > 0 else 1.0, root=root)
        reach = float((values - about).abs().max()) if len(values) else 0.0
        reach = reach or 1.0
        return cls(legend, format, about - reach, about + reach, diverging=True)

    def colour(self) -> alt.Color:
        scheme: Any = DIVERGING if self.diverging else SEQUENTIAL
        return alt.Color(
            "value:Q",
            scale=alt.Scale(type="sqrt" if self.root else "linear", scheme=scheme, domain=[self.low, self.high]),
            legend=alt.Legend(title=self.legend, format=self.format, tickCount=4),
        )

    def ink(self) -> Any:
        """Letters on a cell: black on the light colours, white on the dark ones."""
        span, value = self.high - self.low, "datum.value"
        if self.diverging:  # dark at both ends
            light = f"abs({value} - {self.low + span / 2}) < {0.36 * span}"
        else:  # viridis: dark below
            light = f"{value} > {self.low + (0.55**2 if self.root else 0.55) * span}"
        return alt.condition(light, alt.value("black"), alt.value("white"))


def side_by_side(panel: Any, by: str, order: Sequence[str], columns: int = 3) -> alt.FacetChart:
    """A panel for each value of the column ``by``, in this order, each with axes of its own: whoever looks at one sees no other's."""
    facet = alt.Facet(f"{by}:N", title=None, sort=list(order))
    return panel.facet(facet, columns=columns).resolve_axis(x="independent", y="independent")


def place(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells that a grid shows, with ``row``, the name of the grid's row.

    A tensor outside of the blocks belongs to no layer: it takes a row of its own, over the whole width. Sums over roles or layers are
    left out.
    """
    import pandas as pd

    inside = cells["layer"].notna() & cells["role"].isin(IN_BLOCK)
    names = BEFORE | BEHIND
    outside = cells["layer"].isna() & cells["role"].isin(list(names))
    blocks, ends = cells[inside], cells[outside]
    return pd.concat([blocks.assign(row=blocks["role"]), ends.assign(row=ends["role"].map(names))], ignore_index=True)


def layer_count(cells: pd.DataFrame) -> int:
    """Transformer blocks that the cells come from; 1 where there is none, for the width of the strips."""
    return int(cells["layer"].max()) + 1 if cells["layer"].notna().any() else 1


def row_order(placed: pd.DataFrame) -> list[str]:
    """Names of the rows from top to bottom, with gaps before and behind the blocks."""
    there = set(placed["row"])
    parts = [[n for n in group if n in there] for group in (BEFORE.values(), IN_BLOCK, BEHIND.values())]
    order: list[str] = []
    for part, gap in zip(parts, ("", *_GAPS), strict=True):
        order += [*([gap] if order and part else []), *part]
    return order


def layer_axis(field: str, layers: int) -> alt.X:
    """Layers from left to right, every one or every so many labelled."""
    every = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 40, 100, layers + 1) if layers / step <= 12)
    return alt.X(
        f"{field}:Q",
        title="layer",
        scale=alt.Scale(domain=[-0.5, layers - 0.5], nice=False, zero=False),
        axis=alt.Axis(values=list(range(0, layers, every)), format="d", grid=False, domain=False, labelOverlap=False),
    )


def grid(placed: pd.DataFrame, shade: Shade, tooltip: Sequence[alt.Tooltip | str]) -> alt.LayerChart:
    """Layers to the right, roles down, tensors outside of the blocks as strips. ``placed`` is what ``place`` gives, with ``value``."""
    layers = layer_count(placed)
    # The page's reader has these computed: every column of the data is in the page as often as there are cells.
    base = alt.Chart(placed).transform_calculate(
        left="isValid(datum.layer) ? datum.layer - 0.5 : -0.5",
        right=f"isValid(datum.layer) ? datum.layer + 0.5 : {layers - 0.5}",
        middle=f"isValid(datum.layer) ? datum.layer : {layers / 2 - 0.5}",
    )
    y = alt.Y(
        "row:N", title=None, sort=None, scale=alt.Scale(domain=row_order(placed)), axis=alt.Axis(ticks=False, domain=False, labelPadding=5)
    )  # fmt: skip
    cells = base.mark_rect(stroke="white", strokeWidth=0.5 if layers <= 16 else 0).encode(
        x=layer_axis("left", layers), x2="right:Q", y=y, color=shade.colour(), tooltip=list(tooltip)
    )
    numbers = (
        base.transform_filter("true" if layers <= _WRITE_VALUES else "!isValid(datum.layer)")
        .mark_text(fontSize=11)
        .encode(x=layer_axis("middle", layers), y=y, text=alt.Text("value:Q", format=shade.format), color=shade.ink())
    )
    # Whole pixels for each layer: between cells that end within a pixel, hairlines shine through.
    return cast("alt.LayerChart", alt.layer(cells, numbers)).properties(
        width=layers * max(3, PANEL // layers), height=alt.Step(20)
    )


def grids(placed: pd.DataFrame, shade: Shade, tooltip: Sequence[alt.Tooltip | str]) -> alt.FacetChart:
    """A grid for each expert, in the order of the table."""
    return side_by_side(grid(placed, shade, tooltip), "expert", list(dict.fromkeys(placed["expert"])))


def square(pairs: pd.DataFrame, experts: Sequence[str], shade: Shade, tooltip: Sequence[alt.Tooltip | str]) -> alt.LayerChart:
    """Expert × expert with each pair on both sides of the diagonal, which stays empty, and the values written in.

    ``pairs`` has ``expert``, ``other`` and ``value``, each pair once.
    """
    import pandas as pd

    both = pd.concat([pairs, pairs.rename(columns={"expert": "other", "other": "expert"})], ignore_index=True)
    step = max(36, min(56, PANEL // max(len(experts), 1)))
    scale = alt.Scale(domain=list(experts))
    bare: dict[str, Any] = {"ticks": False, "domain": False, "labelOverlap": False, "labelPadding": 5}
    base = alt.Chart(both).encode(
        x=alt.X("other:N", title=None, scale=scale, axis=alt.Axis(labelAngle=-40, **bare)),
        y=alt.Y("expert:N", title=None, scale=scale, axis=alt.Axis(**bare)),
        tooltip=list(tooltip),
    )
    cells = base.mark_rect(stroke="white").encode(color=shade.colour())
    numbers = base.mark_text(fontSize=12, color=INK).encode(text=alt.Text("value:Q", format=shade.format), color=shade.ink())
    # The diagonal is the view that shows through.
    return cast("alt.LayerChart", alt.layer(cells, numbers)).properties(
        width=alt.Step(step), height=alt.Step(min(step, 40)), view=alt.ViewBackground(fill="#ececec")
    )
