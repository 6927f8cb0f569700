"""Studies in this process: cells that fail stop no others, cells that were merged are found, tables and figures of all."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from flows.cli.app import app
from flows.study import study_flow
from ota_core.errors import StorageError
from tasks.evaluation.kept import read_scores
from tasks.experiments.study.study import StudyConfig
from tasks.settings import places
from tasks.storage.models import upload_folder
from tasks.tracking.outbox import kept, sync
from tasks.tracking.run import LoggedRun
from tests.flows.merge_fixture import EXPERTS, RUN, World
from tests.flows.nightly_fixture import artifacts_of
from tests.servers import flow_run_name, free_port
from tests.tiny_suite import read_rows, write_rows, write_tiny_suite


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


def run(config: dict[str, Any], **options: Any) -> Any:
    return study_flow(StudyConfig.model_validate(config), device="cpu", memory="256MiB", return_state=True, **options)


def test_every_cell_is_merged_once_and_compared(here: World, counts: Counter[str]) -> None:
    state = run(raw(here))
    outcome = state.result()
    assert outcome.cells == {"ties density=0.2": 1, "ties density=0.6": 1, "linear": 1} and outcome.computed == 3
    assert counts["merge"] == 3 and counts["score"] == 6
    id = state.state_details.flow_run_id
    assert flow_run_name(id) == "study small"
    page = artifacts_of(id)["study"]
    assert page.data == (outcome.folder / "results.md").read_text() and page.description == "Study small"
    methods = pd.read_csv(outcome.folder / "tables" / "methods.csv")
    assert list(methods["model"]) == ["base", *EXPERTS, "ties density=0.2", "linear"]
    counts.clear()
    more = run(raw(here, {"merge_method": "ties", "parameters": {"density": [0.2, 0.6, 0.9]}})).result()
    assert len(more.cells) == 3 and more.computed == 1
    assert counts["merge"] == counts["score"] == 1


def test_scores_in_the_tables_are_those_that_the_merge_flow_measures(here: World) -> None:
    outcome = run(raw(here, {"merge_method": "linear"})).result()
    merged = here.run(here.recipe("linear", base=True)).outcome
    where = places(here.home)
    scores = {key: read_scores(where, ref).by_capability() for key, ref in merged.scores.items()}
    table = pd.read_csv(outcome.folder / "tables" / "methods.csv").set_index("model")
    for row, key in {"base": "base", "math": "expert/math", "linear": "merged"}.items():
        assert {name: table.loc[row, name] for name in scores[key]} == scores[key]


def test_a_study_that_is_repeated_runs_nothing_and_writes_the_same(here: World, counts: Counter[str]) -> None:
    grid = {"merge_method": "ota", "parameters": {"density": 0.5, "compression": ["none", "rank1"]}, "experts": ["all", "each"]}
    first = run(raw(here, grid, name="again")).result()
    before = {path: path.read_bytes() for path in sorted(first.folder.rglob("*")) if path.is_file()}
    counts.clear()
    second = run(raw(here, grid, name="again")).result()
    assert second.computed == 0 and not counts["merge"] and not counts["score"] and len(before) > 8
    assert {path: path.read_bytes() for path in before} == before
    table = pd.read_csv(first.folder / "tables" / "compression.csv")
    assert list(table["second moments"]) == ["full", "rank 1"]
    assert table["bytes/parameter"][0] == pytest.approx(4, abs=0.01) and table["√v error"][0] == 0
    assert table["bytes/parameter"][1] < 4 and table["√v error"][1] > 0


def test_a_merge_that_was_never_logged_is_logged(here: World) -> None:
    """Killed between scores and log: the artifacts are there, the run is not."""
    first = run(raw(here, {"merge_method": "task_arithmetic"}, name="killed")).result()
    client = MlflowClient(here.tracking_uri)
    experiment = client.get_experiment_by_name("ota-merging").experiment_id
    for one in client.search_runs([experiment], "params.merge_method = 'task_arithmetic'"):
        client.delete_run(one.info.run_id)
    assert first.computed == 1 and run(raw(here, {"merge_method": "task_arithmetic"}, name="killed")).result().computed == 1
    assert len(client.search_runs([experiment], "params.merge_method = 'task_arithmetic'")) == 1


def test_merges_of_a_study_are_no_candidates_for_serving(here: World) -> None:
    run(raw(here, {"merge_method": "breadcrumbs", "parameters": {"density": 0.3}}, name="unregistered")).result()
    client = MlflowClient(here.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("ota-merging").experiment_id], "params.merge_method = 'breadcrumbs'")
    assert len(runs) == 1 and not [v for v in client.search_model_versions() if v.run_id == runs[0].info.run_id]


def test_the_summary_in_mlflow_is_one_run_however_often_the_study_runs(here: World, tmp_path: Path) -> None:
    sweep = {"merge_method": "task_arithmetic", "parameters": {"lambda": [0.5, 1]}}
    for grid in ([{"merge_method": "linear"}, sweep], [{"merge_method": "ties", "parameters": {"density": [0.2, 0.6]}}]):
        outcome = run(raw(here, *grid, name="summary")).result()
    client = MlflowClient(here.tracking_uri)
    (one,) = client.search_runs([outcome.logged.experiment_id], "tags.study = 'summary'")
    assert one.info.run_id == outcome.logged.run_id and one.data.tags["role"] == "study" and one.info.status == "FINISHED"
    assert {"results.md", "study.html", "tables", "figures"} <= {found.path for found in client.list_artifacts(one.info.run_id)}
    # What describes the study is of the study as it is now, and so are its tables and figures: the sweep of λ is gone.
    assert one.data.tags["cells"] == "2" and not one.data.params
    kept = Path(client.download_artifacts(one.info.run_id, "", str(tmp_path)))
    assert json.loads((kept / "study.json").read_text())["grid"] == [
        {"merge_method": "ties", "parameters": {"density": [0.2, 0.6]}}
    ]
    names = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()} - {"study.json"}
    assert names == {path.relative_to(outcome.folder).as_posix() for path in outcome.folder.rglob("*") if path.is_file()}
    assert {"score/avg/ties density.0.2", "score/avg/ties density.0.6"} <= set(one.data.metrics)
    # The merges of the study as it is now carry its tag, whoever merged them; the linear one is in it no longer.
    merges = client.search_runs([outcome.logged.experiment_id], "tags.`study.summary` LIKE '%'")
    assert {run.data.tags["study.summary"] for run in merges} == {"ties density=0.2", "ties density=0.6"}
    assert {run.data.params["merge_method"] for run in merges} == {"ties"} and len(merges) == 2


def test_a_server_that_is_away_ends_no_study_and_is_told_later(
    here: World, counts: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    study = raw(here, {"merge_method": "ties", "parameters": {"density": [0.3, 0.7]}}, name="away")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
        with pytest.raises(StorageError, match=r"(?s)MLflow at .* failed while logging 'study away'.*kept in .*unsent.*ota sync"):
            run(study, home=home).result()
    assert counts["merge"] == 2 and (home / "studies" / "away" / "results.md").is_file()
    assert [one.what.kind for one in kept(home).values()] == ["merge", "merge", "run"]
    sent = list(sync(home, home / "tracking", here.tracking_uri))
    assert all(isinstance(found, LoggedRun) for _, found in sent) and not kept(home)
    client = MlflowClient(here.tracking_uri)
    (one,) = client.search_runs([sent[-1][1].experiment_id], "tags.study = 'away'")
    assert one.info.status == "FINISHED" and {"results.md", "study.json", "tables"} <= {
        found.path for found in client.list_artifacts(one.info.run_id)
    }
    merges = client.search_runs([sent[-1][1].experiment_id], "tags.`study.away` LIKE '%'")
    assert {run.data.tags["study.away"] for run in merges} == {"ties density=0.3", "ties density=0.7"}
    counts.clear()
    again = run(study, home=home).result()
    assert again.computed == 0 and again.logged.run_id == one.info.run_id and not counts["merge"]


def test_replicates_give_means_over_them(here: World) -> None:
    """The second replicate is the first with other experts; base and data are shared."""
    swapped = {"math": "knowledge", "knowledge": "math"}
    for name in EXPERTS:
        for seed, source in (("1", name), ("2", swapped[name])):
            upload_folder(here.models / source, f"{here.uri}/replicates/{name}/{seed}", last="expert.json")
    models = [{"model": f"{here.uri}/replicates/{name}/{{seed}}", "capability": name} for name in EXPERTS]
    config = raw(here, {"merge_method": "linear"}, {"merge_method": "ties", "parameters": {"density": 0.3}},
                 name="twice", models=models, replicates={"seed": [1, 2]})  # fmt: skip
    outcome = run(config).result()
    assert outcome.cells == {"linear": 2, "ties density=0.3": 2}
    scores = pd.read_csv(outcome.folder / "tables" / "scores.csv")
    mine = scores[(scores["model"] == "math") & (scores["capability"] == "knowledge")].set_index("replicate")["score"]
    table = pd.read_csv(outcome.folder / "tables" / "methods.csv").set_index("model")
    assert table.loc["math", "knowledge"] == pytest.approx(mine.mean())
    assert table.loc["math", "knowledge_se"] == pytest.approx(mine.std() / 2**0.5)
    assert "over 2 replicates" in outcome.results


def test_a_replicate_that_is_not_there_is_told_before_the_first_cell(here: World, counts: Counter[str]) -> None:
    upload_folder(here.models / "base", f"{here.uri}/bases/1", last="config.json")
    state = run(raw(here, name="half", base_model=f"{here.uri}/bases/{{seed}}", replicates={"seed": [1, 2]}))
    assert state.is_failed() and f"{here.uri}/bases/2" in state.message
    assert not counts["merge"] and not counts["score"]


def validation(folder: Path) -> dict[str, Any]:
    """A section ``tune`` with a suite that has sums and facts of its own."""
    suite, data = write_tiny_suite(folder, n=9)
    shifted = read_rows(data / "sums.jsonl"), read_rows(data / "facts.jsonl")
    for rows, name in zip(shifted, ("sums", "facts"), strict=True):
        write_rows(data / f"{name}.jsonl", [row | {"prompt": f"Now: {row['prompt']}"} for row in rows])
    return {"suite": str(suite), "data_dir": str(data), "trials": 3, "limit": 4}


def test_tuned_cells_are_chosen_on_other_documents(here: World, tmp_path: Path, counts: Counter[str]) -> None:
    """A suite that shares documents with the test is refused."""
    tune = validation(tmp_path / "validation")
    grid = [{"merge_method": "ties", "tune": True}, {"merge_method": "task_arithmetic", "tune": True}]
    config = raw(here, *grid, name="tuned", tune=tune)
    outcome = run(config).result()
    assert outcome.cells == {"ties tuned": 1, "task_arithmetic tuned": 1}
    # Three trials of each method, then the winners for the test, unless that very merge is there from another test.
    assert counts["trial"] == 2 * 3 and counts["merge"] == outcome.computed
    found = pd.read_csv(outcome.folder / "tables" / "tuning.csv").set_index("model")
    assert 0.05 <= found.loc["ties tuned", "density"] <= 1 and 0.3 / 3 <= found.loc["task_arithmetic tuned", "lambda"] <= 3 / 3
    assert pd.isna(found.loc["task_arithmetic tuned", "density"])
    counts.clear()
    again = run(config).result()
    assert again.results == outcome.results and not counts["merge"] and not counts["score"]
    state = run(raw(here, *grid, name="tuned", tune=tune | {"suite": str(here.suite), "data_dir": str(here.data)}))
    assert state.is_failed() and "cannot be judged on them" in state.message


def test_learned_cells_are_learned_once_and_merged_with_their_scales(here: World, tmp_path: Path, counts: Counter[str]) -> None:
    tune = validation(tmp_path / "validation")
    learning = {"steps": 4, "every": 2, "blocks": 4, "held_out": 3, "length": 48, "rate": 0.2}
    grid = [{"merge_method": "ota", "parameters": {"density": 0.4}, "learn": per} for per in ("tensor", "expert")]
    config = raw(
        here, {"merge_method": "ota", "parameters": {"density": 0.4}}, *grid, name="learned", tune=tune | {"learning": learning}
    )
    kept = set((here.home / "artifacts" / "merged").glob("*/model.safetensors"))
    outcome = run(config).result()
    labels = ["ota density=0.4", "ota learned per tensor density=0.4", "ota learned per expert density=0.4"]
    assert outcome.cells == dict.fromkeys(labels, 1) and outcome.computed >= 2
    found = pd.read_csv(outcome.folder / "tables" / "learned.csv").set_index("model")
    assert (found["learned"] < found["as given"]).all() and found["as given"].nunique() == 1 and (found["step"] > 0).all()
    assert found["learned"].nunique() == 2
    # The merges of the three differ: the scales were applied.
    made = set((here.home / "artifacts" / "merged").glob("*/model.safetensors")) - kept
    assert len({path.read_bytes() for path in made}) == len(made) == outcome.computed
    counts.clear()
    again = run(config).result()
    assert again.results == outcome.results and not counts["merge"] and not counts["score"]


def test_tuning_on_the_gpu_pool_finds_the_same(
    here: World, tmp_path: Path, worker_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"merge_method": "ota", "parameters": {"compression": "rank1"}, "tune": True}
    config = raw(here, grid, name="pool", tune=validation(tmp_path / "validation"))
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "alone"))
    alone = run(config, home=tmp_path / "alone").result()
    assert not worker_here
    monkeypatch.setenv("OTA_HOME", str(here.home))
    monkeypatch.setenv("OTA_GPU_DEPLOYMENT", "stage/gpu")
    sent = run(config).result()
    assert sent.results == alone.results
    # A trial is merged in the memory of the worker that scores it.
    assert sum(name.startswith("merge ota") for name in worker_here) == sent.computed
    assert sum(name.startswith("trial") for name in worker_here) == 3, worker_here


def test_a_cell_that_fails_stops_no_other(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from ota_core.errors import CheckpointError
    from tasks.merge import MergeJob

    whole = MergeJob.run

    def failing(job: MergeJob, *args: Any, **kwargs: Any) -> Any:
        if job.recipe.merge_method == "dare_ties":
            raise CheckpointError("the tensor t is not there")
        return whole(job, *args, **kwargs)

    monkeypatch.setattr(MergeJob, "run", failing)
    state = run(raw(here, {"merge_method": "dare_ties"}, {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}}))
    assert state.is_failed() and re.search(r"dare_ties: .*the tensor t is not there", state.message)
    page = str(artifacts_of(state.state_details.flow_run_id)["study"].data)
    assert "| task_arithmetic lambda=0.5 |" in page and "| dare_ties" not in page
    assert "Left out, because it failed: dare_ties: " in page


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


def test_ota_study_prints_the_table_and_paths_start_at_the_file(here: World, tmp_path: Path) -> None:
    """The models are named relative to the study's file."""
    models = [{"model": f"./{name}", "capability": name} for name in EXPERTS]
    file, written = here.models / "small-study.yaml", tmp_path / "results.md"
    file.write_text(yaml.safe_dump(raw(here, {"merge_method": "linear"}, base_model="./base", models=models)))
    done = invoke(file, "--device", "cpu", "--memory", "256MiB", "--write", written)
    assert done.exit_code == 0, (done.output, done.exception)
    for row in ("base", *EXPERTS, "linear"):
        assert re.search(rf"^ *{row} ", done.stdout, re.MULTILINE), (row, done.stdout)
    text = written.read_text()
    assert f"`ota study {file} --write {written}`" in text and "| linear |" in text
    assert (tmp_path / "results" / "methods.png").is_file()
    assert f"results: {written}" in done.stdout.replace("\n", "")


