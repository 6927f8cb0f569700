"""Charts become a page that loads nothing and runs nothing but its own scripts, and pictures of the expected size."""

from __future__ import annotations

import base64
import hashlib
import io
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor

import altair as alt
import pandas as pd
import pytest
from markupsafe import Markup
from PIL import Image

from tasks.pages import html as page
from tasks.pages.html import Picture, Section
from tasks.pages.pictures import picture, style
from tasks.pages.tables import Column, Table
from tests.tasks.pages.page_reader import find, loads, specs, svg

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"


def chart(rows: int = 3, name: str = "a") -> alt.Chart:
    table = pd.DataFrame({"x": range(rows), "y": [0.5] * rows, "name": [name] * rows})
    return alt.Chart(table).mark_point().encode(x="x:Q", y="y:Q", color="name:N", tooltip=["name:N"])


def whole(name: str = "a", rows: int = 3) -> str:
    blocks = [
        f"about {name}",
        Picture(f"title {name}", f"caption {name}", chart(rows, name)),
        Table("t", pd.DataFrame({"m": [name]}), [Column("m")], [f"about the table of {name}"]),
    ]
    return page.to_html(f"page {name}", [Section(f"first {name}", blocks), Section("second", ["text"])])


def test_a_page_loads_nothing_and_permits_only_its_own_scripts() -> None:
    html = whole()
    assert loads(html) == []
    scripts = [one for one in find(html, "script") if one.attributes.get("type") != "application/json"]
    assert len(scripts) == 2 and "vegaEmbed" in scripts[0].text and "drawAll" in scripts[1].text
    (policy,) = (m.attributes["content"] for m in find(html, "meta") if "http-equiv" in m.attributes)
    directives = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    digests = {f"'sha256-{base64.b64encode(hashlib.sha256(s.text.encode()).digest()).decode()}'" for s in scripts}
    assert directives["default-src"] == "'none'"
    assert set(directives["script-src"].split()) == digests
    assert "connect-src" not in directives and "unsafe-eval" not in policy


def test_a_page_without_charts_goes_without_their_scripts() -> None:
    html = page.to_html("t", [Section("s", ["only text"])])
    assert len(html) < 20_000 and len(find(html, "script")) == 1


def test_data_lies_in_the_page_however_many_rows() -> None:
    (spec,) = specs(whole(rows=6000))
    (rows,) = spec["datasets"].values()
    assert [row["x"] for row in rows] == list(range(6000))
    assert spec["config"] == style.theme()["config"]


def test_names_cannot_leave_their_place() -> None:
    html, harmless = whole(EVIL), whole()
    assert [one.tag for one in find(html, "script")] == [one.tag for one in find(harmless, "script")]
    assert find(html, "img") == []
    (spec,) = specs(html)
    assert {row["name"] for rows in spec["datasets"].values() for row in rows} == {EVIL}
    for tag, text in {
        "title": f"page {EVIL}",
        "h1": f"page {EVIL}",
        "h3": f"title {EVIL}",
        "figcaption": f"caption {EVIL}",
    }.items():
        assert [one.text for one in find(html, tag)] == [text]
    assert find(html, "th", scope="row")[0].text == EVIL
    assert find(html, "div", role="img")[0].attributes["aria-label"] == f"title {EVIL}"


def test_the_same_input_gives_the_same_bytes() -> None:
    assert whole() == whole()
    assert picture.png(chart()) == picture.png(chart())


def test_threads_draw_at_once() -> None:
    alone = picture.png(chart())
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(lambda _: picture.png(chart()), range(3))) == {alone}


def test_a_theme_of_the_process_changes_nothing() -> None:
    before = picture.spec(chart())
    with alt.theme.enable("dark"):
        assert picture.spec(chart()) == before


def test_png_has_the_size_of_the_chart() -> None:
    size = ET.fromstring(svg(chart())).attrib
    for scale in (1.0, 2.0):
        with Image.open(io.BytesIO(picture.png(chart(), scale=scale))) as image:
            image.load()
            assert image.format == "PNG"
            assert image.size == tuple(pytest.approx(scale * float(size[side]), abs=1) for side in ("width", "height"))
            assert (
                len(image.convert("RGB").getcolors(maxcolors=1 << 24) or []) > 10
            )  # points, letters and lines, not a blank sheet


def test_a_chart_that_is_no_vega_lite_is_refused() -> None:
    broken = chart()
    broken.mark = "pie in the sky"
    with pytest.raises(alt.utils.schemapi.SchemaValidationError):
        picture.spec(broken)


def test_safe_html_stays_and_contents_list_the_sections() -> None:
    html = page.to_html("t", [Section("one", [Markup("<em>x</em>")]), Section("two", [])], header=Markup("<h1>own</h1>"))
    assert [one.text for one in find(html, "em")] == ["x"]
    assert [one.text for one in find(html, "h1")] == ["own"]
    anchors = [one.attributes["href"] for one in find(html, "a")]
    assert anchors == [f"#{one.attributes['id']}" for one in find(html, "h2")]
