"""The system's Chromium without a window, driven by Playwright: what a page complains of, what it asks for, how it looks.

Playwright brings no browser along here and loads none: it drives the one that is installed (Debian's package ``chromium``), or the tests
that need it skip and say so. No name is resolved but the loopback's, so that a page that needs a network fails to draw, and every address
that it asks for is kept.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Locator, Page

SCREENSHOTS = Path(os.environ.get("OTA_SCREENSHOTS", Path(__file__).parents[4] / ".ota" / "screenshots"))
"""Where what the browser saw is kept, to be looked at; git ignores it."""
WIDTHS = {"desktop": 1280, "phone": 390}
"""In pixels of the page."""
PATIENCE = 120_000
"""Milliseconds until a condition counts as never met: two loaded cores are slow, and nothing waits longer than it must."""
_ALONE = "MAP * ~NOTFOUND , EXCLUDE 127.0.0.1 , EXCLUDE localhost"
_HERE = {"127.0.0.1", "localhost", "[::1]", "::1"}


@dataclass
class Seen:
    """A page in the browser, with all that it complained of and asked for since it was opened."""

    page: Page
    errors: list[str] = field(default_factory=list)
    """Messages of the console at the level of errors, and uncaught exceptions."""
    asked: list[str] = field(default_factory=list)
    """Addresses of all requests."""

    @property
    def outside(self) -> list[str]:
        """What was asked of anything but this machine."""
        parts = [(url, urlsplit(url)) for url in self.asked]
        return [url for url, part in parts if part.scheme not in {"file", "data", "blob", "about"} and part.hostname not in _HERE]

    def shot(self, name: str, *, whole: bool = True) -> Path:
        """A screenshot, of the whole page or of what the window shows."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path, full_page=whole, animations="disabled")
        return path

    def rows(self, within: str = "main") -> list[list[str]]:
        """The cells of all rows of all tables, as they stand on the page."""
        found: list[list[str]] = self.page.locator(f"{within} tr").evaluate_all(
            "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
        )
        return found


@dataclass
class Chromium:
    """One browser for the tests of a file."""

    browser: Browser

    @contextmanager
    def open(self, address: str | Path, width: str = "desktop", *, height: int = 900) -> Iterator[Seen]:
        """A fresh profile with one page in a window of this width, loaded."""
        context = self.browser.new_context(
            viewport={"width": WIDTHS[width], "height": height}, service_workers="block", locale="en-GB", timezone_id="UTC"
        )
        context.set_default_timeout(PATIENCE)
        try:
            page = context.new_page()
            seen = Seen(page)
            context.on("request", lambda request: seen.asked.append(request.url))
            page.on("console", lambda message: seen.errors.extend(_error(message)))
            page.on("pageerror", lambda error: seen.errors.append(f"uncaught: {error}"))
            page.goto(address.absolute().as_uri() if isinstance(address, Path) else address)
            yield seen
        finally:
            context.close()


def _error(message: ConsoleMessage) -> list[str]:
    return [f"{message.text} ({message.location.get('url', '')})"] if message.type == "error" else []


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    """Closed with its file's tests: while Playwright's loop runs in this thread, Prefect would take itself to be called from it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'ota-merging[dev]'")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if binary is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=binary, args=[f"--host-resolver-rules={_ALONE}"], timeout=PATIENCE)
        yield Chromium(browser)
        browser.close()


def marks(chart: Locator) -> Locator:
    """The drawn things of a chart, from the front to the back: bars, points, cells, lines."""
    return chart.locator("g.mark-rect > path, g.mark-symbol > path, g.mark-line > path, g.mark-area > path, g.mark-arc > path")
