"""Logging merges against real stores: SQLite in a folder, and an MLflow server on loopback."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from pydantic import ValidationError

import tasks.tracking.merge as tracking
import tasks.tracking.registered as registry
import tasks.tracking.write as tracking_write
from ota_core.errors import StorageError
from tasks.tracking.merge import LoggedRun, MergeRun, log_merge
from tests.servers import free_port, mlflow_server
from tests.tasks.tracking.made_up import a_merge


@pytest.fixture(autouse=True)
def _no_store_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow-server")) as url:
        yield url


@pytest.fixture
def root(tmp_path: Path, blank_database: Path) -> Path:
    shutil.copy(blank_database, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest) -> str:
    """Both kinds of store; the server is shared, so that tests must use names of their own."""
    if request.param == "server":
        return str(request.getfixturevalue("server"))
    return f"sqlite:///{request.getfixturevalue('root')}/mlflow.db"


def _runs(client: MlflowClient, logged: LoggedRun, filter_string: str) -> list:
    return list(client.search_runs([logged.experiment_id], filter_string=filter_string))


def _children(client: MlflowClient, logged: LoggedRun) -> dict[str, object]:
    return {r.info.run_name: r for r in _runs(client, logged, f"tags.mlflow.parentRunId = '{logged.run_id}'")}


def _fail_once(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The named function of tasks.tracking.merge raises on its first call, as when the connection breaks."""
    whole, calls = getattr(tracking, name), []

    def broken(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("the line went dead")
        return whole(*args, **kwargs)

    monkeypatch.setattr(tracking, name, broken)


def test_a_merge_reads_back_whole(uri: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run = a_merge(f"whole-{request.node.callspec.id}")
    logged = log_merge(run, tracking_uri=uri)
    client = MlflowClient(tracking_uri=uri)
    read = client.get_run(logged.run_id)
    assert client.get_experiment(logged.experiment_id).name == "ota-merging"
    assert (read.info.status, read.info.run_name) == ("FINISHED", run.name)
    assert read.data.params == {"merge_method": "ota", **{k: str(v) for k, v in run.params.items()}}
    assert read.data.metrics == pytest.approx(run.metrics)
    assert run.tags.items() <= read.data.tags.items()
    assert read.data.tags["mlflow.note.content"] == "# A merge\n", "without the YAML on top of the card"

    sources = {i.dataset.name: json.loads(i.dataset.source) for i in read.inputs.dataset_inputs}
    assert sources == {i.name: {"uri": i.source, "digest": i.digest} for i in run.inputs}
    assert {i.tags[0].value for i in read.inputs.dataset_inputs} == {"base", "expert"}

    # The same as models: base and experts in, the merge out; each benchmarked one is its child's model, with its scores.
    models = {m.name: m for m in (client.get_logged_model(one.model_id) for one in read.inputs.model_inputs)}
    assert {n: (m.tags["source_uri"], m.tags["model_digest"]) for n, m in models.items()} == {
        i.name: (i.source, i.digest) for i in run.inputs
    }
    (output,) = read.outputs.model_outputs
    made = client.get_logged_model(output.model_id)
    assert (made.source_run_id, made.tags["source_uri"], str(made.status)) == (
        logged.run_id,
        run.model_uri,
        "READY",
    )
    assert {m.key: m.value for m in made.metrics}["score/math"] == 0.6

    children = _children(client, logged)
    assert set(children) == {c.name for c in run.children}
    for child in run.children:
        assert children[child.name].data.metrics == pytest.approx(child.metrics)
        assert children[child.name].data.tags["role"] == child.role
        assert children[child.name].info.status == "FINISHED"

    folder = Path(client.download_artifacts(logged.run_id, "", str(tmp_path)))
    assert (folder / "recipe.yaml").read_text() == run.recipe_yaml
    assert json.loads((folder / "record.json").read_text()) == run.record
    assert (folder / "README.md").read_text() == run.model_card
    assert pd.read_csv(folder / "tables/scores.csv")["math"].tolist() == [0.2, 0.9, 0.2, 0.6]
    assert len(json.loads((folder / "tables/scores.json").read_text())["data"]) == 4
    assert (folder / "plots/scores.png").read_bytes().startswith(b"\x89PNG")

    version = client.get_model_version("ota-merged", logged.model_version)
    assert (version.source, version.run_id) == (run.model_uri, logged.run_id)
    assert json.loads(made.tags["mlflow.modelVersions"]) == [{"name": "ota-merged", "version": logged.model_version}]
    assert version.tags["model_digest"] == run.model_digest
    assert client.get_model_version_by_alias("ota-merged", "challenger").version == version.version
    assert logged.url == (f"{uri}/#/experiments/{logged.experiment_id}/runs/{logged.run_id}" if uri.startswith("http") else None)


def test_the_same_merge_again_changes_nothing(uri: str, request: pytest.FixtureRequest) -> None:
    run = a_merge(f"again-{request.node.callspec.id}")
    first = log_merge(run, tracking_uri=uri)
    client = MlflowClient(tracking_uri=uri)
    client.set_tag(first.run_id, "mlflow.note.content", "edited by hand")
    before = client.get_run(first.run_id)
    assert log_merge(run, tracking_uri=uri) == first
    after = client.get_run(first.run_id)
    assert (after.info.status, after.info.end_time) == ("FINISHED", before.info.end_time)
    assert after.data.tags["mlflow.note.content"] == "edited by hand"
    assert len(_runs(client, first, f"tags.recipe_fingerprint = '{run.fingerprint}'")) == 1
    assert len(_runs(client, first, f"tags.mlflow.parentRunId = '{first.run_id}'")) == len(run.children)
    assert len(client.get_metric_history(first.run_id, "score/math")) == 1
    assert len(client.search_model_versions(f"name='ota-merged' and tags.model_digest='{run.model_digest}'")) == 1
    assert len(after.inputs.dataset_inputs) == len(run.inputs)


def test_new_scores_update_the_run_and_a_param_keeps_its_first_value(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = a_merge()
    first = log_merge(run, root=root)
    params = {**run.params, "base_model": "/mirror/base"}
    again = log_merge(run.model_copy(update={"metrics": {**run.metrics, "score/math": 0.7}, "params": params}), root=root)
    read = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db").get_run(again.run_id)
    assert again == first
    assert read.data.metrics["score/math"] == 0.7
    assert (read.data.params["base_model"], read.data.tags["latest/base_model"]) == ("s3://models/base", "/mirror/base")
    assert "/mirror/base" in caplog.text


def test_a_run_that_is_cancelled_in_the_middle_reads_killed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by Ctrl-C, or by Cancel in the Prefect UI; a repeat goes on in it."""
    client, run = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db"), a_merge()

    def cancelled(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(tracking, "log_values", cancelled)
        with pytest.raises(KeyboardInterrupt):
            log_merge(run, root=root)
    experiment = client.get_experiment_by_name("ota-merging").experiment_id
    (killed,) = client.search_runs([experiment], filter_string="tags.recipe_fingerprint = 'fp-ota'")
    assert killed.info.status == "KILLED"
    logged = log_merge(run, root=root)
    assert logged.run_id == killed.info.run_id and client.get_run(logged.run_id).info.status == "FINISHED"


@pytest.mark.parametrize("broken", ["log_values", "_log_artifacts", "_log_child", "register_version"])
def test_a_failure_in_the_middle_is_finished_by_the_next_call(root: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    run = a_merge()
    _fail_once(monkeypatch, broken)
    with pytest.raises(StorageError, match=r"the line went dead.*s3://models/merged/ota.*run the same again"):
        log_merge(run, root=root)
    experiment = client.get_experiment_by_name("ota-merging").experiment_id
    (failed,) = client.search_runs([experiment], filter_string="tags.recipe_fingerprint = 'fp-ota'")
    assert failed.info.status == "FAILED"
    logged = log_merge(run, root=root)
    assert logged.run_id == failed.info.run_id
    assert client.get_run(logged.run_id).info.status == "FINISHED"
    assert {r.info.status for r in _children(client, logged).values()} == {"FINISHED"}
    assert len(_children(client, logged)) == len(run.children)
    assert logged.model_version == "1"
    assert client.get_model_version_by_alias("ota-merged", "challenger").version == 1


def test_an_error_of_the_program_passes_unchanged(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(tracking, "log_values", wrong)
    with pytest.raises(KeyError, match="a bug"):
        log_merge(a_merge(), root=root)


def test_one_version_per_digest_and_the_newest_is_the_challenger(root: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    old, new = a_merge("old"), a_merge("new")
    assert [log_merge(m, root=root).model_version for m in (old, new, old)] == ["1", "2", "1"]
    assert client.get_model_version_by_alias("ota-merged", "challenger").version == 2
    # The same bytes from another recipe: another run, no other version.
    twin = a_merge("twin", model_digest=new.model_digest)
    assert log_merge(twin, root=root).model_version == "2"
    # What promotion took away does not come back by logging again.
    client.delete_registered_model_alias("ota-merged", "challenger")
    log_merge(new, root=root)
    assert client.get_registered_model("ota-merged").aliases == {}
    assert registry.find_version(client, "no such digest") is None


def test_a_merge_by_hand_does_not_take_the_place_of_the_gates_challenger(root: Path) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    first, second = a_merge("first"), a_merge("second")
    log_merge(first, root=root)
    client.set_model_version_tag("ota-merged", "1", registry.TAG_DECISION, "challenger")
    assert log_merge(second, root=root).model_version == "2"
    assert client.get_registered_model("ota-merged").aliases == {"challenger": 1}


def test_local_weights_are_referenced_on_a_server_too(server: str, tmp_path: Path) -> None:
    logged = log_merge(a_merge("local", model_uri=str(tmp_path / "merged")), tracking_uri=server)
    version = MlflowClient(tracking_uri=server).get_model_version("ota-merged", logged.model_version)
    assert version.source == f"runs:/{logged.run_id}/model"
    assert version.tags["source_uri"] == str(tmp_path / "merged")


def test_the_shared_view_shows_every_score_that_was_ever_logged(root: Path) -> None:
    logged = log_merge(a_merge("one"), root=root)
    log_merge(a_merge("two", metrics={"score/knowledge": 0.3, "score/avg": 0.3, "seconds/merge": 2}), root=root)
    tags = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db").get_experiment(logged.experiment_id).tags
    columns = json.loads(tags["mlflow.sharedViewState.ota"])["selectedColumns"]
    scores = ["score/avg", "score/code", "score/math", "score/knowledge"]
    assert columns == ["params.`merge_method`", *(f"metrics.`{s}`" for s in scores)]


def test_two_threads_log_two_merges_into_a_new_database(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        logged = list(pool.map(lambda name: log_merge(a_merge(name), root=tmp_path), ["left", "right"]))
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    for name, one in zip(["left", "right"], logged, strict=True):
        assert client.get_run(one.run_id).info.run_name == name
        assert set(_children(client, one)) == {"base", "math-expert", "code-expert", name}
    assert {one.model_version for one in logged} == {"1", "2"}
    assert list((tmp_path / "mlartifacts").rglob("scores.png"))  # beside the database, not in the working directory


def test_threads_that_log_one_merge_on_a_server_agree_on_one_run(server: str) -> None:
    run = a_merge("race")
    with ThreadPoolExecutor(3) as pool:
        logged = set(pool.map(lambda _: log_merge(run, tracking_uri=server).run_id, range(3)))
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("ota-merging").experiment_id
    found = client.search_runs([experiment], filter_string="tags.recipe_fingerprint = 'fp-race'")
    assert logged == {r.info.run_id for r in found} and len(found) == 1
    assert len(client.search_runs([experiment], filter_string=f"tags.mlflow.parentRunId = '{found[0].info.run_id}'")) == 4
    assert len(client.search_model_versions("name='ota-merged' and tags.model_digest='digest-race'")) == 1


def test_clients_that_make_one_run_at_once_agree_on_the_older(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_merge()
    first = log_merge(run, root=root)
    look, looks = tracking_write.find, []

    def too_early(client: MlflowClient, experiment: str, identity: dict[str, str]) -> object:
        looks.append(identity)
        return None if looks.count(identity) == 1 else look(client, experiment, identity)  # the other is there at the second look

    monkeypatch.setattr(tracking_write, "find", too_early)
    assert log_merge(run, root=root) == first
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    assert len(looks) == 2 * (1 + len(run.children))
    assert len(client.search_runs([first.experiment_id])) == 1 + len(run.children)


def test_clients_that_register_one_digest_at_once_agree_on_the_older(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_merge(a_merge("one"), root=root)
    monkeypatch.setattr(registry, "find_version", lambda *_, **__: None)
    assert log_merge(a_merge("two", model_digest="digest-one"), root=root).model_version == "1"
    client = MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    assert [v.version for v in client.search_model_versions("name='ota-merged'")] == [1]


def test_a_server_that_is_away_is_one_quick_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    port = free_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{port}")
    with pytest.raises(StorageError) as caught:
        log_merge(a_merge())
    assert time.monotonic() - start < 20
    message = str(caught.value)
    assert f"http://127.0.0.1:{port}" in message and "s3://models/merged/ota" in message and "\n" not in message
    assert "secret" not in message


def test_the_environment_names_the_server(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    logged = log_merge(a_merge("environment"), root=tmp_path)
    assert logged.url is not None and logged.url.startswith(server)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_survives_json_and_refuses_what_mlflow_could_not_keep() -> None:
    run = a_merge()
    assert MergeRun.model_validate_json(run.model_dump_json()) == run
    with pytest.raises(ValidationError, match="finite"):
        a_merge(metrics={"score/math": float("nan")})
    with pytest.raises(ValidationError, match="recipe_fingerprint"):
        a_merge(tags={})
    with pytest.raises(ValidationError, match="one role and name"):
        a_merge(children=[run.children[0], run.children[0]])
