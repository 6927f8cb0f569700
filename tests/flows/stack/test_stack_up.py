"""`ota stack` as a person uses it: real servers, real workers, a crash, and nothing left behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tasks.local.demo.questions import CAPABILITIES
from tasks.local.loopback import get
from tasks.local.stack import control as stack_control
from tasks.local.stack.credentials import secret_of
from tasks.local.stack.layout import ROOT, SERVERS, Stack, load_stack
from tasks.local.stack.processes import marked
from tasks.settings import environment
from tasks.storage import s3
from tests.servers import wait_until

SETTINGS = ("AWS_", "OTA_", "PREFECT_", "MLFLOW_")


def ota(home: Path, *arguments: str, code: int = 0, text: str = "") -> str:
    """Run a command as from a shell of 80 columns; its output."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    environ |= {"OTA_HOME": str(home), "COLUMNS": "80"}
    command = [sys.executable, "-m", "flows.cli", "stack", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, input=text)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_what_is_wrong_with_the_options_is_said_before_anything_starts(tmp_path: Path) -> None:
    pytest.importorskip("supervisor", reason="supervisor is not installed: pip install 'ota-merging[demo]'")
    assert "expected demo, smoke or none" in ota(tmp_path, "up", "--experts", "all", code=2)
    assert "--free-ports chooses all ports" in ota(tmp_path, "up", "--free-ports", "--s3-port", "8333", code=2)
    assert not list(tmp_path.iterdir())
    assert "does not run; start it with `ota stack up`" in ota(tmp_path, "status", code=2)
    assert "nothing runs in" in ota(tmp_path, "down")


@pytest.fixture(scope="module")
def bystander() -> Iterator[psutil.Process]:
    """A process of the same user that has nothing to do with the stack, a Prefect server by its name."""
    command = [sys.executable, "-c", "import time; time.sleep(3600)", "-m", "prefect", "server", "start"]
    with subprocess.Popen(command) as process:
        yield psutil.Process(process.pid)
        process.kill()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, bystander: psutil.Process) -> Iterator[Path]:
    """The home of a stack that was brought up once."""
    pytest.importorskip("supervisor", reason="supervisor is not installed: pip install 'ota-merging[demo]'")
    home = tmp_path_factory.mktemp("stack")
    try:
        said = ota(home, "up", "--free-ports", "--experts", "smoke")
        assert "worker-gpu on pool ota-gpu" in said and "ota stack status" in said, said
        yield home
    finally:
        stack_control.stop(home)
        shutil.rmtree(home)


def the_stack(home: Path) -> Stack:
    stack = load_stack(home)
    assert stack is not None
    return stack


def client_of(stack: Stack) -> dict[str, str | None]:
    return {**dict.fromkeys(("AWS_PROFILE", "AWS_SESSION_TOKEN")), **stack.client_environment(secret_of(stack))}


def table(home: Path) -> dict[str, list[str]]:
    rows = [line.split() for line in ota(home, "status").splitlines()]
    return {row[0]: row[1:] for row in rows[2:]}


