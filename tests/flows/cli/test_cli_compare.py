"""ota compare as a person types it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from tasks.tracking.merge import log_merge
from tests.flows.cli.typed import invoke, ota, refused
from tests.tasks.experiments.leaderboard.leaderboard_fixture import BASE, EXPERTS, coins, log_some, scored_merge


@pytest.fixture(autouse=True)
def _home(tracking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTA_HOME", str(tracking.parent))
    monkeypatch.setenv("COLUMNS", "140")
    log_some(tracking)


def test_prints_and_writes(tracking: Path, tmp_path: Path) -> None:
    result = ota("compare", "--out", tmp_path / "out", "--baseline", "linear", "--no-log")
    assert "Leaderboard of ota-merging" in result.stdout and "ties rho=0.50" in result.stdout and "to 'linear'" in result.stdout
    table = pd.read_csv(tmp_path / "out" / "leaderboard.csv")
    assert list(table["label"]) == ["ota rho=0.40", "ties rho=0.50", "linear", "base"]
    for path in (tmp_path / "out").iterdir():
        assert str(path) in result.stdout
    client = MlflowClient(tracking_uri=f"sqlite:///{tracking}/mlflow.db")
    asked = {"experiment_ids": ["1"], "filter_string": "tags.role = 'leaderboard'"}
    assert not client.search_runs(**asked), "MLflow is only read"
    result = invoke("compare")
    assert result.exit_code == 0 and client.search_runs(**asked)[0].info.run_id in result.stdout


def test_mistakes_end_with_their_message_and_write_nothing(tracking: Path, tmp_path: Path) -> None:
    log_merge(scored_merge("ota quick", coins(8, math=0.9, code=0.9), base=BASE, experts=EXPERTS, limit=50), root=tracking)
    for arguments, message in (
        ((), "choose one with --suite"),
        (("nothing",), "no experiment 'nothing'"),
        (("--filter", "params.density >"), "MLflow's filters look like"),
        (("--last", 1, "--baseline", "linear"), "none of the merges compared"),
        (("--since", "never"), "expected a date"),
    ):
        assert message in refused("compare", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
