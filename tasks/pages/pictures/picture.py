"""A chart with what a reader needs beside it, as Vega-Lite and as PNG. Nothing here reaches a network."""

from __future__ import annotations

from typing import Any, NamedTuple

import altair as alt
import vl_convert

from tasks.pages.pictures import style

# Vega-Lite's version that this Altair writes, as vl-convert names it: v6.4.1 is 6.4.
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


class Picture(NamedTuple):
    """A chart and what a reader needs beside it."""

    title: str
    caption: str
    """What is drawn, in a sentence or two: what to look for, and what it is measured on."""
    chart: alt.TopLevelMixin


def spec(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """The chart as Vega-Lite with its data inside, however many rows, in the common style.

    The same chart gives the same spec. Raises altair's SchemaValidationError for a chart that is not valid Vega-Lite.
    """
    with alt.data_transformers.enable("default", max_rows=None):
        made: dict[str, Any] = chart.to_dict()
    # Both come from Altair's active theme, a setting of the process; ours is the same wherever it is called from.
    made.pop("usermeta", None)
    made["config"] = style.theme()["config"]
    return made


def png(chart: alt.TopLevelMixin, *, scale: float = 2.0) -> bytes:
    """The chart as PNG; ``scale`` image pixels for each of its pixels."""
    return bytes(vl_convert.vegalite_to_png(spec(chart), vl_version=VEGA_LITE, scale=scale))
