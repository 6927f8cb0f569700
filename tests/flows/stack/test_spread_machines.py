"""The same merge by the processes of a Dask cluster, by Ray, and by Prefect workers: the bytes of one process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest

from ota_core.artifact import read_record
from ota_core.errors import OtaError
from ota_core.recipe.recipe import MergeRecipe
from tasks.artifacts.processes import wait_for_end
from tasks.orchestration.runners import Runner
from tests.flows.merge_fixture import World
from tests.flows.stack.test_spread import REPOSITORY, assert_same, kinds_left, sharded
from tests.servers import wait_until

CPU, GPU = "ota-cpu", "ota-gpu"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started here import this code and these tests."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))


def workers_of(merged: Path) -> set[int]:
    """Ids of the processes that merged the shards."""
    return {one["pid"] for one in read_record(merged).provenance["shards"].values()}


def slowed(seconds: float) -> None:
    """In a worker process: make every shard take so long that others get their share of a tiny model."""
    from ota_core.engine import shards as parts

    whole = parts.merge_shard

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return whole(*args)

    parts.merge_shard = slow


def killed_once() -> None:
    """In a worker process: die, hard, at the first shard."""
    from ota_core.engine import shards as parts

    def die(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    parts.merge_shard = die


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A Dask cluster of two processes of one thread each."""
    import distributed

    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as local,
        distributed.Client(local, set_as_default=False) as client,
    ):
        yield client


def test_a_dask_cluster_gives_the_bytes_of_one_process(world: World, cluster: Any, tmp_path: Path) -> None:
    cluster.run(slowed, 0.3)
    here = world.at(tmp_path / "home")
    recipe = world.recipe(density=0.4, compression="rank1", normalise="global")
    dask = Runner(kind="dask", address=cluster.scheduler.address)
    outcome = sharded(here, recipe, runner=dask)
    assert_same(Path(outcome.path), by_streams(recipe, tmp_path))
    assert workers_of(Path(outcome.path)) == set(cluster.run(os.getpid).values()), "both processes merged shards"
    assert sharded(here, recipe, runner=dask) == outcome
    assert kinds_left(here.home) == {"moments", "merged"}


@pytest.mark.slow
def test_a_killed_dask_worker_is_replaced(world: World, cluster: Any, tmp_path: Path) -> None:
    first, _ = cluster.run(os.getpid)
    cluster.run(killed_once, workers=[first])
    recipe = world.recipe(density=0.4, compression="rank1", scope="per_tensor")
    outcome = sharded(world.at(tmp_path / "home"), recipe, runner=Runner(kind="dask", address=cluster.scheduler.address))
    assert_same(Path(outcome.path), by_streams(recipe, tmp_path))


@pytest.mark.slow
def test_dask_without_an_address_starts_a_cluster_of_its_own(world: World, tmp_path: Path) -> None:
    recipe = world.recipe("ties", density=0.4)
    outcome = sharded(world.at(tmp_path / "home"), recipe, runner=Runner(kind="dask"))
    assert_same(Path(outcome.path), by_streams(recipe, tmp_path))
    assert os.getpid() not in workers_of(Path(outcome.path))


@pytest.mark.slow
def test_ray_gives_the_bytes_of_one_process(world: World, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'ota-merging[ray]'")
    pytest.importorskip("prefect_ray")
    recipe = world.recipe(density=0.4, compression="rank1")
    outcome = sharded(world.at(tmp_path / "home"), recipe, runner=Runner(kind="ray"))
    assert_same(Path(outcome.path), by_streams(recipe, tmp_path))
    assert os.getpid() not in workers_of(Path(outcome.path))


def by_streams(recipe: MergeRecipe, tmp_path: Path) -> Path:
    """The merge in this process, its models read where they lie."""
    from ota_core.engine import engine
    from tasks.merging.inputs import assemble, fetch_all
    from tasks.storage.streaming.streams import Streams

    options: dict[str, Any] = {"cache": tmp_path / "cache", "recipe_dir": None}
    with Streams(cache=tmp_path / "cache", memory=2**28) as streams:
        inputs = assemble(recipe, fetch_all(recipe, **options, streams=streams), **options, streams=streams)
        engine.merge(recipe, tmp_path / "alone", inputs=inputs, shard_size=5_000)
    return tmp_path / "alone"


def prefect(*arguments: str, **options: Any) -> list[str]:
    return [sys.executable, "-m", "prefect", *arguments]


@contextmanager
def workers(folder: Path, count: int = 2, pool: str = GPU) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Prefect process workers of a pool, in process groups of their own."""
    running = []
    try:
        for i in range(count):
            command = prefect("worker", "start", "--pool", pool, "--name", f"worker{i}", "--limit", "1")
            with open(folder / f"worker{i}.log", "wb") as log:
                running.append(
                    subprocess.Popen(command, env=server_environment(), stdout=log, stderr=log, start_new_session=True)
                )
        yield running
    finally:
        for one in running:
            os.killpg(one.pid, signal.SIGTERM)
        for one in running:
            wait_for_end(one.pid, timeout=15)
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
            one.wait()


def server_environment() -> dict[str, str]:
    """For a process that is to use the test's server."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    return {
        **os.environ,
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "PREFECT_HOME": str(PREFECT_HOME.value()),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "OTA_ALLOWED_ROOTS": gettempdir(),  # models and artifacts of the tests lie there
    }


