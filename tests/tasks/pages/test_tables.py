"""How a frame is read, and one whole table as each renderer draws it."""

from __future__ import annotations

import io

import pandas as pd
import pytest
from markupsafe import Markup
from rich.console import Console

from tasks.pages import html, markdown, terminal
from tasks.pages.tables import BITS_MORE, COUNT, MIB, NUMBER, P_VALUE, PERCENT, POINTS, SECONDS, Cells, Column, Table, Unit
from tests.tasks.pages.page_reader import find

FRAME = pd.DataFrame({
    "model": ["base", "a|b\n<i>"], "role": ["base", "merge"], "precise_if": [0.25, float("nan")], "precise_if_stderr": [0.0123, None],
    "average": [0.25, 0.5], "low": [0.2, 0.45], "high": [0.3, 0.55], "difference": [None, -0.0312], "missed": [False, True],
    "documents": pd.array([1200, None], dtype="Int64"),
})  # fmt: skip
TABLE = Table(
    "Scores", FRAME,
    [
        Column("model"), Column("precise_if", unit=PERCENT, error="precise_if_stderr"),
        Column("average", "mean", PERCENT, ends=("low", "high"), mark="missed"), Column("difference", unit=POINTS, absent=""),
        Column("documents", unit=COUNT),
    ],
    ["In percent.", "± one standard error."], strong=[False, True], group="role",
)  # fmt: skip


def test_cells_have_units_errors_intervals_marks_and_gaps() -> None:
    cells = TABLE.cells()
    assert cells.header == ["model", "precise if", "mean", "difference", "documents"]
    assert cells.rows == [
        ["base", "25.0 ± 1.2", "25.0 (20.0 to 30.0)", "", "1,200"],
        ["a|b\n<i>", "–", "50.0 (45.0 to 55.0)*", "−3.1", "–"],
    ]
    assert (cells.numbers, cells.strong, cells.breaks) == ({1, 2, 3, 4}, {1}, {0})
    turned = cells.turned()
    assert turned.header == ["model", "base", "a|b\n<i>"] and turned.rows[-1] == ["documents", "1,200", "–"]


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        (PERCENT, 0.1234, "12.3"), (POINTS, 0.05, "+5.0"), (BITS_MORE, -0.00012, "−0.0001"), (NUMBER, 1e-30, "1e−30"), (MIB, 2**21, "2"),
        (P_VALUE, 0.0001, "< 0.001"), (P_VALUE, 0.0123, "0.012"), (P_VALUE, 0.5, "0.50"), (SECONDS, 3.14159, "3.14"), (SECONDS, 31.4159, "31.4"),
        (SECONDS, 1234.5, "1234"), (Unit("", ".2f"), 0.126, "0.13"),
    ],
)  # fmt: skip
def test_units(unit: Unit, value: float, text: str) -> None:
    assert unit.text(value) == text


def test_markdown() -> None:
    assert markdown.captioned(TABLE) == (
        "| model | precise if | mean | difference | documents |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| base | 25.0 ± 1.2 | 25.0 (20.0 to 30.0) |  | 1,200 |\n"
        "| **a\\|b \\<i\\>** | – | 50.0 (45.0 to 55.0)* | −3.1 | – |\n\n"
        "In percent. ± one standard error.\n"
    )


def test_html() -> None:
    text = str(html.table(TABLE))
    assert [one.text for one in find(text, "th", scope="col")] == TABLE.cells().header
    assert [one.text for one in find(text, "tr")][1:] == ["".join(row) for row in TABLE.cells().rows]
    assert [one.attributes.get("class") for one in find(text, "tr")] == [None, None, "strong"]
    assert len(find(text, "td", **{"class": "number"})) == 8 and find(text, "i") == []
    cells = Cells(["name"], [[Markup("<code>x</code>")]])
    assert [one.text for one in find(str(html.table(cells)), "code")] == ["x"]


def test_terminal() -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(terminal.table(TABLE))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines[0] == "Scores" and lines[-2:] == ["In percent.", "± one standard error."]
    assert lines[1].split() == ["model", "precise", "if", "mean", "difference", "documents"]
    assert lines[3].split() == ["base", "25.0", "±", "1.2", "25.0", "(20.0", "to", "30.0)", "1,200"] and lines[4] == ""


def test_numbers_never_break_where_the_terminal_is_narrow() -> None:
    names = ["math", "code", "precise_if", "general_if", "knowledge"]
    frame = pd.DataFrame({"model": ["a merge of many words"], **{name: [0.5] for name in names}})
    console = Console(width=60, file=io.StringIO(), record=True)
    console.print(terminal.table(Table("", frame, [Column("model"), *(Column(name, unit=PERCENT) for name in names)])))
    text = console.export_text()
    assert text.count("50.0") == 5 and "…" not in text and "knowledge" in text and max(map(len, text.splitlines())) <= 60