def run_probe(stack: Stack, folder: Path, seconds: float = 0) -> dict[str, dict[str, Any]]:
    """What flow runs on either pool say of where they run: deployed and started as by a user whose shell read env.sh."""
    listed = [
        {"name": pool, "entrypoint": "tests.flows.stack.stack_probe.probe", "work_pool": {"name": pool}}
        for pool in ("ota-cpu", "ota-gpu")
    ]
    (folder / "prefect.yaml").write_text(json.dumps({"name": "test", "pull": [], "deployments": listed}))
    prefect = f". {stack.folder}/env.sh && {sys.executable} -m prefect --no-prompt"
    lines = [f"{prefect} deploy --all --prefect-file {folder}/prefect.yaml"]
    targets = {pool: f"s3://ota/probe/{folder.name}/{pool}.json" for pool in ("ota-cpu", "ota-gpu")}
    for pool, uri in targets.items():
        lines.append(f"{prefect} deployment run probe/{pool} -p uri={uri} -p seconds={seconds}")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    for line in lines:
        done = subprocess.run(["sh", "-c", line], cwd=ROOT, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    with environment(client_of(stack)):
        for pool, uri in targets.items():
            wait_until(lambda uri=uri: s3.exists(uri), stack.log(pool.replace("ota-", "worker-")).read_text)
        return {pool: json.loads(s3.read_bytes(uri)) for pool, uri in targets.items()}


@pytest.mark.slow
def test_everything_is_up_and_the_experts_lie_in_s3(up: Path) -> None:
    rows = table(up)
    assert list(rows) == [*SERVERS, "worker-cpu", "worker-gpu"]
    assert all(row[0] == "running" and row[3] == "ok" for row in rows.values()), rows
    stack = the_stack(up)
    with environment(client_of(stack)):
        for capability in CAPABILITIES:
            assert s3.exists(f"s3://ota-demo/experts/{capability}/seed1/expert.json")
            assert s3.exists(f"s3://ota-demo/data/seed1/{capability}/test.jsonl")
        assert s3.exists("s3://ota-demo/models/seed1/config.json") and s3.list_objects("s3://ota/") == []
    settings = get(f"{stack.urls['prefect']}/ui-settings")
    assert settings is not None and json.loads(settings)["api_url"] == stack.api, "where the pages look for the API"
    for file in ("credentials", "env.sh"):
        assert (stack.folder / file).stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_workers_run_flows_with_homes_of_their_own(up: Path, tmp_path: Path) -> None:
    stack = the_stack(up)
    told = run_probe(stack, tmp_path)
    for pool, worker in (("ota-cpu", "worker-cpu"), ("ota-gpu", "worker-gpu")):
        one = told[pool]
        assert one["OTA_WORK_POOL"] == pool and one["OTA_HOME"] == str(stack.folder / worker)
        assert one["PREFECT_HOME"] == str(stack.folder / worker / "prefect")
        assert (one["OTA_ARTIFACTS"], one["MLFLOW_TRACKING_URI"]) == ("s3://ota/artifacts", stack.urls["mlflow"])
        assert one["heartbeat"] == 30
    assert told["ota-cpu"]["OTA_GPU_DEPLOYMENT"] == "stage/gpu" and told["ota-gpu"]["OTA_GPU_DEPLOYMENT"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s3", "mlflow"])
def test_a_killed_server_comes_back_with_its_data(up: Path, name: str) -> None:
    """MLflow's parent is killed alone: the child that holds the port must not keep the new one from starting."""
    stack, before = the_stack(up), int(table(up)[name][1])
    children = psutil.Process(before).children(recursive=True)
    psutil.Process(before).kill()
    wait_until(lambda: stack_control.processes(up)[name].pid not in (None, before), stack.log(name).read_text)
    psutil.wait_procs(children, timeout=60)  # until then it is the old one that answers
    stack_control.wait_healthy(stack, name)
    with environment(client_of(stack)):
        assert s3.exists("s3://ota-demo/experts/math/seed1/expert.json")


@pytest.mark.slow
def test_up_again_says_so_and_restart_restarts(up: Path) -> None:
    before = table(up)
    assert "The stack was running; everything is deployed again" in ota(up, "up", "--free-ports", "--experts", "none")
    ota(up, "restart", "worker-gpu")
    after = table(up)
    assert [name for name in before if before[name][1] != after[name][1]] == ["worker-gpu"]
    assert "it has: s3, mlflow, prefect, worker-cpu, worker-gpu" in ota(up, "restart", "gpu", code=2)


@pytest.mark.slow
def test_a_second_stack_on_the_same_ports_is_refused_and_starts_nothing(up: Path, tmp_path: Path) -> None:
    port = the_stack(up).ports.prefect
    said = ota(tmp_path, "up", "--prefect-port", str(port), "--s3-port", "18333", "--mlflow-port", "15000", code=2)
    assert re.search(rf"{port}: held by \S+ \(pid \d+\); move it with --prefect-port", said), said
    assert not (tmp_path / "stack").exists()


@pytest.mark.slow
def test_after_a_crash_of_everything_it_comes_up_on_the_same_ports(up: Path) -> None:
    stack, pid = the_stack(up), stack_control.supervisor_pid(up)
    assert pid is not None
    psutil.Process(pid).kill()
    wait_until(lambda: stack_control.supervisor_pid(up) is None, stack.log("supervisord").read_text)
    assert len(marked(stack.folder)) >= 5
    said = " ".join(ota(up, "status", code=2).split())
    left = re.search(r"does not run; .*; its supervisord is gone, (\d+) processes are left: `ota stack down` ends them", said)
    assert left and int(left[1]) >= 5, said
    ota(up, "up", "--free-ports", "--experts", "none")
    assert the_stack(up).ports == stack.ports
    assert all(row[3] == "ok" for row in table(up).values())


@pytest.mark.slow
def test_down_ends_the_stack_with_its_flow_runs_and_nothing_else(up: Path, tmp_path: Path, bystander: psutil.Process) -> None:
    stack = the_stack(up)
    told = run_probe(stack, tmp_path, seconds=600)
    runs = [psutil.Process(one["pid"]) for one in told.values()]
    ours = {*marked(stack.folder), *runs}
    assert all(process.is_running() for process in runs)
    assert re.search(r"\d+ processes stopped", ota(up, "down"))
    assert not [process for process in ours if process.is_running()] and not marked(stack.folder)
    assert bystander.is_running() and bystander.status() != psutil.STATUS_ZOMBIE
    assert (stack.folder / "s3").is_dir(), "the data stay"
    ota(up, "down", "--delete", text="n\n", code=1)
    assert (stack.folder / "s3").is_dir()
    ota(up, "down", "--delete", text="y\n")
    assert not stack.folder.exists() and (up / "artifacts").is_dir(), "what was trained stays"


@pytest.mark.slow
def test_when_a_server_does_not_come_up_all_is_stopped_and_its_log_shown(tmp_path: Path) -> None:
    pytest.importorskip("supervisor", reason="supervisor is not installed: pip install 'ota-merging[demo]'")
    (tmp_path / "stack" / "mlflow").mkdir(parents=True)
    (tmp_path / "stack" / "mlflow" / "mlflow.db").write_text("this is no database\n" * 100)
    said = ota(tmp_path, "up", "--free-ports", "--experts", "none", code=2)
    assert re.search(r"(?s)mlflow ends again and again; the end of .*mlflow\.log:.*file is not a database", said), said
    assert not marked(tmp_path / "stack") and "does not run" in ota(tmp_path, "status", code=2)
