"""Searches over small real experts: trials scored and logged, nothing done twice, nothing left on the disk, one judge."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from prefect import flow, task
from typer.testing import CliRunner

from flows.cli.app import app
from flows.search import SearchOutcome, search_flow
from flows.stage import stage
from ota_core.errors import OtaError, StorageError
from ota_core.recipe.recipe import MergeRecipe, load_recipe
from tasks.benchmark import Benchmark, TrialJob, trial_job
from tasks.evaluation import harness, loading
from tasks.evaluation.in_memory import MergedModel
from tasks.evaluation.kept import SCORES_FILE, read_scores
from tasks.evaluation.scores import ModelScores
from tasks.experiments.search.config import SearchConfig
from tasks.experiments.search.merge import Trials
from tasks.experiments.search.search import SearchError
from tasks.merging.inputs import fetch_all
from tasks.merging.sources import planned
from tasks.orchestration.executors import Pool
from tasks.settings import places
from tasks.tracking import outbox
from tasks.tracking.kept_run import KeptRun
from tasks.tracking.outbox import kept, sync
from tasks.tracking.run import LoggedRun
from tasks.tracking.store import Store
from tests.flows.merge_fixture import EXPERTS, World
from tests.flows.nightly_fixture import artifacts_of
from tests.servers import flow_run_name, free_port, task_states
from tests.tasks.local.real.test_real_losses import LOSSES, TEXT
from tests.tiny_suite import edited, read_rows, write_rows, write_tiny_suite


@pytest.fixture
def here(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", world.tracking_uri)
    monkeypatch.delenv("OTA_GPU_DEPLOYMENT", raising=False)
    home = tmp_path / "home"
    monkeypatch.setenv("OTA_HOME", str(home))
    return world.at(home)


@pytest.fixture(scope="module")
def judge(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(suite, data) with other documents than the world's."""
    suite, data = write_tiny_suite(tmp_path_factory.mktemp("judge"))
    for path in data.iterdir():
        write_rows(path, [{**row, "prompt": f"Once more. {row['prompt']}"} for row in read_rows(path)])
    return suite, data


def config(world: World, **changes: Any) -> SearchConfig:
    recipe = world.recipe(density=0.4, compression="rank1").model_dump(mode="json", by_alias=True, exclude_none=True)
    known = {
        "recipe": recipe, "suite": str(world.suite), "data_dir": str(world.data), "budget": {"trials": 7, "rungs": [4, 8]}, "seed": 1,
        "floor": "none",
    }  # fmt: skip
    return SearchConfig.model_validate(known | changes)


@dataclass
class Ran:
    id: Any
    outcome: SearchOutcome

    @property
    def trials(self) -> list[Any]:
        return [(one.number, one.values, one.scores, one.complete) for one in self.outcome.tuned.trials]


def run(world: World, search: SearchConfig, **options: Any) -> Ran:
    state: Any = search_flow(search, device="cpu", memory="256MiB", home=world.home, return_state=True, **options)
    return Ran(state.state_details.flow_run_id, state.result())


