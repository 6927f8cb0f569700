"""Tunings of small real experts, end to end: what is learned, written, logged; and wrong input, which writes nothing."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from typer.testing import CliRunner

from flows.cli.app import app
from flows.tune import TuneOutcome, tune_flow
from ota_core.errors import OtaError, StorageError
from ota_core.plan.expert_scales import ExpertScales
from ota_core.recipe.recipe import load_recipe
from tasks.experiments.tune.config import ScalesConfig
from tasks.merging.recipes import read_recipe
from tasks.tracking.outbox import kept, sync
from tasks.tracking.run import LoggedRun
from tests.flows.merge_fixture import EXPERTS, World
from tests.flows.nightly_fixture import artifacts_of
from tests.servers import flow_run_name, free_port
from tests.tiny_suite import read_rows, write_rows, write_tiny_suite


@pytest.fixture
def here(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", world.tracking_uri)
    monkeypatch.delenv("OTA_GPU_DEPLOYMENT", raising=False)
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)  # others use this machine, and threads of tiny products wait for each other
    return world.at(tmp_path / "home")


def config(world: World, **changes: Any) -> ScalesConfig:
    recipe = world.recipe(density=0.4, compression="rank1").model_dump(mode="json", by_alias=True, exclude_none=True)
    known = {
        "recipe": recipe, "suite": str(world.suite), "data_dir": str(world.data), "steps": 4, "every": 2, "blocks": 4, "held_out": 3,
        "length": 48, "rate": 0.2,
    }  # fmt: skip
    return ScalesConfig.model_validate(known | changes)


def run(world: World, tuning: ScalesConfig, out: Path | str, **options: Any) -> tuple[Any, TuneOutcome]:
    state: Any = tune_flow(tuning, str(out), device="cpu", memory="256MiB", home=world.home, return_state=True, **options)
    return state.state_details.flow_run_id, state.result()


def test_a_tuning_writes_a_recipe_with_its_scales_and_logs_every_step(here: World, tmp_path: Path) -> None:
    out = tmp_path / "found" / "tuned.yaml"
    run_id, outcome = run(here, config(here), out)
    learned = outcome.learned
    assert learned.best > 0 and learned.kept.value is not None and learned.start.value is not None
    assert learned.kept.value < learned.start.value and [one.number for one in learned.steps] == list(range(5))

    # Beside the recipe, under a name that tells its content; nothing else is left there.
    recipe = load_recipe(out)
    assert recipe.scales is not None and sorted(path.name for path in out.parent.iterdir()) == sorted([out.name, recipe.scales])
    scales = ExpertScales.read(out.parent / recipe.scales)
    assert scales.experts == tuple(EXPERTS) and scales.learned_for_other(recipe) == []
    moved = torch.tensor([row.tolist() for row in scales.values.values()])
    assert len(moved) == 21 and (moved - 1).abs().max() < 0.21 * 4
    assert (moved != 1).double().mean() > 0.9  # all but small tensors of which FFG keeps nothing
    text = out.read_text()
    assert text == outcome.recipe and f"step {learned.best} of 4" in text and "one per expert and tensor" in text

    client = MlflowClient(tracking_uri=here.tracking_uri)
    logged = client.get_run(outcome.logged.run_id)
    assert logged.info.status == "FINISHED" and logged.data.tags["role"] == "tune" and logged.data.params["objective"] == "mean"
    held_out = client.get_metric_history(outcome.logged.run_id, "loss/held_out")
    assert [(one.step, one.value) for one in held_out] == [
        (one.number, sum(one.held_out.values()) / 2) for one in learned.steps if one.held_out
    ]
    train = client.get_metric_history(outcome.logged.run_id, "loss/train/math")
    assert [(one.step, one.value) for one in train] == [(one.number, one.train["math"]) for one in learned.steps[1:]]
    kept = {one.path for one in client.list_artifacts(outcome.logged.run_id)}
    assert kept == {"recipe.yaml", "scales.safetensors", "tune.html", "plots", "tables"}
    assert {one.path for one in client.list_artifacts(outcome.logged.run_id, "plots")} == {"plots/losses.png", "plots/scales.png"}

    assert flow_run_name(run_id).startswith("tune ota ")
    shown = artifacts_of(run_id)
    assert "Learned scales" in shown["tune"].description and "| average |" in shown["tune"].data.replace("**", "")


def test_the_result_is_merged_with_its_scales_by_the_flow(here: World, tmp_path: Path, counts: Counter[str]) -> None:
    """Also judged on another suite; the benchmarked merge is another one than without scales."""
    suite, data = write_tiny_suite(tmp_path / "judge")
    for path in data.iterdir():
        write_rows(path, [{**row, "prompt": f"Once more. {row['prompt']}"} for row in read_rows(path)])
    _, outcome = run(here, config(here, test=str(suite), test_data_dir=str(data), per="role"), tmp_path / "tuned.yaml")
    assert outcome.test is not None and set(outcome.test.scores) == {"base", "expert/math", "expert/knowledge", "merged"}
    plain = here.run(here.recipe(density=0.4, compression="rank1"), suite=None, data_dir=None).outcome
    assert outcome.test.merged.fingerprint != plain.merged.fingerprint and counts["merge"] == 2


def test_a_result_in_s3_is_merged_from_there(here: World, tmp_path: Path) -> None:
    out = f"{here.uri}/recipes/tuned.yaml"
    run(here, config(here, steps=2), out)
    recipe, _ = read_recipe(out)
    assert recipe.scales is not None and re.fullmatch(rf"{here.uri}/recipes/tuned\.[0-9a-f]{{8}}\.safetensors", recipe.scales)
    merged = here.run(recipe, suite=None, data_dir=None).outcome.merged
    plain = here.run(recipe.model_copy(update={"scales": None}), suite=None, data_dir=None).outcome.merged
    assert merged.fingerprint != plain.fingerprint


def test_the_same_tuning_gives_the_same_scales(here: World, tmp_path: Path) -> None:
    names = set()
    for name in ("one", "two"):
        run(here, config(here, steps=2), tmp_path / name / "tuned.yaml")
        names.add(load_recipe(tmp_path / name / "tuned.yaml").scales)
    assert len(names) == 1  # the name is the content's digest


def test_a_tuning_goes_on_from_a_recipe_that_has_scales(here: World, tmp_path: Path) -> None:
    first = tmp_path / "first.yaml"
    run(here, config(here, steps=2), first)
    _, outcome = run(here, config(here, recipe=str(first), steps=2, rate=0.01), tmp_path / "second.yaml")
    started, ended = (load_recipe(tmp_path / f"{name}.yaml").scales for name in ("first", "second"))
    before, after = (ExpertScales.read(tmp_path / str(name)).values for name in (started, ended))
    assert all(abs(after[name] - row).max() < 0.021 for name, row in before.items())
    assert any((after[name] != row).any() for name, row in before.items()) or outcome.learned.best == 0


def test_learning_stops_when_what_is_held_out_gets_no_better(here: World, tmp_path: Path) -> None:
    """Steps as long as these lead away from any merge: the first look finds the start the best, the second is one too many."""
    _, outcome = run(here, config(here, steps=40, every=1, patience=2, rate=60.0, penalty=0.0), tmp_path / "tuned.yaml")
    assert outcome.learned.best == 0 and len(outcome.learned.steps) == 3
    recipe = load_recipe(tmp_path / "tuned.yaml")
    assert all((row == 1).all() for row in ExpertScales.read(tmp_path / str(recipe.scales)).values.values())
    assert "NO STEP WAS BETTER" in outcome.recipe


@pytest.mark.parametrize("changes", [{"objective": "worst"}, {"objective": "floors", "floor": 0.9}, {"objective": "kl"}], ids=str)
def test_other_objectives_get_better_on_what_is_held_out(here: World, tmp_path: Path, changes: dict[str, Any]) -> None:
    _, outcome = run(here, config(here, **changes), tmp_path / "tuned.yaml")
    values = [one.value for one in outcome.learned.steps if one.value is not None]
    assert min(values) < values[0]


def test_a_model_that_fails_on_the_way_writes_nothing_and_fails_its_run(
    here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = config(here, rate=1e30, steps=3, every=3)
    with pytest.raises(OtaError, match="no finite number"):
        run(here, tuning, tmp_path / "tuned.yaml")
    assert not list(tmp_path.glob("tuned*"))
    client = MlflowClient(tracking_uri=here.tracking_uri)
    experiment = client.get_experiment_by_name("ota-merging").experiment_id
    assert client.search_runs([experiment], "attributes.status = 'FAILED' and tags.role = 'tune'")


KEPT = r"(?s)MLflow at .* failed while logging 'tune ota.*are written: {out}.*kept in .*unsent.*ota sync"
CURVES = {"loss/train/math": [1, 2, 3, 4], "loss/held_out": [0, 2, 4], "seconds/tune": [0]}
FILES = {"recipe.yaml", "scales.safetensors", "tune.html", "plots", "tables"}


def curves(client: MlflowClient, run_id: str) -> dict[str, list[int]]:
    """Some metrics to the steps of their points."""
    names = ("loss/train/math", "loss/held_out", "seconds/tune")
    return {name: [one.step for one in client.get_metric_history(run_id, name)] for name in names}


def test_a_server_that_is_away_ends_no_tuning_and_is_told_later(
    here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tuned.yaml"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
        with pytest.raises(StorageError, match=KEPT.format(out=out)):
            run(here, config(here), out)
    assert load_recipe(out).scales is not None
    _, outcome = run(here, config(here, steps=2), tmp_path / "next.yaml")
    assert kept(here.home), "which was to go to another server"
    ((_, found),) = sync(here.home, here.home / "tracking", here.tracking_uri)
    assert isinstance(found, LoggedRun) and found.run_id != outcome.logged.run_id and not kept(here.home)
    client = MlflowClient(here.tracking_uri)
    assert curves(client, found.run_id) == CURVES
    assert {one.path for one in client.list_artifacts(found.run_id)} == FILES


@pytest.fixture
def recipe_file(here: World) -> Path:
    """A recipe that names its models relative to itself."""
    path = here.models / "to-tune.yaml"
    raw = here.recipe(density=0.4).model_dump(mode="json", by_alias=True, exclude_none=True)
    raw |= {"base_model": "./base", "models": [{"model": f"./{name}", "capability": name} for name in EXPERTS]}
    path.write_text(yaml.safe_dump(raw))
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


def test_ota_tune_writes_a_recipe_that_ota_merge_takes(here: World, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere" / "tuned.yaml"
    options = [
        "--suite",
        here.suite,
        "--data-dir",
        here.data,
        "--memory",
        "256MiB",
        "--device",
        "cpu",
        "--steps",
        3,
        "--blocks",
        3,
    ]
    done = invoke(recipe_file, out, *options, "--held-out", 2, "--length", 48, "--per", "layer", "--rate", 0.1)
    assert done.exit_code == 0, (done.output, done.exception)
    assert (
        "Learned scales" in done.stdout
        and f"recipe: {out}" in done.stdout
        and re.search(r"^ *average ", done.stdout, re.MULTILINE)
    )
    merged = CliRunner().invoke(app, ["merge", str(out), str(tmp_path / "merged"), "--memory", "256MiB"])
    assert merged.exit_code == 0, merged.output
    assert invoke(recipe_file, out, *options).exit_code == 2  # it does not overwrite unless told so


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--suite is missing"),
        (["--suite", "demo-validatoin"], "did you mean 'demo-validation'"),
        (["--suite", "demo-validation", "--per", "head"], "per: unknown 'head'; expected 'tensor', 'layer', 'role' or 'expert'"),
        (["--suite", "demo-validation", "--objective", "best"], "objective: unknown 'best'"),
        (["--suite", "demo-validation", "--floor", "0.9"], "floor: no effect with objective mean"),
        (["--suite", "demo-validation", "--objective", "floors", "--floor", "good"], "floor: got 'good', expected base"),
        (["--suite", "demo-validation", "--steps", "0"], "steps: got 0"),
        (["--suite", "demo-validation", "--device", "gpu"], "expected cpu, cuda or auto"),
    ],
)
def test_mistakes_end_with_a_message_and_code_2(
    recipe_file: Path, tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Callable[..., Any]:
        raise AssertionError("the flow was started")

    monkeypatch.setattr("flows.tune.tune_flow", never)
    done = invoke(recipe_file, tmp_path / "tuned.yaml", *options)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output, (done.output, done.exception)
    raw = yaml.safe_load(recipe_file.read_text()) | {"merge_method": "linear", "parameters": {}}
    recipe_file.write_text(yaml.safe_dump(raw))
    done = invoke(recipe_file, tmp_path / "tuned.yaml", "--suite", "demo-validation")
    assert done.exit_code == 2 and "linear has no merged edit of the base" in done.stderr, done.output


def test_what_an_objective_needs_is_said_before_anything_is_learned(here: World, tmp_path: Path) -> None:
    raw = here.recipe(density=0.4).model_dump(mode="json", by_alias=True, exclude_none=True)
    raw["models"][0]["capability"] = "algebra"
    with pytest.raises(OtaError, match="objective kl: no expert of the recipe has the capability 'math'"):
        run(here, config(here, recipe=raw, objective="kl"), tmp_path / "tuned.yaml")
    with pytest.raises(OtaError, match="floor: the suite has no capability 'maths'; did you mean 'math'"):
        run(here, config(here, objective="floors", floor={"maths": 0.9}), tmp_path / "tuned.yaml")
    with pytest.raises(OtaError, match="'math': its 12 documents give 12 blocks that are held out and 0 to learn from"):
        run(here, config(here, held_out=100), tmp_path / "tuned.yaml")
    assert not list(tmp_path.glob("tuned*"))
