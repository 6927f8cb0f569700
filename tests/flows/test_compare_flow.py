"""The flow that ranks an experiment: its summary run on embedded SQLite, and on a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from flows.compare import Comparison, compare_flow
from tasks.tracking.merge import log_merge
from tests.servers import flow_run_name, mlflow_server
from tests.tasks.experiments.leaderboard.leaderboard_fixture import BASE, EXPERTS, coins, log_some, scored_merge, some_merges

FILES = ["leaderboard.csv", "leaderboard.html", "leaderboard.md", "leaderboard.parquet", "leaderboard.png"]


def compare(tracking: Path, **options: object) -> Comparison:
    return compare_flow(home=tracking.parent, **options)  # type: ignore[return-value]


def test_a_summary_run_that_follows_its_experiment(prefect_server: None, tracking: Path, tmp_path: Path) -> None:
    log_some(tracking)
    client = MlflowClient(tracking_uri=f"sqlite:///{tracking}/mlflow.db")
    state = compare_flow(home=tracking.parent, out=tmp_path / "out", return_state=True)
    found: Comparison = state.result()
    assert flow_run_name(state.state_details.flow_run_id) == "compare ota-merging"
    assert (found.best, found.merges) == ("ota rho=0.40", 3) and sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    run = client.get_run(found.logged.run_id)
    assert (run.info.status, run.data.tags["role"], run.data.tags["best_run"]) == ("FINISHED", "leaderboard", found.best_run)
    best = client.get_run(found.best_run)
    for name in ("score/avg", "score/math", "retention/code", "negative_transfer"):
        assert run.data.metrics[name] == pytest.approx(best.data.metrics[name])
    assert run.data.metrics["merges"] == 3 and "| ota rho=0.40 |" in run.data.tags["mlflow.note.content"]
    assert sorted(Path(f.path).name for f in client.list_artifacts(found.logged.run_id, "leaderboard")) == FILES
    table = pd.read_parquet(client.download_artifacts(found.logged.run_id, "leaderboard/leaderboard.parquet", str(tmp_path)))
    assert table["score/avg"].iloc[0] == pytest.approx(found.score)

    # The same merges again: the same run, and nothing new in it. The summary is no merge.
    assert compare(tracking) == found
    assert len(client.get_metric_history(found.logged.run_id, "score/avg")) == 1
    # A better merge: the same run, with another point and another best.
    log_merge(scored_merge("ota rho=0.20", coins(7, math=0.95, code=0.9), base=BASE, experts=EXPERTS), root=tracking)
    grown = compare(tracking)
    assert grown.logged == found.logged and (grown.best, grown.merges) == ("ota rho=0.20", 4)
    assert [m.value for m in client.get_metric_history(grown.logged.run_id, "score/avg")] == [found.score, grown.score]
    assert len(json.loads(client.get_run(grown.logged.run_id).data.tags["leaderboard_runs"])) == 4
    # Another question is another run.
    assert compare(tracking, filter_string="params.density = '1.0'").logged.run_id != found.logged.run_id


@pytest.mark.slow
def test_on_a_server(prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with mlflow_server(tmp_path) as url:
        for run in some_merges().values():
            log_merge(run, tracking_uri=url)
        found: Comparison = compare_flow(home=tmp_path, tracking_uri=url)  # type: ignore[assignment]
        assert found.logged.url == f"{url}/#/experiments/{found.logged.experiment_id}/runs/{found.logged.run_id}"
        client = MlflowClient(tracking_uri=url)
        page = Path(client.download_artifacts(found.logged.run_id, "leaderboard/leaderboard.html", str(tmp_path))).read_text()
        table = pd.read_csv(client.download_artifacts(found.logged.run_id, "leaderboard/leaderboard.csv", str(tmp_path)))
    assert "ota rho=0.40" in page and table["difference"].notna().sum() == 2
