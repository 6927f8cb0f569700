"""What a person sees of a night in a browser: Prefect's form, run and artifacts, MLflow's table, comparison and report.

Their pages are others' work, and so are some of their complaints: what is known of these is listed here, everything else counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from tasks.registry.promotion import Version
from tasks.tracking.store import connect, page_url, resolve_store
from tests.flows.nightly_fixture import artifacts_of
from tests.flows.stack.test_operations import Operations
from tests.flows.stack.test_operations import operations as operations
from tests.tasks.pages.seen.chromium import WIDTHS, Chromium, Seen, marks
from tests.tasks.pages.seen.chromium import chromium as chromium

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow

KNOWN = (
    "/favicon.ico",  # Prefect's page names an icon that its server does not have,
    "/ico/undefined.svg",  # and one for a state that it has not read yet
    "/ajax-api/2.0/mlflow/users/current",  # MLflow asks for a user before it knows that there are none
    "ResizeObserver loop completed with undelivered notifications",  # a notice of the browser, of MLflow's table
)
MODELS = ["base", "knowledge", "math", "ota rho=0.80", "linear"]


@dataclass(frozen=True)
class Told:
    """What the servers hold of the night, to be found again on their pages."""

    prefect: str
    mlflow: str
    run: Any
    artifacts: dict[str, Any]
    champion: Version
    form: Any
    """The merge deployment."""
    merges: dict[str, Any]
    """Name of each merge's MLflow run to the run."""

    @property
    def scores(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = json.loads(self.artifacts["scores"].data)
        return found


@pytest.fixture(scope="module")
def night(operations: Operations) -> Told:
    """One night on the stack, started in a thread of its own: where the browser is driven a loop runs already, and Prefect would hand out coroutines."""
    from prefect.client.orchestration import get_client

    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(copy_context().run, operations.nightly).result()
    assert run.state.name == "Promoted", (run.state.message, operations.live.logs())
    champion = operations.champion()
    assert champion is not None
    with get_client(sync_client=True) as client:
        form = client.read_deployment_by_name("merge/merge")
    urls = operations.live.stack.urls
    runs = connect(resolve_store(tracking_uri=urls["mlflow"]))
    experiment = runs.get_run(champion.run_id).info.experiment_id
    found = runs.search_runs([experiment])
    merges = {one.info.run_name: one for one in found if "mlflow.parentRunId" not in one.data.tags}
    return Told(urls["prefect"], urls["mlflow"], run, artifacts_of(run.id), champion, form, merges)


@contextmanager
def at(chromium: Chromium, address: str, width: str, name: str) -> Iterator[Seen]:
    """A page of a server. When the test has found on it what it looked for, it is kept, and had nothing to complain of."""
    with chromium.open(address, width) as seen:
        yield seen
        seen.shot(f"{name}-{width}")
        assert [error for error in seen.errors if not any(known in error for known in KNOWN)] == []
        assert seen.outside == [], "nothing but this machine is asked"


def sideways(page: Page) -> int:
    """By how many pixels the page can be pushed sideways."""
    found: int = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return found


@pytest.mark.parametrize("width", WIDTHS)
def test_the_form_explains_every_parameter_and_its_menus_open(chromium: Chromium, night: Told, width: str) -> None:
    properties = night.form.parameter_openapi_schema["properties"]
    with at(chromium, f"{night.prefect}/deployments/deployment/{night.form.id}/run", width, "prefect-form") as seen:
        page = seen.page
        for name, one in properties.items():
            page.get_by_text(one["description"].strip().split("\n")[0], exact=False).first.wait_for(state="attached")
            assert page.get_by_text(re.compile(rf"^{re.escape(one.get('title') or name)}( \(Optional\))?$", re.I)).count(), name
        recipe = night.form.parameters["recipe"]
        text = page.locator("textarea, input").evaluate_all("fields => fields.map(field => field.value)")
        assert recipe["base_model"] in text and all(model["model"] in text for model in recipe["models"]), "what it starts with"
        choose(page, re.compile(r"^\s*ota\s*$"), "linear")
        page.locator(".p-select-button", has_text=re.compile(r"^\s*linear\s*$")).wait_for()
        assert sideways(page) == 0


def choose(page: Page, now: re.Pattern[str] | str, name: str) -> None:
    """Another entry of one of Prefect's menus, which shows the present one; opened by the keyboard."""
    page.locator(".p-select-button", has_text=now).first.get_by_role("button").focus()
    page.keyboard.press("Space")
    page.locator(".p-select-option", has_text=re.compile(rf"^\s*{re.escape(name)}\s*$")).click()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_nights_run_shows_its_state_its_tasks_and_its_artifacts(chromium: Chromium, night: Told, width: str) -> None:
    with at(chromium, f"{night.prefect}/runs/flow-run/{night.run.id}", width, "prefect-night") as seen:
        page = seen.page
        page.get_by_text(night.run.name).first.wait_for()
        page.get_by_text("Promoted").first.wait_for()
        page.locator("canvas").first.wait_for()
        assert sideways(page) == 0
        if width == "desktop":  # where there is room for tabs
            page.get_by_text("Task Runs", exact=True).last.click()
            page.get_by_text("publish and promote ota rho=0.80").first.wait_for()
            page.get_by_text("Artifacts", exact=True).last.click()
            page.get_by_text("ota rho=0.80 is the new champion").first.wait_for()
            page.get_by_text("Tonight's candidates").first.wait_for()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_artifacts_hold_the_numbers_of_the_night(chromium: Chromium, night: Told, width: str) -> None:
    metrics = {name.split()[0]: run.data.metrics for name, run in night.merges.items()}
    with at(chromium, f"{night.prefect}/artifacts/artifact/{night.artifacts['scores'].id}", width, "prefect-scores") as seen:
        seen.page.get_by_text("Tonight's candidates").first.wait_for()
        seen.page.locator("td").first.wait_for()
        rows = {row[0]: row for row in seen.rows("body")}
        assert [name for name in rows if name in MODELS] == MODELS
        for name in ("ota rho=0.80", "linear"):
            assert rows[name][3].startswith(f"{100 * metrics[name.split()[0]]['score/avg']:.1f} ±"), "as MLflow has it"
        assert all(list(one.values()) == rows[one["model"]] for one in night.scores)
        assert sideways(seen.page) == 0
    with at(chromium, f"{night.prefect}/artifacts/artifact/{night.artifacts['gate'].id}", width, "prefect-gate") as seen:
        seen.page.get_by_role("heading", name="ota rho=0.80: promoted to champion").wait_for()
        seen.page.get_by_role("heading", name="linear: kept as challenger").wait_for()
        rows_of = [row[:3] for row in seen.rows("body")]
        assert ["math", "base", "16"] in rows_of and ["knowledge", "base", "16"] in rows_of
        seen.page.get_by_role("link", name="MLflow run").first.wait_for()
        assert sideways(seen.page) == 0


def test_mlflows_table_of_runs_shows_the_scores(chromium: Chromium, night: Told) -> None:
    """In a wide window: MLflow has no layout for a phone."""
    experiment = next(iter(night.merges.values())).info.experiment_id
    with at(chromium, page_url(night.mlflow, experiment), "desktop", "mlflow-runs") as seen:
        for run in night.merges.values():
            seen.page.get_by_text(run.info.run_name).first.wait_for()
        for name in ("score/avg", "score/knowledge"):
            seen.page.get_by_text(name).first.wait_for()
        cells = seen.page.get_by_role("gridcell")
        cells.filter(has_text=re.compile(r"^0\.\d+$")).first.wait_for()
        shown = [float(text) for text in cells.all_inner_texts() if re.fullmatch(r"[\d.]+", text)]
        assert all(pytest.approx(run.data.metrics["score/avg"], abs=1e-4) in shown for run in night.merges.values())


def test_mlflows_comparison_draws_both_merges(chromium: Chromium, night: Told) -> None:
    ids = [run.info.run_id for run in night.merges.values()]
    experiment = next(iter(night.merges.values())).info.experiment_id
    query = f"runs={quote(json.dumps(ids))}&experiments={quote(json.dumps([experiment]))}"
    with at(chromium, f"{night.mlflow}/#/compare-runs?{query}", "desktop", "mlflow-compare") as seen:
        seen.page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
        seen.page.locator(".js-plotly-plot svg, .js-plotly-plot canvas").first.wait_for()
        rows = {row[0]: row[1:] for row in seen.rows("body") if row}
        assert rows["merge_method"] == [run.data.params["merge_method"] for run in night.merges.values()]
        seen.page.get_by_text("gate/difference/base/math", exact=True).first.wait_for(state="attached")
        text = seen.page.locator("body").inner_text().split()  # of metrics, those in sight: the table holds no others
        for run in night.merges.values():
            differences = [value for name, value in run.data.metrics.items() if name.startswith("gate/difference/base/")]
            assert differences and all(f"{value:.3f}" in text for value in differences)
        seen.page.get_by_role("tab", name="Scatter Plot").click()
        seen.page.locator(".js-plotly-plot:visible").first.wait_for()


def test_mlflow_shows_the_card_and_the_report_of_the_champion(chromium: Chromium, night: Told) -> None:
    run = next(run for run in night.merges.values() if run.info.run_id == night.champion.run_id)
    address = page_url(night.mlflow, run.info.experiment_id, run.info.run_id)
    with at(chromium, address, "desktop", "mlflow-run") as seen:
        seen.page.get_by_text("score/avg", exact=True).first.wait_for(state="attached")
        seen.page.get_by_role("heading", name=re.compile(re.escape(run.info.run_name))).first.wait_for()
        assert not seen.page.get_by_text("pipeline_tag").count(), "the card's YAML is no description"
    with at(chromium, f"{address}/artifacts/report.html", "desktop", "mlflow-report") as seen:
        report = seen.page.frame_locator("iframe").first
        report.locator("html[data-drawn=yes]").wait_for(state="attached")
        assert report.locator(".verdict.good").inner_text().startswith("Promoted to champion.")
        charts = report.locator(".chart").all()
        assert len(charts) > 5 and all(marks(chart).count() > 0 for chart in charts)
        bar = marks(charts[0]).first
        bar.hover(force=True)
        report.locator("#vg-tooltip-element.visible").wait_for()