@pytest.fixture(scope="module")
def deployed(prefect_server: None) -> None:
    """Pools, deployments and automations, as a user makes them."""
    command = [sys.executable, "-m", "flows.cli", "stack", "deploy"]
    done = subprocess.run(command, cwd=REPOSITORY, env=server_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def part_runs(flow: str = "part") -> list[Any]:
    """The server's runs of this flow."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])), limit=200)


@pytest.mark.slow
def test_two_prefect_workers_give_the_bytes_of_one_process(world: World, deployed: None, tmp_path: Path) -> None:
    recipe = world.recipe("ties", density=0.4)
    before = {run.id for run in part_runs()}
    (tmp_path / "cpu").mkdir()
    with workers(tmp_path), workers(tmp_path / "cpu", 1, CPU):  # one that compares each input with its digest before
        outcome = sharded(world.at(tmp_path / "home"), recipe, runner=Runner(kind="workers"))
    assert_same(Path(outcome.path), by_streams(recipe, tmp_path))
    runs = [run for run in part_runs() if run.id not in before and not run.name.startswith("check ")]
    assert {run.state_name for run in runs} == {"Completed"}
    assert len(runs) == len(read_record(Path(outcome.path)).provenance["shards"])
    took = [(tmp_path / f"worker{i}.log").read_text().count("submitted to infrastructure") for i in range(2)]
    assert all(took) and sum(took) >= len(runs), took
    assert len(workers_of(Path(outcome.path))) == len(runs), "each part ran in a process of its own"


@pytest.mark.slow
def test_a_worker_of_the_gpu_pool_takes_all_benchmarks_in_one_run(world: World, deployed: None, tmp_path: Path) -> None:
    recipe = world.recipe("linear")
    alone = world.at(tmp_path / "alone").run(recipe).outcome
    with workers(tmp_path, 1):
        sent = world.at(tmp_path / "home").run(recipe, gpu="stage/gpu").outcome
    assert sent.digest == alone.digest
    assert {key: ref.fingerprint for key, ref in sent.scores.items()} == {k: ref.fingerprint for k, ref in alone.scores.items()}
    runs = {run.name: run.state_name for run in part_runs("stage")}
    assert runs == {"merge linear": "Completed", "benchmark base, math, knowledge, linear": "Completed"}


@pytest.mark.slow
def test_a_flow_on_the_cpu_pool_runs_the_parts_of_its_pool_itself(
    world: World, deployed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own slot may be the pool's last: here no other worker of that pool runs."""
    monkeypatch.setenv("OTA_WORK_POOL", CPU)
    monkeypatch.setenv("OTA_ALLOWED_ROOTS", gettempdir())
    recipe = world.recipe(density=0.4, compression="rank1")
    before = {run.id for run in part_runs()}
    with workers(tmp_path, 1):
        outcome = sharded(world.at(tmp_path / "home"), recipe, runner=Runner(kind="workers"))
    assert_same(Path(outcome.path), by_streams(recipe, tmp_path))
    names = {run.name.split()[0] for run in part_runs() if run.id not in before}
    assert names == {"merge"}, "compress, survey and recount ran here"


@pytest.mark.slow
def test_what_a_worker_says_of_an_error_reaches_the_parent(world: World, deployed: None, tmp_path: Path) -> None:
    recipe = world.recipe(density=0.4, compression="rank1")
    broken = break_moments(world, recipe, tmp_path)
    with workers(tmp_path, 1, CPU), pytest.raises(OtaError, match=r"(?s)compress math: .*exp_avg_sq.*"):
        sharded(world.at(tmp_path / "home"), broken, runner=Runner(kind="workers"))


def break_moments(world: World, recipe: MergeRecipe, folder: Path) -> MergeRecipe:
    """The recipe with an expert whose second moments hold a negative number."""
    import shutil

    from safetensors.torch import load_file, save_file

    bad = folder / "bad"
    shutil.copytree(world.models / "math", bad)
    v = load_file(bad / "exp_avg_sq.safetensors")
    v["model.norm.weight"][0] = -1.0
    save_file(v, bad / "exp_avg_sq.safetensors")
    (bad / "expert.json").unlink()
    first = recipe.models[0].model_copy(update={"model": str(bad), "name": "math"})
    return recipe.model_copy(update={"models": (first, *recipe.models[1:])})


@pytest.mark.slow
def test_interrupting_the_parent_cancels_its_parts(world: World, deployed: None, tmp_path: Path) -> None:
    """No worker runs: the parts wait, until the parent is interrupted."""
    file = tmp_path / "recipe.yaml"
    file.write_text(world.recipe("ties", density=0.4).to_yaml())
    before = {run.id for run in part_runs()}
    options = ["--suite", "none", "--home", str(tmp_path / "home"), "--runner", "workers", "--shard-size", "5KB"]
    command = [sys.executable, "-m", "flows.cli", "run", str(file), *options, "--tracking-uri", world.tracking_uri]
    with open(tmp_path / "run.log", "wb") as log:
        parent = subprocess.Popen(
            command, env=server_environment(), cwd=REPOSITORY, stdout=log, stderr=log,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )  # fmt: skip
        wait_until(lambda: len(part_runs()) >= len(before) + 3, lambda: (tmp_path / "run.log").read_text())
        parent.send_signal(signal.SIGINT)
        parent.wait(timeout=60)
    states = [run.state_name for run in part_runs() if run.id not in before]
    assert len(states) >= 3 and set(states) <= {"Cancelled", "Cancelling"}, states


@pytest.mark.slow
def test_cancelling_the_parent_on_the_server_cancels_its_parts(world: World, deployed: None, tmp_path: Path) -> None:
    """Its worker is busy with the parent; the parts wait for one of the other pool, whose runs a flow of this one does not do itself."""
    from prefect.client.orchestration import get_client
    from prefect.deployments import run_deployment
    from prefect.states import Cancelling

    (tmp_path / "prefect.yaml").write_text(
        "name: test\npull: []\ndeployments:\n- {name: test, entrypoint: flows.merge.merge_flow, work_pool: {name: ota-cpu}}\n"
    )
    command = prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(tmp_path / "prefect.yaml"))
    done = subprocess.run(command, cwd=REPOSITORY, env=server_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    before = {run.id for run in part_runs()}
    parameters = {
        "recipe": world.recipe("ties", density=0.4).model_dump(mode="json", by_alias=True), "suite": None, "device": "cpu",
        "home": str(tmp_path / "home"), "tracking_uri": world.tracking_uri, "shard_size": "5KB", "runner": {"kind": "workers"},
    }  # fmt: skip
    with workers(tmp_path, 1, CPU), get_client(sync_client=True) as client:
        parent = run_deployment("merge/test", parameters=parameters, timeout=0, as_subflow=False)
        wait_until(lambda: len(part_runs()) >= len(before) + 3, lambda: (tmp_path / "worker0.log").read_text())
        client.set_flow_run_state(parent.id, Cancelling())
        wait_until(
            lambda: {run.state_name for run in part_runs() if run.id not in before} == {"Cancelled"},
            lambda: (tmp_path / "worker0.log").read_text(),
        )


def test_a_missing_deployment_is_named(world: World, tmp_path: Path) -> None:
    recipe = world.recipe("linear")
    with pytest.raises(OtaError, match=r"no deployment 'part/nowhere'.*deploy --all"):
        sharded(world.at(tmp_path / "home"), recipe, runner=Runner(kind="workers", deployment="part/nowhere"))
