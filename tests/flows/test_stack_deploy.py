"""What the stack tells a Prefect server: pools and automations, made once, kept up to date."""

import json
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate

from flows import stack_deploy
from tasks.stack_layout import CPU_POOL, GPU_POOL, StackError


def automation(name: str, description: str) -> dict[str, object]:
    trigger = {"type": "event", "posture": "Reactive", "expect": ["prefect.flow-run.Failed"], "threshold": 1, "within": 0}
    return {"name": name, "description": description, "trigger": trigger, "actions": [{"type": "do-nothing"}]}


def test_pools_are_made_once_and_a_users_settings_stay(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "gpu.json"
    monkeypatch.setattr(stack_deploy, "TEMPLATES", {GPU_POOL: template})
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
        StackError, match=r"gpu\.json: Prefect does not take it as the template of pool ota-gpu.*must contain both"
    ):
        stack_deploy.create_pools()
    template.write_text("{")
    with pytest.raises(StackError, match=r"gpu\.json is no JSON object"):
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
