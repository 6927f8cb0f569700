"""Names from elsewhere in Markdown: rendered by a real renderer, they are text and nothing else."""

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from ota_core.engine.markdown import cell, fenced, table

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![x](https://evil.test/pixel.png)", "[click](javascript:alert(1))",
    "a|b", "a\n# heading", "a\r\n\r\n---\r\n", "`code`", "\\", "\\|", "x\0y", "<!-- gone", "[x]: https://evil.test", "a\\\n| b",
]  # fmt: skip


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def rendered(markdown: str) -> Tags:
    found = Tags()
    found.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown))
    found.close()
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text(name: str) -> None:
    shown = rendered(table(["model", "score"], [[name, "1"], ["b", "2"]]))
    assert shown.tags <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert "".join(shown.text.split()) == "modelscore" + "".join(name.replace("\0", " ").split()) + "1b2"
    assert rendered(f"# Merge: {cell(name)}").tags == {"h1"}


@given(st.text(st.sampled_from("<>[]()|`\\!\n #-ab") | st.characters(codec="utf-8"), max_size=30))
def test_any_name_is_text(name: str) -> None:
    shown = rendered(f"- x {cell(name)} x")
    assert shown.tags <= {"ul", "li", "em", "strong"}


def test_a_fence_holds_what_holds_fences() -> None:
    shown = rendered(fenced("name: |\n  ```\n  <script>\n  `````", "yaml"))
    assert shown.tags == {"pre", "code"} and shown.text.count("```") >= 2
