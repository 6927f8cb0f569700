"""A real MLflow server that is stopped while a search or a tuning goes on, and started again: the runs that it has half of are completed."""

from contextlib import ExitStack
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ota_core.errors import StorageError
from ota_core.recipe.recipe import load_recipe
from tasks.experiments.live import Live
from tasks.tracking.kept_run import KeptRun
from tasks.tracking.outbox import kept, sync
from tasks.tracking.run import LoggedRun
from tests.flows import test_search_flow as searches
from tests.flows import test_tune_flow as tunings
from tests.flows.merge_fixture import World
from tests.servers import mlflow_server

here = tunings.here


def test_a_tuning_whose_server_goes_away_completes_its_run(here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, log, steps = tmp_path / "tuned.yaml", Live.log, list[int]()
    (folder := tmp_path / "server").mkdir()

    def logged(live: Live, part: KeptRun) -> None:
        if part.points == {3: part.points.get(3)}:
            running.close()
        log(live, part)
        steps.extend(part.points)

    with ExitStack() as running, monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", running.enter_context(mlflow_server(folder)))
        patch.setattr(Live, "log", logged)
        with pytest.raises(StorageError, match=tunings.KEPT.format(out=out)):
            tunings.run(here, tunings.config(here), out)
    assert load_recipe(out).scales is not None and steps == [0, 1, 2, 3, 4], "it went on"
    with mlflow_server(folder) as url:
        client = MlflowClient(url)
        (half,) = client.search_runs([client.get_experiment_by_name("ota-merging").experiment_id])
        assert half.info.status == "RUNNING" and tunings.curves(client, half.info.run_id)["loss/train/math"] == [1, 2]
        ((_, found),) = sync(here.home, here.home / "tracking", url)
        (whole,) = client.search_runs([half.info.experiment_id])
        assert isinstance(found, LoggedRun) and found.run_id == whole.info.run_id == half.info.run_id and not kept(here.home)
        assert whole.info.status == "FINISHED" and whole.data.tags["best_step"] and whole.data.params["objective"] == "mean"
        assert tunings.curves(client, found.run_id) == tunings.CURVES
        assert {one.path for one in client.list_artifacts(found.run_id)} == tunings.FILES


@pytest.mark.slow
def test_a_search_whose_server_goes_away_completes_its_runs(here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder := tmp_path / "server").mkdir()
    patiently, asked = Live.log_patiently, list[str]()

    def logged(live: Live, part: KeptRun, what: str) -> None:
        asked.append(what)
        if what == "trial 1":
            running.close()
        patiently(live, part, what)

    with ExitStack() as running, monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", running.enter_context(mlflow_server(folder)))
        patch.setattr(Live, "log_patiently", logged)
        with pytest.raises(StorageError, match=r"(?s)MLflow at .* failed while logging 'search ota.*kept in .*unsent.*ota sync"):
            searches.run(here, searches.config(here, budget={"trials": 3, "rungs": [4, 8]}))
    assert asked == ["trial 0", "trial 1", "trial 2"], "it went on"
    with mlflow_server(folder) as url:
        client = MlflowClient(url)
        experiment = client.get_experiment_by_name("ota-merging").experiment_id
        before = {one.info.run_name: one for one in client.search_runs([experiment])}
        assert len(before) == 2 and before["trial 0"].info.status == "FINISHED"
        ((_, found),) = sync(here.home, here.home / "tracking", url)
        after = {one.info.run_name: one for one in client.search_runs([experiment])}
        assert len(after) == 4 and {one.info.status for one in after.values()} == {"FINISHED"} and not kept(here.home)
        assert isinstance(found, LoggedRun)
        assert all(after[name].info.run_id == one.info.run_id for name, one in before.items())
        assert [one.step for one in client.get_metric_history(found.run_id, "best/avg")] == [0, 1, 2]
