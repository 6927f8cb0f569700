"""How far a long stage is, as the run's page shows it; and that telling it can do no harm."""

import logging
import threading
import time
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect import flow, task

from ota_core.errors import OtaError
from tasks.orchestration.run_log import Progress, ProgressBar, for_users
from tests.flows.nightly_fixture import artifacts_of


def shown(work: Callable[[], None]) -> list[tuple[str, float]]:
    """(what, percent) of the progress artifacts of a flow that does this."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    state: Any = flow(name="working")(work)(return_state=True)
    assert state.is_completed() or state.is_failed()
    chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=chosen, limit=200)
    # A flow that fails leaves its result as an artifact, too.
    return sorted((one.description, one.data) for one in found if one.type == "progress")


def test_a_short_stage_leaves_no_trace(prefect_server: None) -> None:
    def work() -> None:
        with Progress() as progress:
            for done in range(100):
                progress("merge", done, 100)
            progress("empty", 0, 0)

    assert shown(work) == []


def test_only_after_the_interval_and_not_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks.orchestration.run_log

    now, told, logged = [0.0], [], []
    monkeypatch.setattr(tasks.orchestration.run_log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(
        tasks.orchestration.run_log, "get_run_logger", lambda: SimpleNamespace(info=lambda *what: logged.append(what))
    )
    progress = Progress()
    monkeypatch.setattr(progress, "_show", lambda what, percent: told.append((what, percent)))
    for seconds, done in [(9.9, 1), (10.0, 2), (19.9, 3), (20.0, 4), (20.1, 5)]:
        now[0] = seconds
        progress("merge", done, 10)
    assert told == [("merge", 20.0), ("merge", 40.0)] and len(logged) == 2


def test_progress_from_several_threads_ends_at_one_hundred(prefect_server: None) -> None:
    def work() -> None:
        with Progress(every=0.05) as progress:

            def part(what: str) -> None:
                for done in range(10):
                    progress(what, done, 10)
                    time.sleep(0.02)

            threads = [threading.Thread(target=part, args=(what,)) for what in ("masks", "merge") for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    found = shown(work)
    assert found and {what for what, _ in found} <= {"masks", "merge"} and all(percent == 100 for _, percent in found)
    assert len({what for what, _ in found}) == len(found), "each stage has one artifact, which is updated"


def test_a_stage_that_fails_stays_where_it_was(prefect_server: None) -> None:
    def work() -> None:
        with Progress(every=0.0) as progress:
            progress("merge", 3, 10)
            raise RuntimeError("out of memory")

    assert shown(work) == [("merge", 30.0)]


def test_a_server_that_is_away_does_not_end_the_stage(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks.orchestration.run_log

    def away(**_: Any) -> None:
        raise httpx.ConnectError("no route to host")

    monkeypatch.setattr(tasks.orchestration.run_log, "create_progress_artifact", away)
    ended = []

    def work() -> None:
        with Progress(every=0.0) as progress:
            progress("merge", 3, 10)
        ended.append(True)

    assert shown(work) == [] and ended


def test_a_bar_begins_when_the_server_is_back_and_is_then_brought_up_to_date(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tasks.orchestration.run_log

    create = tasks.orchestration.run_log.create_progress_artifact
    answers = iter([httpx.ConnectError("no route to host")])

    def sometimes(**given: Any) -> Any:
        for error in answers:
            raise error
        return create(**given)

    monkeypatch.setattr(tasks.orchestration.run_log, "create_progress_artifact", sometimes)

    def work() -> None:
        bar = ProgressBar("the search")
        for percent in (10.0, 20.0, 30.0):
            bar.show(percent, f"{percent:g} trials")
            assert bar.shown == (percent > 10)

    assert shown(work) == [("30 trials", 30.0)]


def test_artifacts_by_key_or_type(prefect_server: None) -> None:
    from tasks.orchestration.shown import show_markdown, show_mlflow

    @flow
    def pages() -> None:
        show_markdown("gate", "# yes", "the gate")
        show_mlflow("linear", None)
        show_mlflow("ota", "http://mlflow/run")

    state: Any = pages(return_state=True)
    found = artifacts_of(state.state_details.flow_run_id)
    assert set(found) == {"gate", "mlflow-run"} and found["gate"].data == "# yes"
    assert found["mlflow-run"].data == "[MLflow: ota](http://mlflow/run)"


@pytest.mark.parametrize("kind", [OtaError, ValueError])
def test_a_users_mistake_is_logged_without_a_traceback_and_no_filter_stays(
    kind: type[Exception], prefect_server: None, caplog: pytest.LogCaptureFixture
) -> None:
    loggers = [logging.getLogger(name) for name in ("prefect.flow_runs", "prefect.task_runs")]

    @task
    def part() -> None:
        raise kind("no such recipe")

    @for_users
    @flow
    def inner(count: int = 1) -> None:
        part()

    @for_users
    @flow
    def outer() -> None:
        inner()

    with pytest.raises(kind, match="no such recipe"):
        outer()
    shown = [record for record in caplog.records if record.exc_info]
    assert len(shown) == (0 if kind is OtaError else 3)
    assert "no such recipe" in caplog.text, "the line on the final state names it"
    assert {type(one).__module__ for logger in loggers for one in logger.filters} <= {"prefect.logging.filters"}
    assert inner.parameters.properties["count"]["default"] == 1 and inner.version == outer.version is not None


@pytest.mark.parametrize("kind", [OtaError, KeyError])
def test_an_error_that_a_flow_keeps_holds_no_secret_of_an_address(
    kind: type[Exception], prefect_server: None, caplog: pytest.LogCaptureFixture
) -> None:
    """An OtaError says nothing of its cause; of any other error the message and its causes are whatever a library wrote."""

    @for_users
    @flow
    def asks() -> None:
        try:
            raise ConnectionError("no answer from https://me:hunter2@host/x")
        except ConnectionError as error:
            raise kind("no answer") from error

    state: Any = asks(return_state=True)
    error = state.result(raise_on_failure=False)
    assert "no answer" in str(error) and "hunter2" not in state.message + caplog.text
    assert "hunter2" not in "".join(traceback.format_exception(error))
    assert error.__cause__ is None and error.__context__ is None


def test_flows_that_a_deployed_flow_calls_carry_its_tags(prefect_server: None) -> None:
    """By them the automation finds those whose process has died."""
    from prefect.client.orchestration import get_client
    from prefect.flow_engine import run_flow
    from prefect.runtime import flow_run

    seen: list[list[str]] = []

    @flow(name="called")
    def called() -> None:
        seen.append(flow_run.tags)

    @flow(name="deployed")
    def deployed() -> None:
        called()

    deployed = for_users(deployed)
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(deployed, tags=["ota"])
    run_flow(deployed, flow_run=run)
    assert seen == [["ota"]]
