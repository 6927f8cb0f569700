"""What the stack's Prefect server is told: work pools, automations, deployments. Imported with the environment set for it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import PrefectHTTPStatusError
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from tasks.processes import tail
from tasks.stack_layout import CPU_POOL, GPU_POOL, ROOT, StackError

DEPLOYMENTS = ROOT / "deployments" / "prefect.yaml"
AUTOMATIONS = ROOT / "deployments" / "automations.yaml"
TEMPLATES = {CPU_POOL: ROOT / "infra" / "pools" / "cpu-process.json", GPU_POOL: ROOT / "infra" / "pools" / "gpu-process.json"}


def create_pools() -> list[str]:
    """The two pools, and those that deployments/prefect.yaml names, as process pools unless they are there. Returns all names.

    A template in infra/pools is put into its pool each time; a limit or pause that a user set there stays.
    """
    listed = _read_yaml(DEPLOYMENTS).get("deployments") or []
    named = [entry["work_pool"]["name"] for entry in listed if (entry.get("work_pool") or {}).get("name")]
    names = list(dict.fromkeys([CPU_POOL, GPU_POOL, *named]))
    with get_client(sync_client=True) as client:
        there = {pool.name for pool in client.read_work_pools()}
        for name in names:
            template = _template(name)
            try:
                if name not in there:
                    chosen = template or ProcessWorker.get_default_base_job_template()
                    client.create_work_pool(WorkPoolCreate(name=name, type=ProcessWorker.type, base_job_template=chosen))
                elif template:
                    client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
            except PrefectHTTPStatusError as error:
                if template is None or error.response.status_code != 422:
                    raise
                raise StackError(f"{TEMPLATES[name]}: Prefect does not take it as the template of pool {name}: {error}") from None
    return names


def _template(pool: str) -> dict[str, Any] | None:
    file = TEMPLATES.get(pool)
    if file is None or not file.is_file():
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
            old, *more = client.read_automations_by_name(automation.name) or [None]
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
