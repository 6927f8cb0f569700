"""One model on a suite, as a flow and as ``ota benchmark``: scored once, logged once."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.benchmark import benchmark_flow
from flows.cli.app import app
from tests.flows.merge_fixture import World
from tests.flows.nightly_fixture import artifacts_of
from tests.servers import flow_run_name, task_states
from tests.tasks.evaluation.openai_server import serving
from tests.tiny_suite import write_tiny_suite


@pytest.fixture
def here(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[World]:
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", world.tracking_uri)
    monkeypatch.delenv("OTA_GPU_DEPLOYMENT", raising=False)
    yield world


def score(world: World, model: str, **changes: Any) -> Any:
    options: dict[str, Any] = {"suite": str(world.suite), "data_dir": str(world.data), "device": "cpu"}
    return benchmark_flow(model, **options | changes, return_state=True)


def logged_runs(world: World, name: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=world.tracking_uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    return client.search_runs(experiments, f"attributes.run_name = 'benchmark {name}'")


def test_a_model_is_scored_and_logged_once(here: World, counts: Counter[str]) -> None:
    model = f"{here.uri}/experts/math/2026-11-20"
    state = score(here, model)
    scores = state.result()
    assert set(scores) == {"math", "knowledge"} and all(0 <= value <= 1 for value in scores.values())
    id = state.state_details.flow_run_id
    assert flow_run_name(id) == f"benchmark {model}" and set(task_states(id)) == {f"fetch {model}", "benchmark math", "log math"}
    rows = {row["capability"]: row for row in json.loads(artifacts_of(id)["scores"].data)}
    assert rows["math"]["score"].startswith(f"{100 * scores['math']:.1f}") and rows["math"]["documents"] == "12"
    (run,) = logged_runs(here, "math")  # by its capability: a date would tell nobody which model it is
    assert run.info.status == "FINISHED" and run.data.params["model"] == model and run.data.params["limit"] == "none"
    assert {name: value for name, value in run.data.metrics.items() if name.startswith("score/")} == {
        **{f"score/{name}": value for name, value in scores.items()}, "score/avg": sum(scores.values()) / 2,
    }  # fmt: skip
    assert counts == {"fetch": 1, "score": 1}
    assert score(here, model).result() == scores
    assert counts == {"fetch": 1, "score": 1} and len(logged_runs(here, "math")) == 1


def test_a_copy_that_has_left_the_cache_is_fetched_again(here: World, counts: Counter[str], tmp_path: Path) -> None:
    model = f"{here.uri}/models/base"
    first = score(here, model).result()
    shutil.rmtree(tmp_path / "home")
    assert score(here, model).result() == first and counts == {"fetch": 2, "score": 2}


def test_other_data_are_another_run(here: World, tmp_path: Path) -> None:
    model = str(here.models / "knowledge")
    score(here, model).result()
    _, data = write_tiny_suite(tmp_path / "other", n=5)
    score(here, model, data_dir=str(data)).result()
    score(here, model, limit=3).result()
    runs = logged_runs(here, "knowledge")
    assert len(runs) == 3 and len({run.data.tags["scores_fingerprint"] for run in runs}) == 3
    assert len({run.data.tags["model_digest"] for run in runs}) == 1


def test_wrong_settings_are_told_before_the_model_is_fetched(here: World, counts: Counter[str]) -> None:
    for change, message in [
        ({"suite": "nowhere"}, "no suite 'nowhere'"),
        ({"limit": 0}, "limit is 0"),
        ({"data_dir": None}, "{data}"),
    ]:
        state = score(here, f"{here.uri}/models/base", **change)
        assert state.is_failed() and message in state.message
    assert counts == {}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["benchmark", *map(str, arguments)])


def test_ota_benchmark_prints_the_scores(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here.models)
    done = invoke("base", "--suite", here.suite, "--data-dir", here.data, "--device", "cpu", "--limit", 4)
    assert done.exit_code == 0, (done.output, done.exception)
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith(("math ", "knowledge "))]
    assert [name for name, _ in lines] == ["math", "knowledge"] and all(0 <= float(value) <= 100 for _, value in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "demoo"], "no suite 'demoo'.*did you mean 'demo'"),
        (["--device", "gpu"], "expected cpu, cuda or auto"),
        (["--limit", "0"], "limit is 0; expected at least one"),
        (["--suite", "demo"], "its scores depend on data"),
    ],
)
def test_ota_benchmark_ends_with_the_message_and_code_2(here: World, options: list[str], message: str) -> None:
    import re

    given = [] if "demo" in options else ["--suite", here.suite, "--data-dir", here.data]
    done = invoke(here.models / "base", *given, *options)
    assert done.exit_code == 2 and re.search(f"Error: .*{message}", done.stderr), done.output
    assert "Traceback" not in done.output


def test_a_served_model_is_asked_at_its_server(here: World, tmp_path: Path) -> None:
    folder = here.models / "knowledge"
    loaded = score(here, str(folder)).result()
    command = ["benchmark", str(folder), "--suite", str(here.suite), "--data-dir", str(here.data), "--device", "cpu"]
    with serving({"knowledge": folder}) as (url, seen):
        asked = score(here, str(folder), server=url).result()
        assert asked == loaded and seen
        assert {run.data.params.get("backend") for run in logged_runs(here, "knowledge")} >= {None, "local-completions"}
        again = CliRunner().invoke(app, [*command, "--server", url])
        assert again.exit_code == 0 and f"{100 * loaded['math']:.1f}" in again.output, again.output
        other = CliRunner().invoke(app, [*command[:1], str(here.models / "math"), *command[2:], "--server", url])
        assert other.exit_code == 2 and f"{url} serves knowledge, not math" in " ".join(other.output.split())
    refused = CliRunner().invoke(app, [*command, "--server", "http://me:secret@host/v1"])
    assert refused.exit_code == 2 and "OPENAI_API_KEY" in refused.output and "secret" not in refused.output
