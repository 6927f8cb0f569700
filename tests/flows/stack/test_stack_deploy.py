"""What the stack tells a Prefect server: pools and automations, made once, kept up to date."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from tasks.local.loopback import free_ports
from tasks.local.stack.layout import CPU_POOL, GPU_POOL, ROOT, StackError
from tasks.orchestration import deploy as stack_deploy


def automation(name: str, description: str) -> dict[str, object]:
    trigger = {"type": "event", "posture": "Reactive", "expect": ["prefect.flow-run.Failed"], "threshold": 1, "within": 0}
    return {"name": name, "description": description, "trigger": trigger, "actions": [{"type": "do-nothing"}]}


def test_pools_are_made_once_and_a_users_settings_stay(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "gpu-process.json"
    monkeypatch.setattr(stack_deploy, "TEMPLATES", tmp_path)
    (tmp_path / "prefect.yaml").write_text("deployments:\n- {name: a, work_pool: {name: of-the-file}}\n- {name: b}\n")
    monkeypatch.setattr(stack_deploy, "DEPLOYMENTS", tmp_path / "prefect.yaml")
    assert stack_deploy.create_pools() == [CPU_POOL, GPU_POOL, "of-the-file"]
    with get_client(sync_client=True) as client:
        first = client.read_work_pool(GPU_POOL)
        assert first.type == "process" and "command" in first.base_job_template["variables"]["properties"]
        client.update_work_pool(GPU_POOL, WorkPoolUpdate(concurrency_limit=3))
        changed = {"job_configuration": {"env": "{{ env }}"}, "variables": {"properties": {"env": {"type": "object"}}}}
        template.write_text(json.dumps(changed))
        stack_deploy.create_pools()
        second = client.read_work_pool(GPU_POOL)
        assert second.id == first.id and second.concurrency_limit == 3
        assert set(second.base_job_template["variables"]["properties"]) == {"env"}
    template.write_text(json.dumps(changed | {"variables": {}}))
    with pytest.raises(
        StackError, match=r"gpu-process\.json: Prefect does not take it as the template of pool ota-gpu.*must contain both"
    ):
        stack_deploy.create_pools()
    template.write_text("{")
    with pytest.raises(StackError, match=r"gpu-process\.json is no JSON object"):
        stack_deploy.create_pools()


def test_automations_are_replaced_by_name_not_piled_up(prefect_server: None, tmp_path: Path) -> None:
    file = tmp_path / "automations.yaml"
    assert stack_deploy.create_automations(file) == []
    for round in ("first", "second"):
        file.write_text(yaml.safe_dump({"automations": [automation("one", round), automation("two", round)]}))
        assert stack_deploy.create_automations(file) == ["one", "two"]
    with get_client(sync_client=True) as client:
        for name in ("one", "two"):
            assert [found.description for found in client.read_automations_by_name(name)] == ["second"]
        file.write_text(yaml.safe_dump([automation("three", "x"), {"name": "four", "trigger": {}}]))
        with pytest.raises(StackError, match=r"automations\.yaml holds an automation that Prefect does not take"):
            stack_deploy.create_automations(file)
        assert client.read_automations_by_name("three") == []


def test_pools_are_made_for_workers_of_another_type_and_keep_it(prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_deploy, "CPU_POOL", "ota-cpu-deployed")
    monkeypatch.setattr(stack_deploy, "GPU_POOL", "ota-gpu-deployed")
    monkeypatch.setattr(stack_deploy, "_file", lambda pool, kind: stack_deploy.TEMPLATES / f"{pool.split('-')[1]}-{kind}.json")
    monkeypatch.setattr(stack_deploy, "_read_yaml", lambda _: {})
    for kind in ("kubernetes", "kubernetes"):
        assert stack_deploy.create_pools(kind) == ["ota-cpu-deployed", "ota-gpu-deployed"]
    with get_client(sync_client=True) as client:
        pool = client.read_work_pool("ota-gpu-deployed")
    assert (pool.type, pool.base_job_template) == (
        "kubernetes",
        json.loads((stack_deploy.TEMPLATES / "gpu-kubernetes.json").read_text()),
    )
    with pytest.raises(StackError, match=r"ota-cpu-deployed is of type kubernetes.*--type kubernetes.*prefect work-pool delete"):
        stack_deploy.create_pools("docker")


def test_deploy_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StackError, match="--type: got 'ecs', expected process, docker, kubernetes"):
        stack_deploy.deploy("ecs")
    with temporary_settings({PREFECT_API_URL: None}), pytest.raises(StackError, match="PREFECT_API_URL names no Prefect server"):
        stack_deploy.deploy("process")
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}/api"
    with temporary_settings({PREFECT_API_URL: nobody}), pytest.raises(StackError, match=f"no Prefect server answers at {nobody}"):
        stack_deploy.deploy("process")


@pytest.mark.slow
def test_the_command_tells_a_server_everything(prefect_server: None) -> None:
    environ = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), "PREFECT_HOME": str(PREFECT_HOME.value())}
    command = [sys.executable, "-m", "flows.cli", "stack", "deploy"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert {"ota-cpu", "ota-gpu"} <= set(said["pools"].split(", ")) and "nightly/nightly" in said["deployments"]
    assert said["automations"] == "ota crash silent runs, ota crash stuck runs"
    with get_client(sync_client=True) as client:
        assert all(client.read_automations_by_name(name) for name in said["automations"].split(", "))
        assert client.read_deployment_by_name("part/cpu").work_pool_name == CPU_POOL
