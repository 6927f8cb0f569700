"""What becomes of files for a bucket that refuses them: one clear error from every function that logs, and a repeat that goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from ota_core.errors import StorageError
from ota_core.recipe.recipe import MergeRecipe
from tasks.experiments.search.log import search_run, whole, with_trials
from tasks.experiments.search.search import Trial, Tuned
from tasks.experiments.study.log import study_run
from tasks.registry.promotion import log_decision
from tasks.tracking.kept_run import log_kept, log_part
from tasks.tracking.merge import log_benchmark, log_merge
from tasks.tracking.names import EXPERIMENT
from tasks.tracking.store import connect, resolve_store
from tests.servers import S3Test
from tests.tasks.experiments.leaderboard.leaderboard_fixture import coins, model_scores
from tests.tasks.registry.registry_fixture import a_decision
from tests.tasks.tracking.made_up import a_merge

RECIPE = MergeRecipe.model_validate({"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]})
TRIAL = Trial(number=0, origin="recipe", values={}, recipe=RECIPE, scores={8: {"math": 0.5}}, floors={}, complete=True)


@pytest.fixture
def root(s3_server: S3Test, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with a database whose runs keep their files in a bucket that is not there."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = connect(resolve_store(root=tmp_path))
    client.create_experiment(EXPERIMENT, artifact_location=f"{s3_server.uri}-away/runs")
    return tmp_path


def merge(root: Path) -> None:
    log_merge(a_merge(), root=root)


def benchmark(root: Path) -> None:
    log_benchmark("m", source="s3://m", digest="d", fingerprint="f", scores=model_scores(coins(1, math=0.5)), root=root)


def study(root: Path) -> None:
    folder = root / "study"
    folder.mkdir(exist_ok=True)
    (folder / "table.csv").write_text("a\n")
    log_kept(study_run("s", folder, config="{}", tags={}, metrics={}, merges={}), resolve_store(root=root))


SEARCH = search_run("a search", "key", {}, None)
TUNED = Tuned(trials=(TRIAL,), evaluations=1.0)


def trial(root: Path) -> None:
    log_part(with_trials(SEARCH, TUNED, TUNED.trials), resolve_store(root=root))


def winner(root: Path) -> None:
    ended = whole(SEARCH, TUNED, {"best.yaml": RECIPE.to_yaml()})
    log_kept(ended.model_copy(update={"children": ()}), resolve_store(root=root))


def decision(root: Path) -> None:
    log_decision(log_part(SEARCH, resolve_store(root=root)).run_id, a_decision(), root=root)


@pytest.mark.parametrize(
    ("log", "what", "safe"),
    [
        (benchmark, "scores.json", "The scores are kept as an artifact."),
        (study, "the files of study s", "Its tables and figures lie in "),
        (trial, "the files of trial 0", "The search itself keeps every trial"),
        (winner, "the files of a search", "The search itself keeps every trial"),
        (decision, "gate.json, gate.md", "The champion is the old one or the new one"),
        (merge, "MLflow's description of the model 'base'", "The weights lie at s3://"),
    ],
)
def test_a_bucket_that_refuses_is_a_clear_error(
    root: Path, s3_server: S3Test, log: Callable[[Path], Any], what: str, safe: str
) -> None:
    with pytest.raises(StorageError) as caught:
        log(root)
    message = str(caught.value)
    assert message.startswith(f"{what} could not be stored at {s3_server.uri}-away/runs/")
    assert "NoSuchBucket" in message and safe in message and message.endswith("then run the same again")
    assert "\n" not in message

    s3_server.client.create_bucket(Bucket=f"{s3_server.bucket}-away")
    log(root)
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    assert "FAILED" not in {run.info.status for run in client.search_runs([experiment])}
