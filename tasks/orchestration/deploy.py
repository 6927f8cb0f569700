"""What a Prefect server is told: work pools, deployments, automations. Imported with the environment set for it.

For the local stack by its own steps, for workers on several machines by ``deploy`` (`ota stack deploy`).
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import httpx
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from ota_core.addresses import without_secrets
from tasks.artifacts.processes import tail
from tasks.local.stack.layout import CPU_POOL, GPU_POOL, ROOT, StackError

DEPLOYMENTS = ROOT / "deployments" / "prefect.yaml"
AUTOMATIONS = ROOT / "deployments" / "automations.yaml"
TEMPLATES = ROOT / "infra" / "pools"
Kind = Literal["process", "docker", "kubernetes"]
"""Types of pools, and so of workers, that infra/pools has templates for."""


class Deployed(NamedTuple):
    """What a server has been told; names, those of deployments as flow/name."""

    pools: list[str]
    deployments: list[str]
    automations: list[str]


def deploy(kind: str) -> Deployed:
    """Pools of this type, all deployments and automations, on the server of ``PREFECT_API_URL``. What is there is brought up to date.

    Raises StackError.
    """
    if kind not in get_args(Kind):
        raise StackError(f"--type: got '{kind}', expected {', '.join(get_args(Kind))}")
    api = PREFECT_API_URL.value()
    if not api:
        raise StackError("PREFECT_API_URL names no Prefect server; set it to the one that the workers report to")
    try:
        with tempfile.TemporaryDirectory() as folder:
            return Deployed(create_pools(kind), deploy_all(Path(folder) / "deploy.log"), create_automations())
    except httpx.TransportError as error:
        raise StackError(
            f"no Prefect server answers at {without_secrets(api)} ({type(error).__name__}); check PREFECT_API_URL"
        ) from None


def create_pools(kind: str = ProcessWorker.type) -> list[str]:
    """The two pools, and those that deployments/prefect.yaml names, unless they are there. Returns all names.

    A template in infra/pools is put into its pool each time; a limit or pause that a user set there stays. Pools without a template are
    process pools. Raises StackError.
    """
    listed = _read_yaml(DEPLOYMENTS).get("deployments") or []
    named = [entry["work_pool"]["name"] for entry in listed if (entry.get("work_pool") or {}).get("name")]
    names = list(dict.fromkeys([CPU_POOL, GPU_POOL, *named]))
    with get_client(sync_client=True) as client:
        there = {pool.name: pool.type for pool in client.read_work_pools()}
        for name in names:
            template = _template(name, kind)
            if template and there.get(name, kind) != kind:
                raise StackError(
                    f"the work pool {name} is of type {there[name]}, and a pool's type stays: `ota stack deploy --type {there[name]}`, "
                    f"or delete it first for one of type {kind}: prefect work-pool delete {name}"
                )
            try:
                if name not in there:
                    chosen = template or ProcessWorker.get_default_base_job_template()
                    of_type = kind if template else ProcessWorker.type
                    client.create_work_pool(WorkPoolCreate(name=name, type=of_type, base_job_template=chosen))
                elif template:
                    client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
            except PrefectHTTPStatusError as error:
                if template is None or error.response.status_code != 422:
                    raise
                raise StackError(
                    f"{_file(name, kind)}: Prefect does not take it as the template of pool {name}: {error}"
                ) from None
    return names


def _file(pool: str, kind: str) -> Path:
    return TEMPLATES / f"{pool.removeprefix('ota-')}-{kind}.json"


def _template(pool: str, kind: str) -> dict[str, Any] | None:
    file = _file(pool, kind)
    if not file.is_file():
        return None
    try:
        template = dict(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise StackError(f"{file} is no JSON object ({error}); mend it") from None
    directory = template.get("variables", {}).get("properties", {}).get("working_dir")
    if directory is not None:  # the template's is the image's
        directory["default"] = str(ROOT)
    return template


def create_automations(file: Path = AUTOMATIONS) -> list[str]:
    """The automations of the file, in the form of `prefect automation create --from-file`. One of the same name is replaced.

    Returns their names; none when there is no such file. Raises StackError on a bad file, before any is created.
    """
    if not file.is_file():
        return []
    data = _read_yaml(file)
    listed = data.get("automations", [data]) if isinstance(data, dict) else data
    try:
        wanted = [AutomationCore.model_validate(one) for one in listed]
    except ValidationError as error:
        raise StackError(f"{file} holds an automation that Prefect does not take: {error}") from None
    with get_client(sync_client=True) as client:
        for automation in wanted:
            old, *more = client.read_automations_by_name(automation.name) or (None,)
            if old is None:
                client.create_automation(automation)
            else:
                client.update_automation(old.id, automation)
            for copy in more:
                client.delete_automation(copy.id)
    return [automation.name for automation in wanted]


def deploy_all(log: Path) -> list[str]:
    """`prefect deploy --all` from the repository root, its output in the log. Returns every deployment of the server, flow/name.

    Raises StackError with what it said.
    """
    command = [
        sys.executable,
        "-m",
        "prefect",
        "--no-prompt",
        "deploy",
        "--all",
        "--prefect-file",
        str(DEPLOYMENTS.relative_to(ROOT)),
    ]
    path = os.pathsep.join(dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    with open(log, "wb") as stream:
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=stream, stderr=stream)
    if done.returncode:
        raise StackError(f"`prefect deploy --all` ended with code {done.returncode}; {tail(log, 30)}")
    with get_client(sync_client=True) as client:
        flows = {flow.id: flow.name for flow in client.read_flows()}
        return sorted(f"{flows[one.flow_id]}/{one.name}" for one in client.read_deployments())


def _read_yaml(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise StackError(f"{file} is missing; `ota stack` needs a checkout of the repository") from None
    except yaml.YAMLError as error:
        raise StackError(f"{file} is no YAML: {error}") from None
