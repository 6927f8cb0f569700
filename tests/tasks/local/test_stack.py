"""The local stack without starting it: ports, credentials, what supervisord is told, whose processes are ended."""

import json
import os
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from cryptography.fernet import Fernet

from tasks.local.loopback import free_ports, taken
from tasks.local.stack import control as stack_control
from tasks.local.stack.credentials import credentials, generated, secret_of
from tasks.local.stack.layout import (
    ROOT,
    Ports,
    Stack,
    StackError,
    check_ports,
    choose_ports,
    folder_of,
    home_of,
    load_stack,
    plan_workers,
    socket_of,
    unused_ports,
)
from tasks.local.stack.processes import end, marked
from tasks.local.stack.programs import NAME, OURS, config, config_file, programs, supervisor_environment, write_programs

SECRET = "the-secret-of-the-test"


@pytest.fixture(autouse=True)
def nobodys_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "OTA_", "PREFECT_", "MLFLOW_"))]:
        monkeypatch.delenv(name)


def a_stack(home: Path, gpus: tuple[str, ...] = ()) -> Stack:
    folder_of(home).mkdir(parents=True, exist_ok=True)
    return Stack(home=home, ports=Ports(), workers=plan_workers(gpus), access_key="the-key")


@contextmanager
def listener() -> Iterator[int]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        yield sock.getsockname()[1]


@contextmanager
def sleeper(folder: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that carries a stack's mark."""
    environ = {**os.environ, OURS: str(folder), **more}
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environ, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_port_in_use_is_named_with_its_holder_and_the_option_that_moves_it() -> None:
    with listener() as port:
        ports = Ports(**(unused_ports(None).model_dump() | {"mlflow": port}))
        with pytest.raises(StackError, match=rf"{port}.*\(pid {os.getpid()}\); move it with --mlflow-port") as caught:
            check_ports(ports)
    assert "--prefect-port" not in str(caught.value) and "--free-ports" in str(caught.value)
    check_ports(ports)


def test_a_listener_on_all_addresses_takes_the_port_too() -> None:
    with socket.socket() as sock:
        sock.bind(("0.0.0.0", 0))
        sock.listen()
        assert taken([sock.getsockname()[1]]) == [sock.getsockname()[1]]


def test_chosen_ports() -> None:
    ports = choose_ports(prefect=None, mlflow=5001, s3=9000)
    assert (ports.prefect, ports.mlflow, ports.gateway) == (4200, 5001, 9000)
    assert sorted(ports.s3) == list(range(9000, 9008))
    assert choose_ports(prefect=None, mlflow=None, s3=None) == Ports()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefect": 0, "mlflow": None, "s3": None}, "--prefect-port: got 0"),
        ({"prefect": None, "mlflow": None, "s3": 65530}, "--s3-port: got 65530, expected a number from 1 to 65528"),
        ({"prefect": 8338, "mlflow": None, "s3": None}, "ports overlap: Prefect 8338, MLflow 5000, S3 8333 to 8340"),
    ],
)
def test_ports_that_cannot_be(options: dict[str, int | None], message: str) -> None:
    with pytest.raises(StackError, match=message):
        choose_ports(**options)


def test_free_ports_stay_those_of_the_last_run_while_they_are_free() -> None:
    first = unused_ports(None)
    assert len(first.all()) == 10
    assert unused_ports(first) == first
    with listener() as port:
        assert port not in unused_ports(Ports(**(first.model_dump() | {"prefect": port}))).all()


def test_one_worker_per_gpu() -> None:
    assert [(w.name, w.pool, w.limit, w.gpu) for w in plan_workers(())] == [
        ("worker-cpu", "ota-cpu", 4, None),
        ("worker-gpu", "ota-gpu", 1, None),
    ]
    assert [(w.name, w.gpu) for w in plan_workers(("2", "5"))] == [("worker-cpu", ""), ("worker-gpu0", "2"), ("worker-gpu1", "5")]


def test_each_worker_has_a_home_of_its_own_and_shares_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("OTA_ALLOWED_ROOTS", "/data,https://mlflow.example")
    stack = a_stack(tmp_path, ("0",))
    found = programs(stack)
    cpu, gpu = found["worker-cpu"]["env"], found["worker-gpu"]["env"]
    assert isinstance(cpu, dict) and isinstance(gpu, dict)
    for name in ("OTA_HOME", "PREFECT_HOME", "OTA_WORK_POOL"):
        assert cpu[name] != gpu[name], name
    for name, value in {
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:8333",
        "OTA_ARTIFACTS": "s3://ota/artifacts",
        "OTA_NIGHTLY": str(ROOT / "deployments" / "nightly.yaml"),
        "OTA_ALLOWED_ROOTS": "/data,https://mlflow.example",
    }.items():
        assert cpu[name] == gpu[name] == value
    assert cpu["OTA_GPU_DEPLOYMENT"] == "stage/gpu" and "OTA_GPU_DEPLOYMENT" not in gpu
    assert (cpu["CUDA_VISIBLE_DEVICES"], gpu["CUDA_VISIBLE_DEVICES"]) == ("", "0")
    assert supervisor_environment(stack, SECRET)["NO_PROXY"] == "example.org,127.0.0.1,localhost"


