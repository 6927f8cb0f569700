"""Cancel, as in the Prefect UI: within ten seconds nothing computes any more, on either pool, and nothing is left half-written."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.states import Pending

from ota_core.artifact import RECORD
from tasks.local.stack.layout import ROOT
from tasks.storage import s3
from tasks.storage.layout import write_expert_json
from tasks.storage.models import EXPERT_JSON, upload_folder
from tests.flows.merge_fixture import write_v
from tests.flows.stack.live_stack import Live, stack_up, tasks_at_work, until
from tests.tiny_models import perturb, write_tiny_llama
from tests.tiny_suite import write_tiny_suite

pytestmark = pytest.mark.slow
BUCKET = "s3://ota-cancel"
SECONDS = 10
"""What issue and manual promise; the machine that runs this test does other work, too."""
MARGIN = 10


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with stack_up(tmp_path_factory.mktemp("cancel")) as live:
        s3.create_bucket(BUCKET)
        models = live.folder / "models"
        base = write_tiny_llama(models / "base", hidden=64, layers=4)
        upload_folder(base, f"{BUCKET}/base")
        for seed, name in enumerate(("math", "knowledge"), start=1):
            expert = perturb(base, models / name, seed=seed)
            write_v(expert, seed=seed)
            write_expert_json(expert, capability=name, base_model=f"{BUCKET}/base", trained_at="2026-11-20")
            upload_folder(expert, f"{BUCKET}/experts/{name}/2026-11-20", last=EXPERT_JSON)
        write_tiny_suite(live.folder / "suite", n=10_000)  # many minutes
        yield live


def recipe(method: str = "linear", **parameters: Any) -> dict[str, Any]:
    models = [{"model": f"{BUCKET}/experts/{name}/2026-11-20"} for name in ("math", "knowledge")]
    return {"merge_method": method, "base_model": f"{BUCKET}/base", "models": models, "parameters": parameters}


def suite(live: Live) -> dict[str, Any]:
    return {"suite": str(live.folder / "suite" / "tiny.yaml"), "data_dir": str(live.folder / "suite" / "data")}


def endless() -> dict[str, Any]:
    """A merge whose first matrix takes hours, in one loop that asks nobody whether to go on."""
    return recipe("karcher", max_iter=10**9, tol=0.0)


def ended_well(live: Live, run: UUID, seconds: float) -> None:
    print(f"{seconds:.1f} s until the last process was gone")
    assert seconds < SECONDS + MARGIN
    assert live.ended(run).state_name == "Cancelled"
    until(lambda: all(one.state.is_final() for one in live.below(run)), live)
    assert {one.state_name for one in live.below(run)} <= {"Cancelled", "Completed"}
    written = [one.uri for one in s3.list_objects(os.environ["OTA_ARTIFACTS"])]
    complete = {uri.rpartition("/")[0] for uri in written if uri.endswith(f"/{RECORD}")}
    assert all(any(uri.startswith(f"{folder}/") for folder in complete) for uri in written), "something half-written is visible"


def here(live: Live) -> dict[str, str]:
    """All of it on the CPU pool."""
    return {"OTA_GPU_DEPLOYMENT": ""}


def computing(live: Live, run: UUID, what: str) -> None:
    """Wait until a task of the run, or a run below it, of this name is at work."""
    until(lambda: any(name.startswith(what) for name in tasks_at_work(run, live.below(run))), live)


def test_a_merge_on_the_cpu_pool(live: Live) -> None:
    run = live.start("merge/merge", recipe=endless(), suite=None, env=here(live))
    computing(live, run, "merge karcher")
    ended_well(live, run, live.cancel(run))


def test_a_merge_whose_heavy_stage_is_on_the_gpu_pool(live: Live) -> None:
    run = live.start("merge/merge", recipe=endless(), suite=None)
    until(lambda: [one for one in live.below(run) if one.state_name == "Running"], live)
    ended_well(live, run, live.cancel(run))


def test_a_benchmark(live: Live) -> None:
    run = live.start("benchmark/benchmark", model=f"{BUCKET}/base", **suite(live), env=here(live))
    computing(live, run, "benchmark base")
    ended_well(live, run, live.cancel(run))


def test_a_benchmark_on_the_gpu_pool(live: Live) -> None:
    run = live.start("benchmark/benchmark", model=f"{BUCKET}/base", **suite(live))
    until(lambda: [one for one in live.below(run) if one.state_name == "Running"], live)
    ended_well(live, run, live.cancel(run))


def test_the_stage_alone(live: Live) -> None:
    """Who cancels what was sent cancels no more than that: the merge says so and fails."""
    run = live.start("merge/merge", recipe=endless(), suite=None)
    (stage,) = until(lambda: [one for one in live.below(run) if one.state_name == "Running"], live)
    seconds = live.cancel(stage.id)
    assert seconds < SECONDS + MARGIN
    ended = live.ended(run)
    assert ended.state_name == "Failed" and "Cancelled" in ended.state.message, ended.state


def test_a_night(live: Live) -> None:
    config = {
        "experts": f"{BUCKET}/experts", "base_model": f"{BUCKET}/base", **suite(live), "publish": f"{BUCKET}/merged", "name": "ota-merged",
        "candidates": [{"name": "linear", "merge_method": "linear"}],
    }  # fmt: skip
    (live.folder / "nightly.yaml").write_text(yaml.safe_dump(config))
    run = live.start("nightly/nightly", config=str(live.folder / "nightly.yaml"))
    until(lambda: [one for one in live.below(run) if one.name.startswith("benchmark") and one.state_name == "Running"], live)
    ended_well(live, run, live.cancel(run))
    merges = [one for one in live.below(run) if one.name.startswith("linear ")]
    assert [one.state_name for one in merges] == ["Cancelled"]
    assert not s3.list_objects(f"{BUCKET}/merged")


def test_a_search_reads_killed_in_mlflow(live: Live) -> None:
    search = {
        "recipe": recipe("ota", density=0.4, compression="rank1"), **suite(live), "budget": {"trials": 100_000, "rungs": [4, 8]}, "floor": {"default": "none"},
    }  # fmt: skip
    run = live.start("search/search", search=search, out=None, env=here(live))
    until(lambda: searches() == ["RUNNING"], live)
    ended_well(live, run, live.cancel(run))
    until(lambda: searches() == ["KILLED"], live)


def searches() -> list[str]:
    """The states of the searches in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient()
    found = client.search_runs([one.experiment_id for one in client.search_experiments()], "tags.role = 'search'")
    return [one.info.status for one in found]


