"""Servers that restart in the middle of a night, and a CPU worker that dies: nothing is lost, and nothing reads Running for ever."""

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psutil
import pytest
import yaml

from tasks.local.stack import control as stack_control
from tasks.registry.promotion import current
from tasks.storage import s3
from tasks.storage.layout import write_expert_json
from tasks.storage.models import EXPERT_JSON, upload_folder
from tasks.tracking.registered import CHAMPION
from tests.flows.stack.live_stack import Live, made, stack_up, tasks_at_work, until
from tests.tiny_models import write_tiny_llama
from tests.tiny_suite import write_tiny_suite
from tests.tiny_training import memorise, rows_of

pytestmark = pytest.mark.slow
BUCKET = "s3://ota-restarts"
AWAY = 60
"""Seconds that Prefect's server is away. Its clients ask again for about four minutes."""
LINEAR = {"name": "linear", "merge_method": "linear"}
OTA = {"name": "ota rho=0.80", "merge_method": "ota", "parameters": {"density": 0.8, "compression": "rank1"}}


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with stack_up(tmp_path_factory.mktemp("restarts")) as live:
        s3.create_bucket(BUCKET)
        _, data = write_tiny_suite(live.folder / "suite", n=16)
        base = write_tiny_llama(live.folder / "base", hidden=48)
        upload_folder(base, f"{BUCKET}/base")
        for name, steps in {"math": 100, "knowledge": 120}.items():
            expert = memorise(base, live.folder / name, rows_of(data), seed=1, steps=steps)
            write_expert_json(expert, capability=name, base_model=f"{BUCKET}/base", trained_at="2026-11-20")
            upload_folder(expert, f"{BUCKET}/experts/{name}/2026-11-20", last=EXPERT_JSON)
        yield live


def config(live: Live, name: str, *candidates: dict[str, Any], suite: str = "suite") -> str:
    """Where a night's configuration lies."""
    said = {
        "experts": f"{BUCKET}/experts", "base_model": f"{BUCKET}/base", "suite": str(live.folder / suite / "tiny.yaml"),
        "data_dir": str(live.folder / suite / "data"), "publish": f"{BUCKET}/merged", "name": name, "memory": "256MiB",
        "candidates": list(candidates),
    }  # fmt: skip
    file = live.folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(said))
    return str(file)


def at_work(live: Live, run: UUID, verb: str) -> Any:
    """The run below this one, of this kind, that a worker has taken: waited for."""
    return until(lambda: [one for one in live.below(run) if one.name.startswith(verb) and one.state_name == "Running"], live)


def test_servers_that_restart_in_the_middle_of_a_night(live: Live) -> None:
    run = live.start("nightly/nightly", config=config(live, "restarts", LINEAR, OTA))
    at_work(live, run, "merge")
    live.stop("prefect")
    time.sleep(AWAY)
    live.start_again("prefect")
    at_work(live, run, "benchmark")
    live.stop("mlflow")
    live.start_again("mlflow")
    night = live.ended(run, seconds=1800)
    assert night.state.name == "Promoted", (night.state.message, live.logs())
    below = live.below(run)
    assert {one.state_name for one in below} == {"Completed"}, [(one.name, one.state) for one in below]
    champion = current(CHAMPION, name="restarts")
    assert champion is not None
    merges = merges_in_mlflow()
    assert Counter(merges.values()) == {"FINISHED": 2}, merges
    assert max(made([night, *below]).values()) == 1, "nothing was computed twice"


def merges_in_mlflow() -> dict[str, str]:
    """Every merge's run by its name, and its state."""
    from mlflow import MlflowClient

    client = MlflowClient()
    experiments = [one.experiment_id for one in client.search_experiments()]
    found = client.search_runs(experiments, "tags.recipe_fingerprint LIKE '%'")
    return {f"{one.info.run_name} {one.info.run_id}": one.info.status for one in found}


def test_a_run_is_cancelled_though_its_worker_no_longer_listens(live: Live) -> None:
    """Prefect's worker gives up to listen for runs that it has started when the server is away for half a minute."""
    models = [{"model": f"{BUCKET}/experts/{name}/2026-11-20"} for name in ("math", "knowledge")]
    parameters = {"max_iter": 10**9, "tol": 0.0}  # hours
    endless = {"merge_method": "karcher", "base_model": f"{BUCKET}/base", "models": models, "parameters": parameters}
    run = live.start("merge/merge", recipe=endless, suite=None, env={"OTA_GPU_DEPLOYMENT": ""})
    until(lambda: any(name.startswith("merge karcher") for name in tasks_at_work(run, live.below(run))), live)
    live.stop("prefect")
    time.sleep(AWAY)
    live.start_again("prefect")
    print(f"{live.cancel(run):.1f} s until the last process was gone")
    assert live.ended(run).state_name == "Cancelled"


def test_no_run_of_a_dead_cpu_worker_reads_running_for_ever(live: Live) -> None:
    """The night, and the merge that it has called in its own process: both send heartbeats, and the automation hears that they stop."""
    write_tiny_suite(live.folder / "long", n=10_000)  # many minutes
    run = live.start("nightly/nightly", config=config(live, "dead", LINEAR, suite="long"), env={"OTA_GPU_DEPLOYMENT": ""})
    at_work(live, run, "linear")
    worker = psutil.Process(stack_control.processes(live.home)["worker-cpu"].pid)
    for process in [*live.processes(run), worker]:
        process.kill()  # as when the machine goes away: no goodbye
    assert live.ended(run, seconds=600).state_name == "Crashed"
    until(lambda: all(one.state.is_final() for one in live.below(run)), live, seconds=600)
    assert {one.state_name for one in live.below(run)} == {"Crashed"}
