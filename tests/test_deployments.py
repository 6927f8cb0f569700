"""What deployments/ holds is what Prefect and this tool take: checked without a server."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args
from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect import Flow
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.cli.deploy._triggers import DeploymentTriggerAdapter
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools import validate

from ota_core.recipe.methods import Method
from ota_core.recipe.parameters import USED, default
from ota_core.recipe.recipe import MergeRecipe
from tasks.evaluation.suites import load_suite
from tasks.experiments.study.study import load_study
from tasks.local.stack.layout import CPU_POOL, GPU_POOL
from tasks.merging.recipes import ROOT, read_recipe
from tasks.orchestration.events import EXPERT_ARRIVED
from tasks.registry.nightly import NightlyConfig, find_config, load_nightly

FOLDER = ROOT / "deployments"
RAW = yaml.safe_load((FOLDER / "prefect.yaml").read_text())
DEPLOYMENTS: dict[str, dict[str, Any]] = {one["entrypoint"] + ":" + one["name"]: one for one in RAW["deployments"]}


def flow_of(deployment: dict[str, Any]) -> Flow[..., Any]:
    """What the entry point, a dotted name, leads to."""
    module, _, name = deployment["entrypoint"].rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, Flow), found
    return found


def named(name: str) -> dict[str, Any]:
    """A deployment by flow/name."""
    (found,) = [one for one in RAW["deployments"] if f"{flow_of(one).name}/{one['name']}" == name]
    return dict(found)


def schema_of(name: str) -> dict[str, Any]:
    return parameter_schema(flow_of(named(name))).model_dump_for_openapi()


def test_the_repositorys_root_has_the_same_file() -> None:
    assert (ROOT / "prefect.yaml").is_symlink() and (ROOT / "prefect.yaml").resolve() == (FOLDER / "prefect.yaml").resolve()


def test_prefect_takes_the_file_and_every_name_is_there_once() -> None:
    import prefect

    assert len(PrefectYamlModel.model_validate(RAW).deployments) == len(RAW["deployments"])
    names = [f"{flow_of(one).name}/{one['name']}" for one in RAW["deployments"]]
    assert sorted(names) == sorted(set(names))
    assert {
        "merge/merge",
        "nightly/nightly",
        "benchmark/benchmark",
        "study/study",
        "compare/compare",
        "search/search",
        "tune/tune",
        "stage/gpu",
        "part/cpu",
        "part/gpu",
    } == set(names)
    assert RAW["prefect-version"].split(".")[:2] == prefect.__version__.split(".")[:2]


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS.keys())
def test_every_deployments_parameters_fit_its_flow(deployment: dict[str, Any]) -> None:
    flow, parameters = flow_of(deployment), deployment.get("parameters", {})
    assert set(parameters) <= set(inspect.signature(flow.fn).parameters)
    required = {k for k, p in inspect.signature(flow.fn).parameters.items() if p.default is inspect.Parameter.empty}
    if "ota-internal" not in deployment["tags"]:  # those are given theirs by the flow that sends
        assert required <= set(parameters), "it runs from the form as it stands"
        flow.validate_parameters(parameters)
        validate(parameters, parameter_schema(flow).model_dump_for_openapi(), raise_on_error=True, preprocess=True)
    for file in (value for value in parameters.values() if isinstance(value, str) and value.startswith("deployments/")):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS.keys())
def test_every_deployment_has_one_of_the_two_pools_and_a_heartbeat(deployment: dict[str, Any]) -> None:
    pool = deployment["work_pool"]
    assert pool["name"] in {CPU_POOL, GPU_POOL} == {"ota-cpu", "ota-gpu"}
    assert deployment["description"] and set(deployment["tags"]) & {"ota", "ota-internal"}
    env = pool["job_variables"]["env"]
    assert env["OTA_WORK_POOL"] == pool["name"] and int(env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) >= 30
    assert all(isinstance(value, str) for value in env.values()), "an environment holds strings"


def test_the_log_of_a_deployed_run_says_what_it_has_computed() -> None:
    shown = "from tasks.artifacts.store import log; print(*(type(one).__name__ for one in log.handlers))"
    code = f"from prefect.logging.configuration import setup_logging; setup_logging(); {shown}"
    for env in ({}, RAW["definitions"]["run"]):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=True
        )
        assert ("APILogHandler" in done.stdout) == bool(env), done.stdout


def test_gpu_stages_are_sent_to_the_gpu_pool_and_never_on_from_there() -> None:
    for deployment in DEPLOYMENTS.values():
        target = deployment["work_pool"]["job_variables"]["env"].get("OTA_GPU_DEPLOYMENT")
        if deployment["work_pool"]["name"] == GPU_POOL:
            assert target is None
        else:
            assert named(target)["work_pool"]["name"] == GPU_POOL and flow_of(named(target)).name == "stage"


def test_the_nightly_runs_at_night_one_at_a_time_and_when_an_expert_arrives() -> None:
    nightly = named("nightly/nightly")
    (schedule,) = nightly["schedules"]
    cron = CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    assert schedule["active"] and ZoneInfo(str(cron.timezone)) and (cron.cron, cron.timezone) == ("0 2 * * *", "UTC")
    assert nightly["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
    (raw,) = nightly["triggers"]
    trigger: Any = DeploymentTriggerAdapter.validate_python(raw)
    assert trigger.expect == {EXPERT_ARRIVED} and trigger.enabled
    assert trigger.match.matches({"prefect.resource.id": "ota.expert.math.2026-11-20"})
    assert not trigger.match.matches({"prefect.resource.id": "ota.model.math"})


def test_automations_watch_every_deployment() -> None:
    listed = yaml.safe_load((FOLDER / "automations.yaml").read_text())["automations"]
    automations: list[Any] = [AutomationCore.model_validate(one) for one in listed]
    assert len({one.name for one in automations}) == len(automations) == 2
    frequency = max(
        int(one["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) for one in DEPLOYMENTS.values()
    )
    tags = {tag for one in DEPLOYMENTS.values() for tag in one["tags"]}
    for automation, raw in zip(automations, listed, strict=True):
        assert automation.enabled and [action.type for action in automation.actions] == ["change-flow-run-state"]
        assert automation.actions[0].state.value == "CRASHED"
        assert set(raw["trigger"]["match_related"]["prefect.resource.id"]) == {f"prefect.tag.{tag}" for tag in tags}
    silent = automations[0].trigger
    assert silent.within.total_seconds() >= 2.5 * frequency, "a heartbeat or two may be late"
    assert {"prefect.flow-run.heartbeat", "prefect.flow-run.Completed", "prefect.flow-run.Failed"} <= silent.expect


def test_the_form_of_a_merge_has_descriptions_choices_and_defaults() -> None:
    schema = schema_of("merge/merge")
    assert all(field.get("description") for field in schema["properties"].values())
    assert (
        schema["properties"]["device"]["enum"] == ["auto", "cpu", "cuda"] and schema["properties"]["device"]["default"] == "auto"
    )
    definitions = schema["definitions"]
    assert "ota" in definitions["MergeRecipe"]["properties"]["merge_method"]["enum"]
    described = definitions["MergeParameters"]["properties"]
    assert set(described) == set(MergeRecipe.model_fields["parameters"].default.model_dump(by_alias=True))
    assert all(field.get("description") for field in described.values())
    recipe = {
        "merge_method": "ota",
        "base_model": "s3://b/base",
        "models": [{"model": "s3://b/a"}],
        "parameters": {"lambda": 0.5},
    }
    validate({"recipe": recipe}, schema, raise_on_error=True, preprocess=True)
    flow_of(named("merge/merge")).validate_parameters({"recipe": recipe})


FORMS = [f"{flow_of(one).name}/{one['name']}" for one in RAW["deployments"] if "ota-internal" not in one["tags"]]


@pytest.mark.parametrize("name", FORMS)
def test_every_field_of_every_form_has_a_description(name: str) -> None:
    schema = schema_of(name)
    groups = {"": schema, **schema.get("definitions", {})}
    bare = [f"{group}.{key}" for group, one in groups.items() for key, field in one.get("properties", {}).items()
            if not field.get("description")]  # fmt: skip
    assert bare == []


@pytest.mark.parametrize("key", sorted(schema_of("merge/merge")["definitions"]["MergeParameters"]["properties"]))
def test_a_parameter_of_the_form_names_the_default_of_each_method(key: str) -> None:
    """The form shows null, which stands for the method's default."""
    text = schema_of("merge/merge")["definitions"]["MergeParameters"]["properties"][key]["description"]
    if key == "t":
        assert default("slerp", key) is None and "needs it" in text
        return
    told = re.fullmatch(r".*; (\S+) by default((?:, \S+ for [a-z_ ]+)*)\.", text)
    assert told, text
    others = {
        method: value for value, methods in re.findall(r", (\S+) for ([a-z_ ]+)", told[2]) for method in methods.split(" and ")
    }
    for method in get_args(Method):
        if key in USED[method]:
            expected = default(method, key)
            assert yaml.safe_load(others.get(method, told[1])) == ("none" if expected is None else expected), method