def test_ota_study_demo_wants_the_demos_experts(here: World, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw(here)))
    done = invoke(tmp_path / "study.yaml", "--demo")
    assert (
        done.exit_code == 2 and "is not of the demo's experts: expected base_model s3://ota-demo/models/seed{seed}" in done.stderr
    )


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


def test_ota_nightly_prints_the_end_or_a_message_with_code_2(
    here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "nightly.yaml"
    config = {
        "experts": str(tmp_path / "none"), "base_model": "b", "suite": str(here.suite), "data_dir": str(here.data),
        "candidates": [{"name": "a", "merge_method": "linear"}],
    }  # fmt: skip
    file.write_text(yaml.safe_dump(config | {"suiite": "x"}))
    monkeypatch.setenv("OTA_NIGHTLY", str(file))
    done = CliRunner().invoke(app, ["nightly"])
    assert done.exit_code == 2 and "unknown key 'suiite'; did you mean 'suite'?" in done.stderr, done.output
    file.write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(app, ["nightly", str(file), "--force"])
    assert done.exit_code == 2 and f"Error: {tmp_path}/none does not exist" in done.stderr, done.output
    assert "Traceback" not in done.output
    (tmp_path / "none").mkdir()
    done = CliRunner().invoke(app, ["nightly", str(file)])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith(f"NothingNew: no complete, sound expert lies below {tmp_path}/none\n")
