"""`ota stack`: every server and worker as local processes, everything deployed, the demo's experts in S3.

The main path, ``up``, reads top to bottom; processes are the business of ``tasks.stack_*``, what Prefect is told that of
``tasks.orchestration.deploy``.
"""

import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from filelock import FileLock, Timeout

from tasks.local.stack import control as stack_control
from tasks.local.stack.control import Process
from tasks.local.stack.credentials import credentials, generated, secret_of, write_private
from tasks.local.stack.health import problem_of
from tasks.local.stack.layout import (
    BUCKET,
    DEMO_BUCKET,
    SERVERS,
    Ports,
    Stack,
    StackError,
    check_ports,
    folder_of,
    load_stack,
    plan_workers,
    unused_ports,
    visible_gpus,
)
from tasks.local.stack.programs import FOREIGN, prefect_environment, write_programs
from tasks.orchestration.prepare import prepare_prefect
from tasks.settings import environment, places
from tasks.storage import s3

Experts = Literal["demo", "smoke", "none"]
Step = Callable[..., AbstractContextManager[None]]
"""``with step(what, url):`` shows that something is at work and, at the end, that it is done."""


class Up(NamedTuple):
    """A stack that is up."""

    stack: Stack
    was_running: bool
    deployments: list[str]
    """Every deployment of its Prefect server, as flow/name."""


def up(home: Path, *, ports: Ports | None, experts: Experts, step: Step) -> Up:
    """Bring the stack up, or what of it does not run, and deploy everything.

    ``ports`` None: any free ones. A stack that runs already keeps its ports. When anything fails, what this call started is
    stopped again. Raises StackError.
    """
    stack_control.check_installed()
    with _alone(home):
        was_running = stack_control.supervisor_pid(home) is not None
        stack, secret_key = _running(home) if was_running else _prepare(home, ports)
        try:
            if not was_running:
                with step("supervisord"):
                    stack_control.start_supervisor(stack, secret_key)
            with _client(stack, secret_key):
                deployments = _fill(stack, experts, step)
            write_private(stack.folder / "env.sh", env_script(stack, secret_key))
        except BaseException:
            if not was_running:
                with step("stop what was started"):
                    stack_control.stop(home)
            raise
    return Up(stack, was_running, deployments)


def _prepare(home: Path, ports: Ports | None) -> tuple[Stack, str]:
    """A stack that can be started: nothing of an earlier one is left, its ports are free, its folder holds what supervisord reads."""
    stack_control.stop(home)  # after a crash: what it left would hold the ports
    last = load_stack(home)
    ports = ports or unused_ports(last.ports if last else None)
    check_ports(ports)
    folder_of(home).mkdir(parents=True, exist_ok=True)
    access_key, secret_key = credentials(home)
    stack = Stack(home=home, ports=ports, workers=plan_workers(visible_gpus()), access_key=access_key)
    write_programs(stack)
    stack.save()
    return stack, secret_key


def _running(home: Path) -> tuple[Stack, str]:
    stack = _noted(home)
    return stack, secret_of(stack)


def _noted(home: Path) -> Stack:
    """The stack that runs, as its folder describes it."""
    stack = load_stack(home)
    if stack is None:
        raise StackError(f"{folder_of(home)} lost its stack.json while the stack runs; stop it with `ota stack down`")
    return stack


def _fill(stack: Stack, experts: Experts, step: Step) -> list[str]:
    """Servers, buckets, pools, deployments, workers, experts, in the order in which they need each other."""
    for name in SERVERS:
        with step(name, stack.urls[name]):
            stack_control.start(stack, name)
            stack_control.wait_healthy(stack, name)
    with step(f"buckets {DEMO_BUCKET}, {BUCKET}"):
        for bucket in (DEMO_BUCKET, BUCKET):
            s3.create_bucket(f"s3://{bucket}")
    with step("work pools, automations"):
        from tasks.orchestration import deploy as stack_deploy

        stack_deploy.create_pools()
        stack_deploy.create_automations()
    with step("deployments"):
        deployments = stack_deploy.deploy_all(stack.log("deploy"))
    for worker in stack.workers:
        with step(f"{worker.name} on pool {worker.pool}"):
            stack_control.start(stack, worker.name)
            stack_control.wait_healthy(stack, worker.name)
    if experts != "none":
        with step(f"{experts} experts: train, upload", f"{stack.urls['prefect']}/runs"):
            _seed(stack, experts)
    return deployments


def _seed(stack: Stack, experts: Experts) -> None:
    """Train and upload, in this process. What is trained is kept where `ota demo` keeps it, outside the stack's folder."""
    from flows.lab.demo import experts_flow
    from tasks.local.demo.train import SMOKE

    where = places(stack.home, artifacts=str(stack.home / "artifacts"))
    experts_flow(where, settings=SMOKE if experts == "smoke" else None)


@contextmanager
def _client(stack: Stack, secret_key: str) -> Iterator[None]:
    """This process as a client of the stack, whatever its user has set for other servers; warnings only on the terminal."""
    foreign = {name: None for name in os.environ if name.startswith(FOREIGN)}
    quiet = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with environment({**foreign, **quiet, **stack.client_environment(secret_key), **prefect_environment(stack)}):
        prepare_prefect(check=False)
        yield


def env_script(stack: Stack, secret_key: str) -> str:
    """For ``. env.sh``: a shell that uses the stack. Credentials that came from the environment are left to the environment."""
    values = {**stack.client_environment(secret_key), "OTA_HOME": str(stack.home)}
    lines = ["# Written by `ota stack up`: makes a shell use the stack's servers. Holds a secret of this machine's S3 server."]
    if (generated(stack.home) or ("",))[0] != stack.access_key:
        lines = [
            "# Written by `ota stack up`: makes a shell use the stack's servers, with the AWS credentials that it was started with."
        ]
        values = {name: value for name, value in values.items() if name not in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    lines += ["unset AWS_PROFILE AWS_SESSION_TOKEN AWS_ENDPOINT_URL"]
    return "\n".join([*lines, *(f"export {name}={shlex.quote(value)}" for name, value in values.items())]) + "\n"


def down(home: Path, *, delete: bool = False) -> int:
    """Stop the stack's processes, and nothing else; returns how many there were. ``delete`` removes its data, too.

    Trained experts lie outside and stay.
    """
    if not folder_of(home).is_dir():
        return 0
    with _alone(home):
        count = stack_control.stop(home)
        if delete:
            shutil.rmtree(folder_of(home))
    return count


class Row(NamedTuple):
    """One line of the status."""

    process: Process
    problem: str | None
    """What its health check misses, None where nothing."""
    url: str


def status(home: Path) -> list[Row]:
    """Every process of a stack that runs. Raises StackError when none does."""
    known = stack_control.processes(home)
    stack = _noted(home)
    rows = []
    for name in stack.names:
        process = known[name]
        problem = problem_of(stack, name, process.started) if process.pid else "not running"
        rows.append(Row(process, problem, stack.urls.get(name, "")))
    return rows


def restart(home: Path, name: str) -> None:
    """Restart one process and wait until it does its work again. Raises StackError."""
    with _alone(home):
        stack_control.processes(home)  # says whether the stack runs
        stack = _noted(home)
        stack_control.restart(stack, name)
        stack_control.wait_healthy(stack, name)


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One command at a time changes a home's stack."""
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home / ".stack.lock").acquire(timeout=0):
            yield
    except Timeout:
        raise StackError(f"another `ota stack` command is at work in {home}; wait until it is done, or end it") from None
