"""Studies in this process: cells that fail stop no others, cells that were merged are found, one table of all."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app
from flows.study import study_flow
from tasks.study import StudyConfig
from tests.flows.merge_fixture import EXPERTS, RUN, World
from tests.flows.nightly_fixture import artifacts_of
from tests.flows.prefect_fixture import flow_run_name


@pytest.fixture
def here(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("OTA_HOME", str(world.home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", world.tracking_uri)
    monkeypatch.delenv("OTA_GPU_DEPLOYMENT", raising=False)
    return world


def raw(world: World, *grid: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": "small", "base_model": f"{world.uri}/models/base", "suite": str(world.suite), "data_dir": str(world.data),
        "models": [{"model": f"{world.uri}/experts/{name}/{RUN}", "capability": name} for name in EXPERTS],
        "grid": list(grid) or [{"merge_method": "ties", "parameters": {"density": [0.2, 0.6]}}, {"merge_method": "linear"}],
    } | changes  # fmt: skip


def test_every_cell_is_merged_once_and_compared(here: World, counts: Counter[str]) -> None:
    state: Any = study_flow(StudyConfig.model_validate(raw(here)), device="cpu", memory="256MiB", return_state=True)
    outcomes = state.result()
    assert list(outcomes) == ["ties density=0.2", "ties density=0.6", "linear"]
    assert counts["merge"] == 3 and counts["score"] == 6 and len({one.digest for one in outcomes.values()}) == 3
    id = state.state_details.flow_run_id
    assert flow_run_name(id) == "study small"
    table = artifacts_of(id)["scores"]
    assert [row["model"] for row in json.loads(table.data)] == ["base", *EXPERTS, *outcomes]
    assert table.description.startswith("Study small. ")
    counts.clear()
    more = StudyConfig.model_validate(raw(here, {"merge_method": "ties", "parameters": {"density": [0.2, 0.6, 0.9]}}))
    assert len(study_flow(more, device="cpu", memory="256MiB")) == 3
    assert counts["merge"] == counts["score"] == 1


def test_a_cell_that_fails_stops_no_other(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from ota_core.errors import CheckpointError
    from tasks import stages

    whole = stages.merge

    def failing(places: Any, step: Any, recipe: Any, *args: Any, **kwargs: Any) -> Any:
        if recipe.merge_method == "breadcrumbs":
            raise CheckpointError("the tensor t is not there")
        return whole(places, step, recipe, *args, **kwargs)

    monkeypatch.setattr(stages, "merge", failing)
    config = StudyConfig.model_validate(raw(here, {"merge_method": "breadcrumbs"}, {"merge_method": "task_arithmetic"}))
    state: Any = study_flow(config, device="cpu", memory="256MiB", return_state=True)
    assert state.is_failed() and re.search(r"breadcrumbs: .*the tensor t is not there", state.message)
    table = artifacts_of(state.state_details.flow_run_id)["scores"]
    assert [row["model"] for row in json.loads(table.data)] == ["base", *EXPERTS, "task_arithmetic"]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


def test_ota_study_prints_the_table_and_paths_start_at_the_file(here: World) -> None:
    """The models are named relative to the study's file."""
    models = [{"model": f"./{name}", "capability": name} for name in EXPERTS]
    file = here.models / "small-study.yaml"
    file.write_text(yaml.safe_dump(raw(here, {"merge_method": "linear"}, base_model="./base", models=models)))
    done = invoke(file, "--device", "cpu", "--memory", "256MiB")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "Study small" in done.stdout
    for row in ("base", *EXPERTS, "linear"):
        assert re.search(rf"^ *{row} ", done.stdout, re.MULTILINE), (row, done.stdout)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {"grid": [{"merge_method": "ota", "parameters": {"densty": 1}}]},
            [],
            "unknown key 'parameters.densty'; did you mean 'density'?",
        ),
        ({"suite": "demoo"}, [], "did you mean 'demo'"),
        ({}, ["--memory", "much"], "memory: got 'much'"),
        ({}, ["--device", "gpu"], "expected cpu, cuda or auto"),
    ],
)
def test_ota_study_ends_with_the_message_and_code_2(
    here: World, tmp_path: Path, change: dict[str, Any], options: list[str], message: str
) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw(here, **change)))
    done = invoke(tmp_path / "study.yaml", *options)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output, done.output
    done = invoke(tmp_path / "none.yaml")
    assert done.exit_code == 2 and "does not exist; expected a YAML file" in done.stderr


def test_ota_nightly_ends_with_the_message_and_code_2(here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "nightly.yaml"
    config = {"experts": str(tmp_path / "none"), "base_model": "b", "suite": str(here.suite), "data_dir": str(here.data)}
    file.write_text(yaml.safe_dump(config | {"candidates": [{"name": "a", "merge_method": "linear"}], "suiite": "x"}))
    monkeypatch.setenv("OTA_NIGHTLY", str(file))
    done = CliRunner().invoke(app, ["nightly"])
    assert done.exit_code == 2 and "unknown key 'suiite'; did you mean 'suite'?" in done.stderr, done.output
    file.write_text(yaml.safe_dump(config | {"candidates": [{"name": "a", "merge_method": "linear"}]}))
    done = CliRunner().invoke(app, ["nightly", str(file), "--force"])
    assert done.exit_code == 2 and f"Error: {tmp_path}/none does not exist" in done.stderr, done.output
    assert "Traceback" not in done.output


def test_ota_nightly_prints_the_end(here: World, tmp_path: Path) -> None:
    (tmp_path / "experts").mkdir()
    file = tmp_path / "nightly.yaml"
    config = {"experts": str(tmp_path / "experts"), "base_model": "b", "suite": str(here.suite), "data_dir": str(here.data)}
    file.write_text(yaml.safe_dump(config | {"candidates": [{"name": "a", "merge_method": "linear"}]}))
    done = CliRunner().invoke(app, ["nightly", str(file)])
    assert done.exit_code == 0 and done.stdout.endswith(
        f"NothingNew: no complete, sound expert lies below {tmp_path}/experts\n"
    ), done.output
