"""The pages in a real browser: drawn without a network and without a complaint, readable at both widths, alive under the mouse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tasks.experiments.leaderboard.text import details, ranking
from tasks.experiments.search.result import trials
from tasks.experiments.study.tables import all_tables
from tests.tasks.pages.analysis_table import score_rows
from tests.tasks.pages.seen import made
from tests.tasks.pages.seen.chromium import WIDTHS, Chromium, Seen, marks
from tests.tasks.pages.seen.chromium import chromium as chromium
from tests.tasks.pages.seen.layout import hard_to_read

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

NAMES = [*made.PAGES, "leaderboard"]


@dataclass
class Pages:
    """Pages as files, each made when it is first asked for."""

    folder: Path
    blank_database: Path
    known: dict[str, Path] = field(default_factory=dict)

    @property
    def tracking(self) -> Path:
        """The MLflow that the leaderboard is of."""
        return self.folder / "tracking"

    def __getitem__(self, name: str) -> Path:
        if name not in self.known and name == "leaderboard":
            self.tracking.mkdir()
            (self.tracking / "mlflow.db").write_bytes(self.blank_database.read_bytes())
            self.known[name] = made.leaderboard_page(self.folder, self.tracking)
        elif name not in self.known:
            self.known[name] = made.PAGES[name](self.folder)
        return self.known[name]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, blank_database: Path) -> Pages:
    return Pages(tmp_path_factory.mktemp("pages"), blank_database)


@contextmanager
def drawn(chromium: Chromium, page: Path, width: str = "desktop") -> Iterator[Seen]:
    """The page, when its last picture stands."""
    with chromium.open(page, width) as seen:
        seen.page.locator("html[data-drawn=yes]").wait_for(state="attached")
        yield seen


@pytest.fixture(scope="module", params=NAMES)
def opened(request: pytest.FixtureRequest, chromium: Chromium, pages: Pages) -> Iterator[tuple[str, Seen]]:
    """Each page once, in a wide window; tests leave it as one that a person has played with."""
    with drawn(chromium, pages[request.param]) as seen:
        yield request.param, seen


def check(name: str, seen: Seen, width: str) -> None:
    """All is drawn, nothing stands in the way of anything, nothing was asked for."""
    for summary in seen.page.locator("summary").all():
        summary.click()
    seen.shot(f"{name}-{width}")
    assert hard_to_read(seen.page) == []
    charts = seen.page.locator(".chart").all()
    assert all(marks(chart).count() > 0 for chart in charts) and (charts or name == "documents")
    titles = seen.page.locator("figure h3").all_inner_texts()
    assert [chart.get_attribute("aria-label") for chart in charts] == titles, "what a screen reader says of each picture"
    assert seen.errors == [] and len(seen.asked) == 1, "the page itself was asked for, and nothing more"


def test_it_is_whole_and_can_be_read(opened: tuple[str, Seen]) -> None:
    check(*opened, "desktop")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_whole_and_can_be_read_on_a_phone(chromium: Chromium, pages: Pages, name: str) -> None:
    with drawn(chromium, pages[name], "phone") as seen:
        check(name, seen, "phone")


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_a_report_of_many_experts_can_be_read(chromium: Chromium, pages: Pages, width: str) -> None:
    large = made.report_page(pages.folder, tuple(f"capability_{i}" for i in range(1, 9)), layers=32, name="report-large")
    with drawn(chromium, large, width) as seen:
        check("report-large", seen, width)


def test_tables_hold_the_numbers(opened: tuple[str, Seen], pages: Pages) -> None:
    name, seen = opened
    rows = seen.rows()
    if name == "report":
        merge = score_rows(made.FOUR)[-1]
        cells = [f"{100 * merge[name]:.1f} ± {100 * merge[f'{name}_stderr']:.1f}" for name in (*made.FOUR, "average")]
        assert [merge["model"], *cells, "80.0", "none"] in rows and [
            "math",
            "champion",
            "200",
            "50.0",
            "62.5",
            "−12.50 ± 1.25",
            "0.004",
            "yes",
        ] in rows
    elif name == "search":
        tuned = made.tuned()
        assert rows[1:] == trials(tuned, len(tuned.trials)).cells().rows
        best = max((trial for trial in tuned.trials if trial.complete and trial.last["math"] >= 0.3), key=lambda one: one.average)
        assert rows[1][:2] == [str(best.number), f"{100 * sum(best.last.values()) / 3:.1f}"]
    elif name == "study":
        assert all(row in rows for table in all_tables(made.study_results()) for row in table.cells().rows)
    elif name == "leaderboard":
        board = made.board(pages.tracking)
        assert all(row in rows for table in details(board) for row in table.cells().rows)
        assert [row[:5] for row in rows[1:5]] == [row[:5] for row in ranking(board).cells().rows]
    elif name == "documents":
        assert rows[1:] == [["math", "12", "4", "2", "math", "0", "4"], ["code", "12", "4", "2", "none", "–", "–"]]


def test_every_picture_answers_the_mouse(opened: tuple[str, Seen]) -> None:
    name, seen = opened
    for chart in seen.page.locator(".chart").all():
        told = next(filter(None, (hover(mark) for mark in marks(chart).all()[:40])), {})
        assert len(told) >= 2 and any(re.search(r"\d", value) for value in told.values()), chart.get_attribute("aria-label")
        box = tooltip(seen.page).bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= WIDTHS["desktop"], "it stands within the window"
        if name == "report":
            seen.shot("report-hover", whole=False)
    assert seen.errors == []


def test_every_choice_of_a_menu_changes_its_picture(opened: tuple[str, Seen]) -> None:
    name, seen = opened
    menus = seen.page.locator(".menu select").all()
    assert len(menus) == {"report": 3, "report-small": 1}.get(name, 0)
    for menu in menus:
        picture = menu.locator("xpath=ancestor::figure").locator(".chart svg")
        looks = [picture.inner_html()]
        for choice in menu.locator("option").all_inner_texts()[1:]:
            menu.select_option(choice)
            changed = "([svg, before]) => svg.innerHTML !== before"
            seen.page.wait_for_function(changed, arg=[picture.element_handle(), looks[-1]])
            looks.append(picture.inner_html())
        assert len(set(looks)) == len(looks) > 2
    assert hard_to_read(seen.page) == [] and seen.errors == []


def test_a_bar_under_the_mouse_tells_the_score_of_its_model(chromium: Chromium, pages: Pages) -> None:
    (expected,) = score_rows(made.FOUR[:1])[-1:]
    with drawn(chromium, pages["report-small"]) as seen:
        bars = marks(seen.page.locator(".chart").first).all()
        told = [one for one in map(hover, bars) if (one.get("model"), one.get("capability")) == (expected["model"], "math")]
        score, error = (float(told[0][name].rstrip("%")) / 100 for name in ("score", "± standard error"))
        assert (score, error) == (pytest.approx(expected["math"], abs=1e-4), pytest.approx(expected["math_stderr"], abs=1e-4))


def test_documents_are_filtered(chromium: Chromium, pages: Pages) -> None:
    with drawn(chromium, pages["documents"]) as seen:
        filters, count = seen.page.locator("select[data-filter]"), seen.page.locator("[data-count]")
        there = seen.page.locator(".document:visible")
        assert count.inner_text() == "14" and there.count() == 14
        filters.nth(0).select_option("code")
        assert count.inner_text() == "6" and there.count() == 6
        filters.nth(1).select_option("won")
        assert count.inner_text() == "4" and all("won against the base" in text for text in there.all_inner_texts())
        filters.nth(2).select_option("won")
        assert count.inner_text() == "0" and there.count() == 0
        assert hard_to_read(seen.page) == [] and seen.errors == []


def test_the_recipe_is_copied_and_the_contents_lead_to_their_parts(chromium: Chromium, pages: Pages) -> None:
    with drawn(chromium, pages["report-small"]) as seen:
        recipe = seen.page.locator("#recipe").inner_text()
        seen.page.get_by_role("button", name="Copy").click()
        seen.page.get_by_role("button", name="Copied").wait_for()
        assert seen.page.evaluate("getSelection().toString()").strip() == recipe.strip()
        for link in seen.page.locator("nav a").all():
            link.click()
            heading = seen.page.locator(link.get_attribute("href") or "")
            box = heading.bounding_box()
            assert heading.inner_text() == link.inner_text() and box and -1 < box["y"] < 900
        assert seen.errors == []


def test_a_window_made_narrow_is_drawn_anew(chromium: Chromium, pages: Pages) -> None:
    with drawn(chromium, pages["tune"]) as seen:
        before = seen.page.locator(".chart svg").first.bounding_box()
        assert before and before["width"] > WIDTHS["phone"]
        seen.page.set_viewport_size({"width": WIDTHS["phone"], "height": 900})
        panels = "() => [...document.querySelectorAll('.chart svg')].every((svg) => svg.viewBox.baseVal.width <= innerWidth)"
        seen.page.wait_for_function(panels)
        assert hard_to_read(seen.page) == [] and seen.errors == []


def tooltip(page: Page) -> Locator:
    return page.locator("#vg-tooltip-element.visible")


def hover(mark: Locator) -> dict[str, str]:
    """What the tooltip says when the mouse stands on the middle of the mark: name to value; nothing, where none comes."""
    page = mark.page
    page.mouse.move(0, 0)
    tooltip(page).wait_for(state="detached")
    mark.scroll_into_view_if_needed()
    box = mark.bounding_box()
    if box is None:
        return {}
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.evaluate(
        "() => new Promise((go) => requestAnimationFrame(() => requestAnimationFrame(go)))"
    )  # the move has been dispatched
    rows: list[list[str]] = (
        tooltip(page).locator("tr").evaluate_all("rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))")
    )
    return {name.rstrip(":"): value for name, value in rows}
