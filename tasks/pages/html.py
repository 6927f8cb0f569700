"""Results as one self-contained HTML page: paragraphs, tables, charts. Nothing here reaches a network, nor does the page when it is opened."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tasks.pages.html_template import FIGURE, PAGE, SCRIPT, STYLE, TABLE
from tasks.pages.pictures.picture import VEGA_LITE, Picture, spec
from tasks.pages.tables import Cells, Table

Block = str | Markup | Table | Picture
"""A paragraph (escaped), HTML that is known to be safe (``Markup``), a table with its caption, or a picture."""


@dataclass(frozen=True)
class Section:
    """A part of a page, with a heading and an entry in the page's contents."""

    title: str
    blocks: Sequence[Block]


def template(source: str) -> Any:
    """A Jinja template that escapes everything but ``Markup``, and refuses names that it is not given."""
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(source)


def table(shown: Table | Cells) -> Markup:
    """The table alone; its cells are escaped, but for ``Markup``."""
    cells = shown.cells() if isinstance(shown, Table) else shown
    return Markup(template(TABLE).render(cells._asdict()))


def to_html(title: str, sections: Sequence[Section], *, header: Markup | None = None) -> str:
    """One page with everything inside: style, scripts, charts with their data. The same input gives the same bytes.

    ``header`` stands in place of the plain heading. The page's Content-Security-Policy forbids every load, and every script but
    its own two, by their digests: what slips into a page from a name or a recipe cannot run.
    """
    specs: list[Markup] = []

    def render(blocks: Iterable[Block]) -> Iterator[Markup]:
        for block in blocks:
            if isinstance(block, Picture):
                specs.append(json_for_script(spec(block.chart) | {"description": block.title}))  # what a screen reader says
                yield Markup(template(FIGURE).render(title=block.title, caption=block.caption, number=len(specs)))
            elif isinstance(block, Table):
                yield table(block)
                yield from (Markup('<p class="soft">{}</p>').format(said) for said in block.caption)
            else:
                yield block if isinstance(block, Markup) else Markup("<p>{}</p>").format(block)

    parts = [{"title": section.title, "blocks": list(render(section.blocks))} for section in sections]
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
    return str(vl_convert.javascript_bundle(vl_version=VEGA_LITE))  # type: ignore[call-arg]  # its stub forgets the default snippet
