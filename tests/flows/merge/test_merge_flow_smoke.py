"""The flow with its smoke test: once per model, before the benchmark, which a broken merge does not get."""

from collections import Counter
from pathlib import Path

from mlflow import MlflowClient

from tests.flows.merge_fixture import World


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
