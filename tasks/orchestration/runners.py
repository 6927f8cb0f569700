"""Where the parts of a merge run: threads of this process, Dask, Ray, or Prefect workers on other machines. Chosen by configuration.

OTA_RUNNER            threads (default), dask, ray or workers
OTA_RUNNER_ADDRESS    an existing Dask scheduler (tcp://…) or Ray cluster (ray://…); without it a local one is started for the run
OTA_RUNNER_PARTS      parts at a time on this machine: threads, or processes of a local cluster
OTA_PART_DEPLOYMENT   one deployment for all parts that `workers` run; by default "part/gpu" for those that merge, "part/cpu" for the others
                      (deployments/prefect.yaml)
"""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner
from pydantic import Field, PositiveInt

from ota_core.errors import OtaError
from ota_core.frozen import Frozen

Kind = Literal["threads", "dask", "ray", "workers"]
DEPLOYMENTS = {"shard": "part/gpu"}
OTHER_PARTS = "part/cpu"
# Each part uses all cores by threads of its own; more processes hide the waiting for a remote store.
LOCAL_PROCESSES = 2


def several_at_once() -> TaskRunner[Any]:
    """The task runner of the flows: tasks that wait, for downloads or for other machines, do so side by side."""
    return ThreadPoolTaskRunner(max_workers=4)


class Runner(Frozen):
    """How the parts of a merge are shared out."""

    kind: Kind = Field(
        "threads",
        description="threads of the flow's process, the processes of dask or ray, or Prefect workers on other machines.",
    )
    address: str | None = Field(
        None, description="An existing Dask scheduler (tcp://…) or Ray cluster (ray://…); by default a local one is started."
    )
    parts: PositiveInt | None = Field(
        None,
        description=f"Parts at a time on this machine, each with its own budget of memory; 1 thread, or {LOCAL_PROCESSES} processes "
        "of a local cluster, by default.",
    )
    deployment: str | None = Field(
        None,
        description=f"Deployment that workers run every part of; by default {DEPLOYMENTS['shard']} for merges, {OTHER_PARTS} for the rest.",
    )

    def deployment_of(self, kind: str) -> str:
        """The deployment that runs parts of this kind on Prefect workers."""
        return self.deployment or DEPLOYMENTS.get(kind, OTHER_PARTS)

    def task_runner(self) -> TaskRunner[Any]:
        """Prefect's task runner for the parts. Raises OtaError when its package is not installed."""
        runner: TaskRunner[Any]
        if self.kind == "dask":
            dask = _imported("prefect_dask", "dask")
            logging.getLogger("distributed").setLevel(logging.WARNING)  # it tells of every connection
            local = {"n_workers": self.parts or LOCAL_PROCESSES, "threads_per_worker": 1, "dashboard_address": None}
            runner = dask.DaskTaskRunner(address=self.address, cluster_kwargs=None if self.address else local)
            return runner
        if self.kind == "ray":
            ray = _imported("prefect_ray", "ray")
            local = {"num_cpus": self.parts or LOCAL_PROCESSES, "include_dashboard": False}
            runner = ray.RayTaskRunner(address=self.address, init_kwargs={} if self.address else local)
            return runner
        return ThreadPoolTaskRunner(max_workers=self.parts or 1)

    @property
    def processes_here(self) -> bool:
        """Whether the run starts a cluster on this machine."""
        return self.kind in {"dask", "ray"} and self.address is None


def runner_of(
    kind: str | None = None,
    *,
    address: str | None = None,
    parts: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Runner:
    """The runner in force: the arguments, else the environment. Raises OtaError for what is no runner or does not go together."""
    kind = kind or environment.get("OTA_RUNNER") or "threads"
    address = address or environment.get("OTA_RUNNER_ADDRESS") or None
    if kind not in get_args(Kind):
        raise OtaError(f"runner: got '{kind}', expected {', '.join(get_args(Kind))}")
    if address and kind not in {"dask", "ray"}:
        raise OtaError(f"address: '{address}' is given, but the runner is {kind}; only dask and ray connect to an address")
    text = str(parts) if parts is not None else environment.get("OTA_RUNNER_PARTS") or ""
    if text and (not text.isdecimal() or int(text) < 1):
        raise OtaError(f"parts: got '{text}', expected a number of parts at a time, at least 1")
    return Runner(
        kind=kind,
        address=address,
        parts=int(text) if text else None,
        deployment=environment.get("OTA_PART_DEPLOYMENT") or None,
    )


def _imported(module: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise OtaError(
            f"runner: {extra} is asked for, but {error.name} is not installed; pip install 'ota-merging[{extra}]'"
        ) from None


@contextmanager
def server_for(runner: Runner) -> Iterator[None]:
    """A Prefect server that the machines of the runner reach. Raises OtaError where only the user can name one.

    Without PREFECT_API_URL Prefect would start a temporary server in every process; here the processes of a local cluster share one.
    """
    if PREFECT_API_URL.value() or runner.kind == "threads":
        yield
    elif runner.processes_here:
        # Prefect's temporary server of this process, the same for all of its runs; it stops it when the process ends.
        with get_client(sync_client=True) as client, temporary_settings({PREFECT_API_URL: str(client.api_url).rstrip("/")}):
            yield
    else:
        where = f"the machines at {runner.address}" if runner.address else "Prefect workers"
        raise OtaError(f"runner: {where} report to a Prefect server; set PREFECT_API_URL to one that they reach")
