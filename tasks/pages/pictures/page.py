"""Altair charts as one self-contained HTML page, and as PNG. Nothing here reaches a network, nor does the page when it is opened."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import altair as alt
import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tasks.pages.pictures import style
from tasks.pages.pictures.page_template import FIGURE, PAGE, SCRIPT, STYLE, TABLE

if TYPE_CHECKING:
    import pandas as pd

# Vega-Lite's version that this Altair writes, as vl-convert names it: v6.4.1 is 6.4.
_VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


class Picture(NamedTuple):
    """A chart and what a reader needs beside it."""

    title: str
    caption: str
    """What is drawn, in a sentence or two: what to look for, and what it is measured on."""
    chart: alt.TopLevelMixin


Block = str | Markup | Picture
"""A paragraph (escaped), HTML that is known to be safe (``Markup``, for example of ``table``), or a picture."""


@dataclass(frozen=True)
class Section:
    """A part of a page, with a heading and an entry in the page's contents."""

    title: str
    blocks: Sequence[Block]


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
    return bytes(vl_convert.vegalite_to_png(spec(chart), vl_version=_VEGA_LITE, scale=scale))


def to_png(chart: alt.TopLevelMixin, path: Path, *, scale: float = 2.0) -> None:
    """Write the chart as PNG."""
    path.write_bytes(png(chart, scale=scale))


def template(source: str) -> Any:
    """A Jinja template that escapes everything but ``Markup``, and refuses names that it is not given."""
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(source)


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Collection[int] = (), strong: Collection[int] = ()
) -> Markup:
    """An HTML table of cells as they shall read. ``numbers``: columns that align right; ``strong``: rows in bold; both from 0."""
    return Markup(template(TABLE).render(header=header, rows=rows, numbers=numbers, strong=strong))


def table_of(frame: pd.DataFrame, *, strong: Collection[int] = ()) -> Markup:
    """A data frame without its index as HTML table: numbers right, floats with four significant digits, gaps as a dash."""
    import pandas as pd

    def read(value: object) -> object:
        return "–" if pd.isna(value) else f"{value:.4g}" if isinstance(value, float) else value

    numbers = [i for i, name in enumerate(frame.columns) if pd.api.types.is_numeric_dtype(frame[name])]
    rows = [[read(value) for value in row] for row in frame.astype(object).itertuples(index=False)]
    return table([str(name) for name in frame.columns], rows, numbers=numbers, strong=strong)


def to_html(title: str, sections: Sequence[Section], *, header: Markup | None = None) -> str:
    """One page with everything inside: style, scripts, charts with their data. The same input gives the same bytes.

    ``header`` stands in place of the plain heading. The page's Content-Security-Policy forbids every load, and every script but
    its own two, by their digests: what slips into a page from a name or a recipe cannot run.
    """
    specs: list[Markup] = []

    def render(blocks: Iterable[Block]) -> list[Markup]:
        made = []
        for block in blocks:
            if isinstance(block, Picture):
                specs.append(json_for_script(spec(block.chart)))
                made.append(Markup(template(FIGURE).render(title=block.title, caption=block.caption, number=len(specs))))
            else:
                made.append(block if isinstance(block, Markup) else Markup("<p>{}</p>").format(block))
        return made

    parts = [{"title": section.title, "blocks": render(section.blocks)} for section in sections]
    scripts = [*([_bundle()] if specs else []), SCRIPT]
    digests = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {digests}"
    return str(
        template(PAGE).render(
            title=title, header=header, sections=parts, specs=specs, scripts=[Markup(s) for s in scripts], style=Markup(STYLE),
            policy=Markup(policy),
        )
    )  # fmt: skip


def json_for_script(value: object) -> Markup:
    """JSON for the inside of a ``<script>``: no ``<`` in it, so that nothing ends the element or opens a comment."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


@cache
def _bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed, about 0.9 MB."""
    return str(vl_convert.javascript_bundle(vl_version=_VEGA_LITE))  # type: ignore[call-arg]  # its stub forgets the default snippet
