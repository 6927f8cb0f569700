"""Fixtures of the flows' tests."""

from types import SimpleNamespace
from typing import Any

import pytest

from flows.stage import stage
from tasks.orchestration import executors
from tests.flows.merge_fixture import counts as counts
from tests.flows.merge_fixture import empty_mlflow as empty_mlflow
from tests.flows.merge_fixture import world as world


@pytest.fixture
def worker_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A GPU pool whose worker is this process; the names of what was sent. As on a server, a key that is known gets its run of before."""
    sent: list[str] = []
    known: dict[str, Any] = {}

    def run_deployed(deployment: str, **options: Any) -> Any:
        if options["key"] not in known:
            sent.append(options["name"])
            known[options["key"]] = stage(**options["parameters"], return_state=True)
        return SimpleNamespace(state=known[options["key"]])

    monkeypatch.setattr(executors, "run_deployed", run_deployed)
    return sent