def logged(world: World, outcome: SearchOutcome) -> tuple[Any, list[Any]]:
    """The search's run in MLflow, and those of its trials in their order."""
    client = MlflowClient(tracking_uri=world.tracking_uri)
    parent = client.get_run(outcome.logged.run_id)
    children = client.search_runs([outcome.logged.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return parent, sorted(children, key=lambda child: int(child.data.tags["trial"]))


def test_a_search_scores_and_logs_every_trial_and_leaves_a_recipe(here: World, counts: Counter[str], tmp_path: Path) -> None:
    out = tmp_path / "best.yaml"
    ran = run(here, config(here, floor={"default": "base", "knowledge": "none"}), out=str(out))
    tuned = ran.outcome.tuned
    assert len(tuned.trials) == 7 and set(tuned.trials[1].values) == {"density/math", "density/knowledge", "lambda"}
    # Second moments once for all, every trial merged once for all its rungs; the base once a rung, the experts on all documents.
    assert counts["compress"] == len(EXPERTS) and counts["trial"] == 7 and counts["merge"] == counts["mask"] == 0
    distinct = {json.dumps(one.recipe.effective()) for one in tuned.trials}
    assert len(distinct) == 7 and counts["score"] <= 2 + len(EXPERTS) + sum(len(one.scores) for one in tuned.trials)
    # Nothing but the trials' scores stays: no merged model.
    assert not (here.home / "artifacts" / "merged").exists()
    assert not [path for path in here.home.rglob("model.safetensors") if "cache" not in path.parts]  # the cache holds the inputs

    text = out.read_text()
    assert load_recipe(out) == tuned.best.recipe and text == ran.outcome.recipe
    assert f"trial {tuned.best.number} of 7" in text and f"average {100 * tuned.best.average:.1f}" in text
    assert "# Floors: math" in text and "knowledge" not in next(line for line in text.splitlines() if line.startswith("# Floors"))

    names = task_states(ran.id)
    assert sum(name.startswith("trial ") for name in names) == 7 and "trial 0: ota rho=0.40 rank1" in names
    assert flow_run_name(ran.id).startswith("search ota ")
    page = artifacts_of(ran.id)["search"].data.replace("**", "")  # the best is bold, and may be the recipe
    assert "| recipe |" in page and f"| {100 * tuned.best.average:.1f} |" in page

    parent, children = logged(here, ran.outcome)
    assert parent.info.status == "FINISHED" and parent.data.tags["role"] == "search" and parent.data.params["rungs"] == "4,8"
    assert parent.data.metrics["score/avg"] == tuned.best.average and parent.data.metrics["trials"] == 7
    assert [child.data.tags["trial"] for child in children] == [str(i) for i in range(7)]
    client = MlflowClient(tracking_uri=here.tracking_uri)
    for child, trial in zip(children, tuned.trials, strict=True):
        assert child.info.status == "FINISHED" and child.data.tags["role"] == "trial"
        assert (
            child.data.tags["pruned"] == str(not trial.complete).lower()
            and child.data.tags["feasible"] == str(not trial.shortfall).lower()
        )
        assert {key: float(value) for key, value in child.data.params.items() if key != "merge_method"} == trial.values
        history = client.get_metric_history(child.info.run_id, "score/math")
        assert [(one.step, one.value) for one in history] == [(limit, scores["math"]) for limit, scores in trial.scores.items()]
        assert child.data.metrics["violation"] == trial.violation
    kept = {one.path for one in client.list_artifacts(parent.info.run_id)}
    assert kept == {"recipe.yaml", "search.html", "plots", "tables"}
    assert [one.step for one in client.get_metric_history(parent.info.run_id, "best/avg")] == list(range(7))


def test_a_server_that_is_away_ends_no_search_and_is_told_later(
    here: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs that it gets then are those that it would have got: the same search again finds them whole."""
    search, out = config(here, budget={"trials": 3, "rungs": [4, 8]}), tmp_path / "best.yaml"
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
        with pytest.raises(StorageError, match=r"(?s)MLflow at .* failed while logging 'search ota.*kept in .*unsent.*ota sync"):
            run(here, search, out=str(out))
    assert load_recipe(out).merge_method == "ota"
    ((_, found),) = sync(here.home, here.home / "tracking", here.tracking_uri)
    assert isinstance(found, LoggedRun) and not kept(here.home)
    client = MlflowClient(tracking_uri=here.tracking_uri)

    def everything() -> list[Any]:
        runs = [
            client.get_run(found.run_id),
            *client.search_runs([found.experiment_id], f"tags.`mlflow.parentRunId` = '{found.run_id}'"),
        ]
        runs.sort(key=lambda one: one.info.run_id)
        curves = [
            (key, [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, key)])
            for run in runs
            for key in sorted(run.data.metrics)
        ]
        files = [sorted(one.path for one in client.list_artifacts(run.info.run_id)) for run in runs]
        return [[(run.info.status, run.data.params) for run in runs], curves, files]

    told = everything()
    assert len(told[0]) == 4 and {status for status, _ in told[0]} == {"FINISHED"}
    assert ("best/avg", 3) in [(key, len(points)) for key, points in told[1]]
    again = run(here, search)
    assert again.outcome.logged.run_id == found.run_id
    assert [told[0], told[2]] == [everything()[0], everything()[2]], "the same runs, with nothing added"


def test_what_waits_of_a_search_is_sent_before_what_is_newer(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent after the newer trials, it would say that there are fewer."""
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
        with pytest.raises(StorageError, match="ota sync"):
            run(here, config(here, budget={"trials": 2, "rungs": [4]}))
    ((path, waits),) = kept(here.home).items()
    path.write_text(waits.model_copy(update={"store": here.tracking_uri}).model_dump_json())
    asked = []
    send = outbox.log_kept

    def sends(told: KeptRun, store: Store) -> LoggedRun:
        asked.append(len(told.children))
        return send(told, store)

    monkeypatch.setattr(outbox, "log_kept", sends)
    ran = run(here, config(here, budget={"trials": 3, "rungs": [4]}))
    assert asked == [2, 3] and not kept(here.home)
    parent, children = logged(here, ran.outcome)
    assert parent.data.metrics["trials"] == 3 and [child.info.status for child in children] == ["FINISHED"] * 3
    curve = MlflowClient(tracking_uri=here.tracking_uri).get_metric_history(parent.info.run_id, "best/avg")
    assert [one.step for one in curve] == [0, 1, 2]


def test_the_same_again_computes_nothing_and_logs_nothing_twice(here: World, counts: Counter[str]) -> None:
    first = run(here, config(here))
    counts.clear()
    again = run(here, config(here))
    assert again.trials == first.trials and counts["trial"] == counts["score"] == counts["compress"] == 0
    parent, children = logged(here, again.outcome)
    assert again.outcome.logged.run_id == first.outcome.logged.run_id and len(children) == 7 and parent.info.status == "FINISHED"
    more = run(here, config(here, budget={"trials": 9, "rungs": [4, 8]}))
    assert more.trials[:7] == first.trials and counts["trial"] == 2 and len(logged(here, more.outcome)[1]) == 9


def test_a_search_that_broke_off_goes_on_in_its_runs(
    here: World, counts: Counter[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = run(here.at(tmp_path / "other"), config(here, seed=5))
    counts.clear()
    score, left = TrialJob.run, iter(range(8))

    def breaking(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise OtaError("the disk is full")
        return score(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TrialJob, "run", breaking)
        with pytest.raises(OtaError, match="the disk is full"):
            run(here, config(here, seed=5))
    client = MlflowClient(tracking_uri=here.tracking_uri)
    experiment = client.get_experiment_by_name("ota-merging").experiment_id
    (failed,) = client.search_runs([experiment], "attributes.status = 'FAILED' and tags.role = 'search'")
    rest = run(here, config(here, seed=5))
    assert rest.trials == whole.trials and rest.outcome.logged.run_id == failed.info.run_id
    parent, children = logged(here, rest.outcome)
    assert parent.info.status == "FINISHED" and len(children) == 7 and {one.info.status for one in children} == {"FINISHED"}


def test_no_trial_writes_weights(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a while: looked at when a trial is scored, everything that this process wrote is smaller than one layer."""
    score, sizes = MergedModel.score, []

    def looked(*args: Any, **kwargs: Any) -> Any:
        sizes.extend(path.stat().st_blocks * 512 for path in here.home.rglob("*.safetensors") if "cache" not in path.parts)
        return score(*args, **kwargs)

    monkeypatch.setattr(MergedModel, "score", looked)
    ran = run(here, config(here, budget={"trials": 2, "rungs": [4, 8]}))
    moments = [path for path in here.home.rglob("moments.safetensors")]
    assert len(ran.trials) == 2 and set(sizes) == {path.stat().st_blocks * 512 for path in moments}


def test_the_winner_is_judged_once_on_another_suite(here: World, judge: tuple[Path, Path], counts: Counter[str]) -> None:
    ran = run(here, config(here, budget={"trials": 3, "rungs": [8]}, test=str(judge[0]), test_data_dir=str(judge[1])))
    test = ran.outcome.test
    assert test is not None and len(list((here.home / "artifacts" / "merged").iterdir())) == 1
    assert counts["trial"] == 3 and counts["merge"] == 1  # the winner, to keep
    assert set(test.scores) == {"base", *(f"expert/{name}" for name in EXPERTS), "merged"}


@pytest.mark.parametrize("renamed", [False, True])
def test_suites_that_share_documents_are_refused(here: World, tmp_path: Path, counts: Counter[str], renamed: bool) -> None:
    """Also under other names of tasks and with more columns: it is the question and its answer that count."""
    suite, data = here.suite, here.data
    if renamed:
        suite, data = write_tiny_suite(tmp_path / "judge")
        for path in data.iterdir():
            rows = [{**row, "id": i} for i, row in enumerate(read_rows(path))]
            write_rows(path, [*({**row, "prompt": f"Other. {row['prompt']}"} for row in rows[1:]), rows[0]])
        for path in (tmp_path / "judge" / "tiny").iterdir():
            path.write_text(path.read_text().replace("tiny_", "judge_"))
        suite.with_name("judge.yaml")
        suite.write_text(suite.read_text().replace("tiny_", "judge_"))
    with pytest.raises(SearchError, match=rf"share {2 if renamed else 24} of 24 documents \(tiny_"):
        run(here, config(here, test=str(suite), test_data_dir=str(data)))
    assert counts["trial"] == counts["score"] == 0


def test_where_the_suite_measures_a_loss_trials_and_floors_go_by_it(here: World, tmp_path: Path) -> None:
    suite, data = write_tiny_suite(tmp_path / "losses")
    (suite.parent / "tiny" / "text.yaml").write_text(TEXT)
    write_rows(data / "text.jsonl", [{"text": f"{i} and {i} are {2 * i}"} for i in range(12)])
    edited(suite, LOSSES)
    search = config(here, suite=str(suite), data_dir=str(data), budget={"trials": 2, "rungs": [4, 8]}, floor="base")
    ran = run(here, search)
    kept = [
        ModelScores.model_validate_json(file.read_text())
        for file in Path(places(here.home).artifacts, "scores").glob(f"*/{SCORES_FILE}")
    ]
    likelihoods = {2.0 ** -one.losses["math"] for one in kept}
    for trial in ran.outcome.tuned.trials:
        assert {scores["math"] for scores in trial.scores.values()} | {trial.floors["math"]} <= likelihoods
        assert trial.last["knowledge"] in {one.by_capability()["knowledge"] for one in kept}
    assert ran.outcome.tuned.likelihoods == ("math",) and "# Of math: the likelihood of a byte" in ran.outcome.recipe
    assert logged(here, ran.outcome)[0].data.params["likelihood_of_a_byte"] == "math"


def test_trials_on_the_gpu_pool_are_the_same_and_leave_no_model(here: World, worker_here: list[str], tmp_path: Path) -> None:
    alone = run(here.at(tmp_path / "alone"), config(here, budget={"trials": 4, "rungs": [4, 8]}))
    sent = run(here, config(here, budget={"trials": 4, "rungs": [4, 8]}), gpu="stage/gpu")
    assert sent.trials == alone.trials
    assert len({name for name in worker_here if name.startswith("trial ")}) == 4, "each can be told from the others"
    assert any(name.startswith("trial 3: ota rho=") for name in worker_here) and "benchmark base, math, knowledge" in worker_here
    merged = here.home / "artifacts" / "merged"
    assert not merged.exists() or not list(merged.iterdir())


def test_trials_of_one_run_share_the_loaded_model(here: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker does them that was sent several at once; each by itself loads it anew. The scores are the same."""
    where, recipe = places(here.home), here.recipe(density=0.4)
    plan = planned(recipe, fetch_all(recipe, cache=where.cache, recipe_dir=None), where, memory="256MiB")
    benchmark = Benchmark.of(str(here.suite), str(here.data), None, where)
    points = [(scale, limit) for scale in (1.0, 1.5) for limit in (4, 8)]
    jobs = [
        trial_job(replace(plan, recipe=here.recipe(density=0.4, **{"lambda": scale})), benchmark, limit, f"trial {scale:g}")
        for scale, limit in points
    ]
    loads, load = list[Path](), loading.load_model
    monkeypatch.setattr(harness, "load_model", lambda model, *rest: (loads.append(model), load(model, *rest))[1])
    told = [job.abroad().model_dump(mode="json", by_alias=True) for job in jobs]
    together = where.model_copy(update={"artifacts": str(here.home / "together")})
    stage(told, together, "cpu")
    assert len(loads) == 1
    apart = where.model_copy(update={"artifacts": str(here.home / "apart")})
    for one in told:
        stage([one], apart, "cpu")
    assert len(loads) == 1 + len(jobs)
    for job in jobs:
        one, other = (read_scores(place, ref) for place in (together, apart) if (ref := job.find(place)))
        assert one.model_dump(exclude={"seconds"}) == other.model_dump(exclude={"seconds"})


def test_a_search_over_methods_logs_what_was_chosen(here: World, tmp_path: Path) -> None:
    recipe = here.recipe(density=0.4, compression="rank1", **{"lambda": "auto"}).model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    space = {"merge_method": "ota,ties", "refine": ["none", "rowspace"], "per_expert": False}
    ran = run(here, config(here, recipe=recipe, space=space, budget={"trials": 6, "rungs": [8]}), out=str(tmp_path / "best.yaml"))
    chosen = [(one.recipe.merge_method, one.recipe.refined) for one in ran.outcome.tuned.trials]
    assert set(chosen) == {("ota", False), ("ota", True), ("ties", False), ("ties", True)}
    assert all(one.recipe.auto for one in ran.outcome.tuned.trials)
    parent, children = logged(here, ran.outcome)
    assert "merge_method ota,ties" in parent.data.params["space"] and "lambda" not in parent.data.params["space"]
    assert [child.data.params["merge_method"] for child in children] == [method for method, _ in chosen]
    assert load_recipe(tmp_path / "best.yaml") == ran.outcome.tuned.best.recipe


def test_a_point_that_comes_again_is_merged_again_on_the_pool(here: World, worker_here: list[str]) -> None:
    """No model is kept between runs, and what was measured is read: on other documents the point is measured anew."""
    where, recipes = places(here.home), [here.recipe(**{"lambda": scale}) for scale in (1, 2, 1)]
    fetched = fetch_all(recipes[0], cache=where.cache, recipe_dir=None)
    benchmark = Benchmark.of(str(here.suite), str(here.data), None, where)

    @task
    def scored(trials: Trials, recipe: MergeRecipe, limit: int) -> ModelScores:
        return trials.score(recipe, limit, "trial")

    @flow
    def parent() -> list[ModelScores]:
        with Trials(planned(recipes[0], fetched, where), benchmark, where, Pool("stage/gpu", "cpu")) as trials:
            return [scored(trials, recipe, limit) for recipe, limit in zip([*recipes, recipes[0]], (4, 4, 8, 4), strict=True)]

    first, _, last, again = parent()
    assert len(worker_here) == 3 and (first.limit, last.limit) == (4, 8) and again == first


def invoke(*arguments: object, on: World | None = None) -> Any:
    """``on``: a world whose small suite chooses, with little memory."""
    small = ["--suite", on.suite, "--data-dir", on.data, "--device", "cpu", "--memory", "256MiB"] if on else []
    return CliRunner().invoke(app, ["search", *map(str, [*arguments, *small])])


@pytest.fixture
def recipe_file(here: World) -> Path:
    """A recipe that names its models relative to itself."""
    path = here.models / "recipe.yaml"
    raw = here.recipe(density=0.4).model_dump(mode="json", by_alias=True, exclude_none=True)
    raw |= {"base_model": "./base", "models": [{"model": f"./{name}", "capability": name} for name in EXPERTS]}
    path.write_text(yaml.safe_dump(raw))
    return path


def test_ota_search_prints_the_best_trials_and_the_recipe_can_be_merged(
    here: World, recipe_file: Path, judge: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "elsewhere" / "best.yaml"
    done = invoke(recipe_file, out, "--trials", 4, "--rungs", "4,8", "--floor", "none", "--density", "0.1:0.9", "--shared",
                  "--lambda", "none", "--test", judge[0], "--test-data-dir", judge[1], on=here)  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)
    assert "Best trials" in done.stdout and re.search(r"^density .*0\.4", done.stdout, re.MULTILINE)
    assert (
        f"recipe: {out}" in done.stdout
        and re.search(r"^ *winner ", done.stdout, re.MULTILINE)
        and "is the best: average" in done.stdout
    )
    found = load_recipe(out)
    assert found.setting("lambda") == 1 and os.path.isabs(found.models[0].model)
    merged = CliRunner().invoke(app, ["merge", str(out), str(tmp_path / "merged"), "--memory", "256MiB"])
    assert merged.exit_code == 0, merged.output
    # It does not overwrite unless told so.
    assert invoke(recipe_file, out, on=here).exit_code == 2


def test_ota_search_says_that_nothing_holds_the_floors(here: World, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "best.yaml"
    done = invoke(recipe_file, out, "--trials", 2, "--rungs", 8, "--floor", "none", "--floor", "knowledge=score:1", on=here)
    assert done.exit_code == 3 and "No trial holds all floors" in done.stdout and "instead of 100.0" in done.stdout, done.output
    assert "NO TRIAL HELD ALL FLOORS" in out.read_text() and load_recipe(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--suite is missing"),
        (["--suite", "demo-validatoin"], "did you mean 'demo-validation'"),
        (["--suite", "demo-validation", "--budget", "1"], "1 evaluations pay for no trial"),
        (["--suite", "demo-validation", "--density", "2"], "expected a range such as 0.05:1"),
        (["--suite", "demo-validation", "--weight", "0:1"], "the range of weight has no effect with merge_method ota"),
        (["--suite", "demo-validation", "--floor", "math=good"], "floor of math: got 'good', expected base"),
        (["--suite", "demo-validation", "--floor", "0.9", "--floor", "base"], "given more than once for default"),
        (["--suite", "demo-validation", "--rungs", "a,b"], "--rungs: got 'a,b'"),
        (["--suite", "demo-validation", "--choose", "power=1,2"], "--choose: got 'power=1,2', expected one of merge_method"),
        (["--suite", "demo-validation", "--choose", "refine=none,row"], "refine row"),
        (["--suite", "demo-validation", "--choose", "scope=global", "--choose", "scope=x"], "given more than once for scope"),
        (["--suite", "demo-validation", "--device", "gpu"], "expected cpu, cuda or auto"),
        (["--suite", "demo-validation", "--memory", "much"], "memory: got 'much'"),
    ],
)
def test_mistakes_end_with_a_message_and_code_2(
    recipe_file: Path, tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Callable[..., Any]:
        raise AssertionError("the flow was started")

    monkeypatch.setattr("flows.search.search_flow", never)
    done = invoke(recipe_file, tmp_path / "best.yaml", *options)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output, (done.output, done.exception)
    recipe_file.write_text(recipe_file.read_text().replace("density", "densty"))
    done = invoke(recipe_file, tmp_path / "best.yaml", "--suite", "demo-validation")
    assert done.exit_code == 2 and "did you mean 'density'" in done.stderr, done.output