def test_prefect_and_mlflow_know_the_settings(tmp_path: Path) -> None:
    """A name that Prefect does not know would be ignored in silence."""
    found = programs(a_stack(tmp_path))
    wanted = {**found["prefect"]["env"], **found["worker-cpu"]["env"]}  # type: ignore[dict-item]
    code = (
        "from prefect.settings import get_current_settings as get; s = get()\n"
        "print(s.flows.heartbeat_frequency, s.worker.query_seconds, s.server.analytics_enabled, s.server.ephemeral.enabled,"
        " s.server.concurrency.lease_storage, s.home)\n"
        "from mlflow.environment_variables import MLFLOW_SERVER_ENABLE_JOB_EXECUTION as jobs; print(jobs.get())"
    )
    environ = {**os.environ, **wanted, **found["mlflow"]["env"]}  # type: ignore[dict-item]
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    home = folder_of(tmp_path) / "worker-cpu" / "prefect"
    lease = "prefect.server.concurrency.lease_storage.filesystem"
    assert done.stdout.split() == ["30", "2.0", "False", "False", lease, str(home), "False"]


def test_secrets_are_in_no_file_but_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-another-server")
    monkeypatch.setenv("OTA_RUNNER", "dask")
    stack = a_stack(tmp_path)
    write_programs(stack)
    stack.save()
    environ = supervisor_environment(stack, SECRET)
    key = environ["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"]
    for file in stack.folder.rglob("*"):
        assert file.is_dir() or not {word for word in (SECRET, key) if word in file.read_text()}, file
    assert Fernet(key) and key == supervisor_environment(stack, SECRET)["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"], (
        "it outlives a restart"
    )
    assert key != supervisor_environment(stack, SECRET + "x")["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"]
    assert environ["AWS_SECRET_ACCESS_KEY"] == SECRET and environ[OURS] == str(stack.folder)
    assert not {"AWS_SESSION_TOKEN", "OTA_RUNNER"} & set(environ)
    assert load_stack(tmp_path) == stack


def test_credentials_are_made_once_and_the_environments_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(tmp_path).mkdir()
    made = credentials(tmp_path)
    assert credentials(tmp_path) == made == generated(tmp_path) and len(made[1]) > 30
    assert stat.S_IMODE((folder_of(tmp_path) / "credentials").stat().st_mode) == 0o600
    stack = a_stack(tmp_path).model_copy(update={"access_key": made[0]})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    with pytest.raises(StackError, match="only one of AWS_ACCESS_KEY_ID"):
        credentials(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "my-secret")
    assert credentials(tmp_path) == ("mine", "my-secret") and generated(tmp_path) == made
    assert secret_of(stack) == made[1], "a stack that runs is spoken to with the credentials that it has"
    assert secret_of(stack.model_copy(update={"access_key": "mine"})) == "my-secret"
    with pytest.raises(StackError, match=r"access key other.*ota stack down"):
        secret_of(stack.model_copy(update={"access_key": "other"}))


def test_supervisor_reads_the_configuration_as_it_is_meant(tmp_path: Path) -> None:
    options = pytest.importorskip("supervisor.options", reason="supervisor is not installed: pip install 'ota-merging[demo]'")
    datatypes = pytest.importorskip("supervisor.datatypes")
    stack = a_stack(tmp_path / 'it\'s a "home"; mine')
    write_programs(stack)
    read = options.ServerOptions()
    read.realize(["-c", str(config_file(stack.folder))])
    groups = {one.name: one.process_configs[0] for one in read.process_group_configs}
    assert list(programs(stack)) == list(stack.names) and set(groups) == set(stack.names)
    for name, one in groups.items():
        assert one.stdout_logfile == str(stack.log(name)) and one.redirect_stderr
        assert one.stopasgroup and one.killasgroup and one.autorestart is datatypes.RestartUnconditionally
        assert one.autostart is (not name.startswith("worker"))
        assert one.command.endswith(f" -m tasks.local.stack.exec {name}")
    priorities = {name: one.priority for name, one in groups.items()}
    assert min(priorities["worker-cpu"], priorities["worker-gpu"]) > max(priorities[name] for name in ("s3", "mlflow", "prefect"))
    assert read.logfile == str(stack.folder / "logs" / "supervisord.log")


