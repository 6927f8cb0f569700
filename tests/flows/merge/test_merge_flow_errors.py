"""What a user sees when something is wrong: every problem at once, early, without a traceback, and nothing lost."""

import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ota_core.errors import CheckpointError, OtaError, StorageError
from ota_core.recipe.recipe import MergeRecipe
from tasks.storage.models import upload_folder
from tests.flows.merge_fixture import EXPERTS, RUN, World
from tests.servers import free_port

REPOSITORY = Path(__file__).parents[3]


def with_models(recipe: MergeRecipe, sources: list[str]) -> MergeRecipe:
    models = [entry.model_copy(update={"model": source}) for entry, source in zip(recipe.models, sources, strict=True)]
    return recipe.model_copy(update={"models": tuple(models)})


def ota_run(recipe: MergeRecipe, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """``ota run`` in a process of its own, against the test's Prefect server."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    file = folder / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    environment = {
        **os.environ,
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "PREFECT_HOME": str(PREFECT_HOME.value()),
        "COLUMNS": "200",
    }
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", str(file), *options],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_two_missing_experts_are_both_named(world: World, counts: Counter[str]) -> None:
    from prefect.client.orchestration import get_client

    lost = [f"{world.uri}/experts/math/lost", f"{world.uri}/experts/knowledge/gone"]
    run = world.run(with_models(world.recipe(), lost), suite=None)
    with pytest.raises(StorageError, match=r"(?s)2 problems.*math/lost.*no such key.*knowledge/gone.*no such key"):
        _ = run.outcome
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run.id).state
    assert state is not None and state.is_failed()
    assert state.message is not None and all(source in state.message for source in lost)
    assert set(run.states) == {f"fetch {source}" for source in (f"{world.uri}/models/base", *lost)}
    assert counts == {"fetch": 3}


def test_ota_run_ends_with_the_message_and_code_2(world: World, tmp_path: Path) -> None:
    lost = [f"{world.uri}/experts/math/lost", f"{world.uri}/experts/knowledge/gone"]
    done = ota_run(with_models(world.recipe(), lost), tmp_path, "--suite", "none", "--home", str(tmp_path / "home"))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    message = done.stderr[done.stderr.index("\nError: ") :]
    assert all(source in message for source in lost) and "check the spelling" in message


@pytest.mark.slow
def test_ota_run_says_where_everything_is(world: World, tmp_path: Path) -> None:
    options = ("--suite", str(world.suite), "--data-dir", str(world.data), "--home", str(tmp_path / "home"), "--device", "cpu")
    done = ota_run(world.recipe(density=0.4), tmp_path, *options, "--tracking-uri", world.tracking_uri)
    assert done.returncode == 0, done.stderr
    merged = next((tmp_path / "home" / "artifacts" / "merged").iterdir())
    assert f"merged model: {merged}" in done.stdout and "mlflow ui" in done.stdout
    for row in ("base", *EXPERTS, "ota rho=0.40"):
        assert row in done.stdout, row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "publik"}, "no suite 'publik'.*did you mean 'public'"),
        ({"data_dir": None}, "read {data}: its scores depend on data"),
        ({"data_dir": "nowhere"}, "nowhere is not a folder"),
        ({"limit": 0}, "limit is 0; expected at least one"),
        ({"memory": "two bananas"}, "memory: got 'two bananas'"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_read(
    world: World, counts: Counter[str], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run = world.at(tmp_path / "home").run(world.recipe(density=0.4), **change)
    with pytest.raises(OtaError, match=message):
        _ = run.outcome
    assert counts == {}


def test_a_device_that_is_none_is_told_with_the_known_ones(world: World, tmp_path: Path) -> None:
    from prefect.exceptions import ParameterTypeError

    run = world.at(tmp_path / "home").run(world.recipe(density=0.4), device="gpu")
    with pytest.raises(ParameterTypeError, match="device: Input should be 'auto', 'cpu' or 'cuda'"):
        _ = run.outcome


def test_bad_second_moments_of_two_experts_are_both_named(world: World, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client

    sources = []
    for name, bad in zip(EXPERTS, (float("nan"), -1.0), strict=True):
        expert = tmp_path / name
        expert.mkdir()
        for file in (world.models / name).iterdir():
            if file.name not in {"expert.json", "exp_avg_sq.safetensors"}:
                (expert / file.name).symlink_to(file)
        v = load_file(world.models / name / "exp_avg_sq.safetensors")
        v["model.norm.weight"][3] = bad
        save_file(v, expert / "exp_avg_sq.safetensors")
        sources.append(f"{world.uri}/bad/{name}/{RUN}")
        upload_folder(expert, sources[-1])
    here = world.at(tmp_path / "home")
    run = here.run(with_models(world.recipe(density=0.4), sources), suite=None)
    with pytest.raises(OtaError, match=r"(?s)2 problems.*model.norm.weight.*model.norm.weight"):
        _ = run.outcome
    assert not list((here.home / "artifacts").rglob("*.safetensors"))
    with get_client(sync_client=True) as client:
        assert client.read_flow_run(run.id).state.is_failed()


def test_mlflow_away_loses_nothing(
    world: World, counts: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Card and page lie beside the model before MLflow is asked anything; what it was to be told is kept, and sent by ``ota sync``."""
    import tasks.log
    from tasks.tracking.outbox import kept, sync

    monkeypatch.setattr(tasks.log, "log", tasks.log.log.with_options(retries=0))
    recipe, here = world.recipe("linear"), world.at(tmp_path / "home")
    logging.getLogger("prefect.flow_runs").addHandler(caplog.handler)
    try:
        run = here.run(recipe, tracking_uri=f"http://127.0.0.1:{free_port()}", report="scores")
    finally:
        logging.getLogger("prefect.flow_runs").removeHandler(caplog.handler)
    with pytest.raises(
        StorageError, match=r"MLflow at http://127\.0\.0\.1.* failed while logging 'linear math\+knowledge'.*"
    ) as caught:
        _ = run.outcome
    merged = next((here.home / "artifacts" / "merged").iterdir())
    (waits,) = kept(here.home)
    assert all(part in str(caught.value) for part in (str(merged), str(waits), "run the same again", "ota sync"))
    assert "knowledge" in (merged / "README.md").read_text() and (merged / "report.html").is_file()
    assert "the page goes without an earlier decision of the gate" in caplog.text and f"merged model: {merged}" in caplog.text
    ((unsent, found),) = sync(here.home, here.home / "tracking", world.tracking_uri)
    assert unsent.what.name == "linear math+knowledge" and not isinstance(found, Exception)
    assert kept(here.home) == {}
    counts.clear()
    again = here.run(recipe)
    assert again.computed() == [] and counts == {}
    assert again.outcome.path == str(merged) and again.outcome.logged.model_version
    assert again.outcome.logged.run_id == found.run_id and again.outcome.logged.model_version == found.model_version


def test_a_failed_benchmark_keeps_the_rest(
    world: World, counts: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tasks import benchmark

    recipe, here = world.recipe("linear"), world.at(tmp_path / "home")
    real = benchmark.score_model

    def failing(model: Path, *args: Any, **kwargs: Any) -> Any:
        if "merged" in model.parts:
            raise CheckpointError(f"{model} cannot be loaded")
        return real(model, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "score_model", failing)
        run = here.run(recipe)
    with pytest.raises(CheckpointError, match=r"merged/.* cannot be loaded"):
        _ = run.outcome
    counts.clear()
    assert here.run(recipe).computed() == ["benchmark linear"] and counts == {"score": 1}


def test_only_user_errors_lose_their_traceback(
    world: World, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's own records, with their tracebacks, of one failure of each kind."""
    from tasks.storage import models as storage

    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addHandler(caplog.handler)
    try:
        for error, traceback in ((StorageError("no such bucket"), False), (ZeroDivisionError("a mistake of ours"), True)):

            def failing(*args: Any, error: Exception = error, **kwargs: Any) -> None:
                raise error

            monkeypatch.setattr(storage, "fetch", failing)
            caplog.clear()
            assert world.at(world.home.with_name(type(error).__name__)).run(world.recipe(), suite=None).state.is_failed()
            assert any(record.exc_info for record in caplog.records) == traceback
            told = [record.getMessage() for record in caplog.records if str(error) in record.getMessage()]
            assert len(told) >= 4  # three fetches and the flow
    finally:
        for name in ("prefect.flow_runs", "prefect.task_runs"):
            logging.getLogger(name).removeHandler(caplog.handler)