def test_a_merge_in_the_processes_of_dask(live: Live) -> None:
    run = live.start("merge/merge", recipe=endless(), suite=None, runner={"kind": "dask"}, shard_size="1MB", env=here(live))
    until(lambda: sum("spawn_main" in " ".join(one.cmdline()) for one in live.processes(run)) >= 2, live)
    computing(live, run, "merge")
    ended_well(live, run, live.cancel(run))


def test_a_merge_in_a_pod(live: Live) -> None:
    """What a job of Kubernetes or Docker runs, with the image's command; no worker of this stack takes the run."""
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("merge/merge")
        given = {**deployment.parameters, "recipe": endless(), "suite": None}
        run = client.create_flow_run_from_deployment(deployment.id, parameters=given, state=Pending()).id
    environ = {**os.environ, "OTA_ALLOWED_ROOTS": str(live.folder), "OTA_HOME": str(live.home / "pod")}
    with open(live.folder / "pod.log", "wb") as log:
        pod = subprocess.Popen(
            [sys.executable, "-m", "prefect", "flow-run", "execute", str(run)], cwd=ROOT, env=environ, stdout=log, stderr=log
        )
    computing(live, run, "merge karcher")
    ended_well(live, run, live.cancel(run))
    pod.wait(120)


def test_what_was_left_is_swept_by_the_next_run(live: Live) -> None:
    """A process that was ended hard leaves its temporary folder; the next merge on that machine removes it."""
    outcome = live.ended(live.start("merge/merge", recipe=recipe(), suite=None, env=here(live)))
    assert outcome.state_name == "Completed", (outcome.state, live.logs())
    assert not [name for name in live.leftovers() if "/merged/" in name]