def test_a_nightly_configuration_can_be_filled_in_as_a_form() -> None:
    config = yaml.safe_load((FOLDER / "nightly.yaml").read_text())
    validate({"config": config}, schema_of("nightly/nightly"), raise_on_error=True, preprocess=True)
    found = flow_of(named("nightly/nightly")).validate_parameters({"config": config})["config"]
    assert found == load_nightly(str(FOLDER / "nightly.yaml")) and isinstance(found, NightlyConfig)


def test_the_nightly_configuration_names_what_the_demo_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # as a worker, which runs anywhere
    config = load_nightly(find_config(environment={}))
    suite = load_suite(config.suite)
    assert set(config.capabilities or ()) == set(suite.capabilities) and config.publish
    assert find_config(environment={"OTA_NIGHTLY": "s3://b/n.yaml"}) == "s3://b/n.yaml"
    assert find_config("mine.yaml", {"OTA_NIGHTLY": "s3://b/n.yaml"}) == "mine.yaml"


@pytest.mark.parametrize("file", sorted((FOLDER / "studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_study_is_one(file: Path) -> None:
    study, folder = load_study(str(file))
    assert len(study.cells()) >= 2 and load_suite(study.suite) and folder == file.parent


@pytest.mark.parametrize("file", sorted((FOLDER / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_is_one(file: Path) -> None:
    assert read_recipe(str(file))[0].models
