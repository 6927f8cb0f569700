"""A search that is logged at its end, or later, leaves the runs of one that was logged as it went on; again changes nothing."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ota_core.errors import StorageError
from tasks.experiments.search.log import search_run, whole, with_trials
from tasks.experiments.search.search import Tuned
from tasks.experiments.study.log import study_run
from tasks.tracking import outbox
from tasks.tracking.kept_run import KeptRun, Known, log_kept, log_part
from tasks.tracking.outbox import WAITS, keeping, kept, sync, tell
from tasks.tracking.run import LoggedRun
from tasks.tracking.store import resolve_store
from tests.tasks.tracking.made_up import a_merge
from tests.tasks.tracking.test_tracking_artifacts import TRIAL

TRIALS = (
    TRIAL,
    TRIAL.model_copy(
        update={
            "number": 1,
            "scores": {limit: {name: value / 2 for name, value in some.items()} for limit, some in TRIAL.scores.items()},
        }
    ),
)
PARAMS: dict[str, object] = {"seed": 1, "suite": "tiny"}
FILES: dict[str, str | bytes] = {"recipe.yaml": "a: 1\n", "plots/a.png": b"\x89PNG\x00\xff"}
TUNED = Tuned(trials=TRIALS, evaluations=2.0)


def runs(root: Path, search: str) -> list[Any]:
    """What the runs of a search hold, the search's own first."""
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    (parent,) = client.search_runs(["1"], f"tags.search = '{search}'")
    children = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    found = []
    for run in (parent, *sorted(children, key=lambda one: int(one.data.tags["trial"]))):
        curves = {
            name: sorted((one.step, one.value) for one in client.get_metric_history(run.info.run_id, name))
            for name in run.data.metrics
        }
        tags = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.") and key != "search"}
        files = sorted(one.path for one in client.list_artifacts(run.info.run_id))
        found.append((run.info.run_name, run.info.status, run.data.params, tags, curves, files))
    return found


def a_search(key: str) -> KeptRun:
    return whole(search_run("a search", key, PARAMS, None), TUNED, FILES)


def test_a_search_that_is_told_later_is_the_same(tracking: Path) -> None:
    store = resolve_store(root=tracking)
    begun, known = search_run("a search", "live", PARAMS, None), Known()
    live = log_part(begun, store)
    for trial in TRIALS:
        sofar = Tuned(trials=TRIALS[: trial.number + 1], evaluations=1.0)
        assert log_part(with_trials(begun, sofar, [trial]), store, live, known) == live
    (parent, *children) = runs(tracking, "live")
    assert parent[1] == "RUNNING" and [child[1] for child in children] == ["FINISHED"] * 2
    assert log_kept(whole(begun, TUNED, FILES), store).run_id == live.run_id
    later = a_search("later")
    read_back = type(later).model_validate_json(later.model_dump_json())
    assert read_back == later and read_back.files["plots/a.png"] == FILES["plots/a.png"]
    first = log_kept(read_back, store)
    told = runs(tracking, "later")
    assert told == runs(tracking, "live") and len(told) == 3
    assert log_kept(read_back, store) == first and runs(tracking, "later") == told


def test_a_study_comes_after_its_merges_and_labels_them(tracking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, asked = tracking.parent, []

    def away(run: Any, **_: Any) -> Any:
        asked.append(run.name)
        raise StorageError("MLflow is away")

    folder = tmp_path / "study"
    (folder / "tables").mkdir(parents=True)
    (folder / "tables" / "a.csv").write_text("x\n")
    told = study_run(
        "s", folder, config="{}", tags={"cells": "2"}, metrics={"score/avg/a": 0.5}, merges={"fp-one": "a", "fp-two": "b"}
    )
    with monkeypatch.context() as patch, keeping() as found:
        patch.setattr(outbox, "log_merge", away)
        assert [tell(a_merge(name), home=home, root=tracking) for name in ("one", "two", "three")] == [WAITS] * 3
        assert asked == ["one"] and found.away is not None, "a server that is away is asked once"
    assert [one.what.name for one in kept(home).values()] == ["one", "two", "three"]
    logged = tell(told, home=home, root=tracking)
    assert isinstance(logged, LoggedRun) and not kept(home) and list(sync(home, tracking)) == []
    client = MlflowClient(tracking_uri=f"sqlite:///{tracking}/mlflow.db")
    labelled = {run.info.run_name: run.data.tags["study.s"] for run in client.search_runs(["1"], "tags.`study.s` LIKE '%'")}
    assert labelled == {"one": "a", "two": "b"}
    assert {one.path for one in client.list_artifacts(logged.run_id)} == {"tables", "study.json"}


def test_without_keeping_it_is_an_error(tracking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise StorageError("MLflow is away")

    monkeypatch.setattr(outbox, "log_kept", away)
    run = a_search("key")
    with pytest.raises(StorageError, match=r"kept in .*run-.*ota sync"):
        tell(run, home=tracking.parent, root=tracking)
    assert [one.what for one in kept(tracking.parent).values()] == [run]
