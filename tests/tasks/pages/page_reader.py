"""Reads a page as a browser's parser does, elements with their attributes and the text inside of them; and a chart as drawn."""

from __future__ import annotations

import json
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import altair as alt
import vl_convert

from tasks.pages.pictures import picture


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""
    """All text inside, with that of the elements inside."""


_VOID = {"meta", "br", "hr", "img", "link", "input", "wbr"}


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1].tag == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.text += data


def read(html: str) -> list[Element]:
    """All elements, in the order in which they open. Fails for elements that are not closed."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert not parser._open
    return parser.elements


def find(html: str, tag: str, **attributes: str) -> list[Element]:
    return [one for one in read(html) if one.tag == tag and attributes.items() <= one.attributes.items()]


def specs(html: str) -> list[dict[str, Any]]:
    """The charts' specs."""
    return [json.loads(one.text) for one in find(html, "script", type="application/json")]


def svg(chart: alt.TopLevelMixin) -> str:
    """The chart as the page draws it: its letters can be read."""
    return str(vl_convert.vegalite_to_svg(picture.spec(chart), vl_version=picture.VEGA_LITE))


def loads(html: str) -> list[str]:
    """What a browser would fetch when it opens the page."""
    found = []
    for one in read(html):
        found += [value for name, value in one.attributes.items() if name in {"src", "srcset", "poster", "data", "action"}]
        if one.tag in {"link", "base"}:
            found.append(one.attributes.get("href", ""))
        if one.tag == "style":
            found += [word for word in ("url(", "@import") if word in one.text]
    return found
