"""The flow around its benchmark: the smoke test before it, which a broken merge does not pass, and the documents that it leaves."""

import json
from collections import Counter
from pathlib import Path

from mlflow import MlflowClient

from tasks.evaluation.kept import read_all
from tasks.settings import Places, places
from tests.flows.merge_fixture import World


def here_places(world: World) -> Places:
    return places(world.home, None)


def test_base_and_merge_are_tried_once_before_the_benchmark(world: World, counts: Counter[str], tmp_path: Path) -> None:
    here = world.at(tmp_path / "home")
    first = here.run(world.recipe("linear"), smoke=True)
    assert first.outcome.smoke.passed and {"smoke-test base", "smoke-test linear"} <= set(first.states)
    assert counts["score"] == 4
    assert here.run(world.recipe("linear"), smoke=True).computed() == []
    other = here.run(world.recipe("linear", normalize=False), smoke=True)
    assert [name for name in other.computed() if name.startswith("smoke")] == ["smoke-test linear normalize=false"]
    run = MlflowClient(tracking_uri=world.tracking_uri).get_run(first.outcome.logged.run_id)
    assert run.data.metrics["smoke/passed"] == 1 and run.data.tags["smoke"].startswith("The smoke test passed.")


def test_a_broken_merge_is_logged_and_not_benchmarked(world: World, counts: Counter[str], tmp_path: Path) -> None:
    here = world.at(tmp_path / "home")
    outcome = here.run(world.recipe("task_arithmetic", **{"lambda": 1e18}), smoke=True, report="scores").outcome
    assert not outcome.smoke.passed and set(outcome.smoke.failures) == {"finite"}
    assert outcome.scores == {} and counts["score"] == 0
    run = MlflowClient(tracking_uri=world.tracking_uri).get_run(outcome.logged.run_id)
    assert run.data.metrics["smoke/passed"] == 0 and "score/avg" not in run.data.metrics
    page = (Path(outcome.path) / "report.html").read_text()
    assert "The smoke test failed: finite: logits after" in page and "It was not benchmarked." in page


def test_documents_are_a_table_of_the_run_and_a_page_beside_the_model(world: World, tmp_path: Path) -> None:
    here = world.at(tmp_path / "home")
    outcome = here.run(world.recipe("linear"), report="scores").outcome
    client = MlflowClient(tracking_uri=world.tracking_uri)
    run = client.get_run(outcome.logged.run_id)
    shown = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": path, "type": "table"} for path in ("tables/scores.json", "tables/documents.json")]
    held = json.loads(Path(client.download_artifacts(run.info.run_id, "tables/documents.json", str(tmp_path))).read_text())
    rows = [dict(zip(held["columns"], row, strict=True)) for row in held["data"]]
    scores = read_all(here_places(here), outcome.scores)
    assert len(rows) == sum(scores["merged"].documents.values()) and run.data.tags["documents"].startswith(
        f"{len(rows)} of {len(rows)} documents"
    )
    for row in rows:
        own = {"math": "expert/math", "knowledge": "expert/knowledge"}[row["capability"]]
        for which, key in (("base", "base"), ("expert", own), ("merge", "merged")):
            assert row[which] == scores[key].samples[row["capability"]][row["task"]][row["document"]]
        assert row["prompt"] and row["target"] and row["expert_name"] == own.removeprefix("expert/")
    page = (Path(outcome.path) / "documents.html").read_text()
    assert page.count('<article class="document"') == sum(
        row["against_base"] in {"won", "lost"} or row["against_expert"] in {"won", "lost"} for row in rows
    )
    assert "Documents that flipped" in (Path(outcome.path) / "report.html").read_text()
    (data,) = [one for one in run.inputs.dataset_inputs if one.tags[0].value == "data"]
    profile = json.loads(data.dataset.profile)
    assert profile["num_rows"] == len(rows) and profile["suite_digest"] == scores["merged"].suite_digest
    children = client.search_runs(["1"], filter_string=f"tags.mlflow.parentRunId = '{run.info.run_id}'")
    assert len(children) == 4 and all(child.inputs.dataset_inputs[0].dataset.digest == data.dataset.digest for child in children)


def test_a_suite_that_keeps_no_documents_shows_none(world: World, tmp_path: Path) -> None:
    suite = tmp_path / "quiet.yaml"
    suite.write_text(world.suite.read_text().replace("name: tiny", "name: tiny\ndocuments: false"))
    (tmp_path / "tiny").symlink_to(world.suite.parent / "tiny")
    here = world.at(tmp_path / "home")
    outcome = here.run(world.recipe("task_arithmetic", **{"lambda": 0.25}), suite=str(suite), report="scores").outcome
    assert not (Path(outcome.path) / "documents.html").exists()
    assert not list((here.home / "artifacts" / "scores").rglob("answers.jsonl.gz"))
    assert "documents" not in MlflowClient(tracking_uri=world.tracking_uri).get_run(outcome.logged.run_id).data.tags


def test_the_smoke_test_runs_where_the_benchmark_runs(world: World, worker_here: list[str], tmp_path: Path) -> None:
    here = world.at(tmp_path / "home")
    outcome = here.run(world.recipe("linear"), smoke=True, gpu="stage/gpu").outcome
    assert worker_here == ["merge linear", "smoke-test base, linear", "benchmark base, math, knowledge, linear"]
    assert outcome.smoke.passed and set(outcome.scores) == {"base", "expert/math", "expert/knowledge", "merged"}
