"""A temporary Prefect server for the session, and what it says of the runs that it saw."""

import time
from collections.abc import Iterator
from uuid import UUID

import pytest


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A server of our own, with results in a temporary folder: nothing of the user's Prefect is read or written."""
    from prefect.settings import PREFECT_HOME, PREFECT_LOCAL_STORAGE_PATH, PREFECT_SERVER_ANALYTICS_ENABLED, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    home = tmp_path_factory.mktemp("prefect")
    settings = {PREFECT_HOME: home, PREFECT_LOCAL_STORAGE_PATH: home / "storage", PREFECT_SERVER_ANALYTICS_ENABLED: False}
    with temporary_settings(updates=settings), prefect_test_harness(server_startup_timeout=120):
        yield


def task_states(flow_run_id: UUID, *, seconds: float = 60) -> dict[str, list[str]]:
    """Task run's name to the names of its final states, in the order of their starts: usually one, such as Cached.

    Task runs reach the server as events, some time after they end.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    end = time.monotonic() + seconds
    seen = -1
    with get_client(sync_client=True) as client:
        while True:
            runs = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id])), limit=200)
            if runs and len(runs) == seen and all(run.state is not None and run.state.is_final() for run in runs):
                break
            assert time.monotonic() < end, f"task runs that did not end: {[(run.name, run.state_name) for run in runs]}"
            seen = len(runs)
            time.sleep(0.3)
    states: dict[str, list[str]] = {}
    for run in sorted(runs, key=lambda run: run.start_time or run.expected_start_time):
        states.setdefault(run.name, []).append(run.state_name)
    return states


def flow_run_name(flow_run_id: UUID) -> str:
    """The name that the server shows for a flow run."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_flow_run(flow_run_id).name