@pytest.mark.parametrize("name", ["a ;b", "a #b", "100%", "a\nb"])
def test_a_home_that_the_configuration_cannot_hold(name: str) -> None:
    with pytest.raises(StackError, match="cannot hold the stack"):
        home_of(Path("/tmp") / name)


def test_a_socket_with_a_long_path_lies_in_the_temporary_folder(tmp_path: Path) -> None:
    assert socket_of(Path("/h")) == Path("/h/stack/supervisor.sock")
    deep = tmp_path / ("d" * 120)
    assert len(str(socket_of(deep))) < 104 and socket_of(deep) != socket_of(deep / "other")
    assert str(socket_of(deep)) in config(a_stack(deep))


def test_marked_processes_of_one_stack_are_ended_and_no_others(tmp_path: Path) -> None:
    with sleeper(tmp_path) as mine, sleeper(tmp_path, **{NAME: "s3"}) as named, sleeper(tmp_path / "other") as others:
        assert {one.pid for one in marked(tmp_path)} == {mine.pid, named.pid}
        assert [one.pid for one in marked(tmp_path, "s3")] == [named.pid]
        assert end(lambda: marked(tmp_path), grace=5) == 2
        assert mine.poll() is not None and named.poll() is not None and others.poll() is None


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    environ = {**os.environ, OURS: str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE) as stubborn:
        assert stubborn.stdout is not None and stubborn.stdout.readline()
        assert end(lambda: marked(tmp_path), grace=0.5) == 1
        assert stubborn.poll() is not None


def test_what_a_killed_predecessor_left_is_ended_before_the_process_starts(tmp_path: Path) -> None:
    said = tmp_path / "said"
    code = f"import os; open({str(said)!r}, 'w').write(os.environ['ITS_OWN'] + os.environ[{NAME!r}])"
    (tmp_path / "programs.json").write_text(json.dumps({"a": {"command": [sys.executable, "-c", code], "env": {"ITS_OWN": "x"}}}))
    with sleeper(tmp_path, **{NAME: "a"}) as left, sleeper(tmp_path, **{NAME: "b"}) as sibling:
        environ = {**os.environ, OURS: str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-m", "tasks.local.stack.exec", "a"],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            check=True,
        )
        assert left.wait(5) and sibling.poll() is None
    assert said.read_text() == "xa" and "ended 1 processes that the last a had left" in done.stdout


def test_stop_after_a_crash_ends_what_is_left_and_removes_what_is_stale(tmp_path: Path) -> None:
    pytest.importorskip("supervisor", reason="supervisor is not installed: pip install 'ota-merging[demo]'")
    stack = a_stack(tmp_path)
    stack.save()
    (stack.folder / "supervisord.pid").write_text(f"{os.getpid()}\n")  # the number belongs to somebody else by now
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(socket_of(tmp_path)))
    with sleeper(stack.folder) as left:
        assert stack_control.supervisor_pid(tmp_path) is None
        with pytest.raises(StackError, match=r"does not run.*1 processes are left"):
            stack_control.processes(tmp_path)
        assert stack_control.stop(tmp_path) == 1 and left.poll() is not None
    assert not socket_of(tmp_path).exists() and not (stack.folder / "supervisord.pid").exists()
    assert stack_control.stop(tmp_path) == 0
    assert psutil.pid_exists(os.getpid())


def test_a_process_that_cannot_start_is_given_up_with_its_log(tmp_path: Path) -> None:
    """A real supervisord, and a server whose command fails at once."""
    pytest.importorskip("supervisor", reason="supervisor is not installed: pip install 'ota-merging[demo]'")
    prefect, mlflow, *s3 = free_ports(10)
    stack = a_stack(tmp_path).model_copy(update={"ports": Ports(prefect=prefect, mlflow=mlflow, s3=tuple(s3))})
    write_programs(stack)
    stack.save()
    broken = [sys.executable, "-c", "import sys; sys.exit('no such table: experiments')"]
    commands = {name: {"command": broken, "env": {}} for name in stack.names}
    (stack.folder / "programs.json").write_text(json.dumps(commands))
    try:
        stack_control.start_supervisor(stack, SECRET)
        started = time.monotonic()
        with pytest.raises(StackError, match=r"(?s)mlflow ends again and again; the end of .*mlflow\.log:.*no such table: exp"):
            stack_control.wait_healthy(stack, "mlflow")
        assert time.monotonic() - started < 60
        with pytest.raises(StackError, match="no process 'web'; it has: s3, mlflow, prefect, worker-cpu, worker-gpu"):
            stack_control.restart(stack, "web")
    finally:
        assert stack_control.stop(tmp_path) >= 1
    assert not marked(stack.folder)


def test_without_supervisor_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_control, "find_spec", lambda name: None)
    with pytest.raises(StackError, match=r"pip install 'ota-merging\[demo\]'"):
        stack_control.check_installed()
