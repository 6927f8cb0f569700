"""A search that dies while it logs: what its repeat logs is the same, each point of a curve once."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from tasks.experiments.search.log import search_run, whole, with_trials
from tasks.experiments.search.search import Tuned
from tasks.tracking.kept_run import log_kept, log_part
from tasks.tracking.run import LoggedRun
from tasks.tracking.store import resolve_store
from tests.tasks.tracking.test_tracking_artifacts import RECIPE, TRIAL

TUNED = Tuned(trials=(TRIAL,), evaluations=1.0)


class Died(BaseException):
    """Nothing catches it, as nothing catches a kill."""


def log_all(root: Path) -> LoggedRun:
    store, run = resolve_store(root=root), search_run("a search", "key", {"seed": 1}, None)
    begun = log_part(run, store)
    log_part(with_trials(run, TUNED, TUNED.trials), store, begun)
    assert log_kept(whole(run, TUNED, {"best.yaml": RECIPE.to_yaml()}), store) == begun
    return begun


@pytest.mark.parametrize(
    ("call", "nth"),
    [("create_run", 2), ("log_batch", 2), ("log_batch", 3), ("log_artifacts", 1), ("log_artifacts", 2), ("set_terminated", 1)],
)
def test_a_search_that_died_while_it_logged_has_every_point_once(
    tracking: Path, monkeypatch: pytest.MonkeyPatch, call: str, nth: int
) -> None:
    real, calls = getattr(MlflowClient, call), []

    def dies(*arguments: object, **options: object) -> object:
        found = real(*arguments, **options)
        calls.append(call)
        if len(calls) == nth:
            raise Died
        return found

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, dies)
        with pytest.raises(Died):
            log_all(tracking)
    logged = log_all(tracking)
    assert log_all(tracking) == logged, "and once more, when all is there"
    client = MlflowClient(tracking_uri=f"sqlite:///{tracking}/mlflow.db")
    runs = {run.info.run_name: run for run in client.search_runs([logged.experiment_id])}
    assert set(runs) == {"a search", "trial 0"} and {run.info.status for run in runs.values()} == {"FINISHED"}
    for name, steps in {"a search": 0, "trial 0": 8}.items():
        for metric in runs[name].data.metrics:
            assert [one.step for one in client.get_metric_history(runs[name].info.run_id, metric)] == [steps], metric
    assert runs["a search"].data.metrics["best/avg"] == 0.5
