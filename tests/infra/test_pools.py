"""The pools' templates: taken by a real Prefect server, and filled in by the workers that will use them."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from docker.models.containers import _create_container_args
from kubernetes_validate import latest_version, validate
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import Flow, FlowRun
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.workers.base import BaseWorker
from prefect.workers.process import ProcessWorker
from prefect_docker.worker import DockerWorker
from prefect_kubernetes.worker import KubernetesWorker

from tests.infra.read import INFRA, POOLS, ROOT, TYPES, compose, defaults, dockerfile_environment, template
from tests.infra.test_kubernetes import is_restricted

WORKERS: dict[str, type[BaseWorker[Any, Any, Any]]] = {
    "process": ProcessWorker,
    "docker": DockerWorker,
    "kubernetes": KubernetesWorker,
}
PAIRS = [(pool, kind) for pool in POOLS for kind in TYPES]
SECRETS = {
    "AWS_ACCESS_KEY_ID": "of-the-worker",
    "AWS_SECRET_ACCESS_KEY": "secret-of-the-worker",
    "AWS_SESSION_TOKEN": "token-of-the-worker",
}


async def filled_in(pool: str, kind: str, **variables: Any) -> Any:
    """What a worker makes of the template for one run, with its variables overridden by those of a deployment."""
    nobody: Any = object()  # in place of a client of the server: a template asks it for nothing
    configuration = await WORKERS[kind].job_configuration.from_template_and_values(template(pool, kind), variables, client=nobody)
    run = FlowRun(flow_id="00000000-0000-0000-0000-000000000001", name="ota math+code rho=0.40")
    configuration.prepare_for_flow_run(run, flow=Flow(name="stage", id=run.flow_id))
    return configuration


def run(pool: str, kind: str, **variables: Any) -> Any:
    return asyncio.run(filled_in(pool, kind, **variables))


@pytest.mark.parametrize("pool, kind", PAIRS)
def test_a_template_is_prefects_own_with_ours_added(pool: str, kind: str) -> None:
    own, ours = WORKERS[kind].get_default_base_job_template(), template(pool, kind)
    # Docker's further options are spelled out in the template, so that no deployment can lift what keeps a container in.
    dropped = {"container_create_kwargs"} if kind == "docker" else set()
    assert set(own["variables"]["properties"]) - set(ours["variables"]["properties"]) == dropped
    for name, one in own["variables"]["properties"].items():
        if name not in dropped:
            shared = set(one) - {"default", "description"}
            assert {key: ours["variables"]["properties"][name][key] for key in shared} == {key: one[key] for key in shared}
    assert set(ours["job_configuration"]) == set(own["job_configuration"])


@pytest.mark.parametrize("pool, kind", PAIRS)
def test_the_server_would_take_the_template(pool: str, kind: str) -> None:
    ours = template(pool, kind)
    WorkPoolCreate(name=pool, type=kind, base_job_template=ours)
    ours["job_configuration"]["name"] = "{{ nowhere }}"
    with pytest.raises(ValueError, match="undeclared variable"):
        WorkPoolCreate(name=pool, type=kind, base_job_template=ours)


@pytest.mark.parametrize("pool, kind", PAIRS)
def test_the_defaults_fit_the_schema_of_the_variables(pool: str, kind: str) -> None:
    schema = template(pool, kind)["variables"]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(defaults(pool, kind), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"env": ["A=1"]}, schema)


@pytest.mark.parametrize("pool, kind", PAIRS)
def test_a_run_learns_its_pool_and_only_the_cpu_pool_sends_stages_away(pool: str, kind: str) -> None:
    environment = run(pool, kind).env
    assert environment["OTA_WORK_POOL"] == pool
    assert environment.get("OTA_GPU_DEPLOYMENT") == ("stage/gpu" if pool == "ota-cpu" else None)
    more = run(pool, kind, env={"OTA_RUNNER": "threads"}).env
    assert (more["OTA_WORK_POOL"], more["OTA_RUNNER"]) == (pool, "threads"), "a deployment adds to the pool's environment"


@pytest.mark.parametrize("pool", POOLS)
def test_processes_start_where_the_image_has_the_repository(pool: str) -> None:
    with open(INFRA / "Dockerfile") as file:
        assert f"\nWORKDIR {run(pool, 'process').working_dir}\n" in file.read()


@pytest.mark.parametrize("pool", POOLS)
def test_containers_get_secrets_from_their_worker_and_the_server_does_not(pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    assert not any(value in json.dumps(template(pool, "docker")) for value in SECRETS.values())
    configuration = run(pool, "docker")
    assert {name: configuration.env[name] for name in SECRETS} == SECRETS


@pytest.mark.parametrize("pool", POOLS)
def test_docker_makes_a_container_of_it(pool: str) -> None:
    """As far as the engine: what docker-py would send to it."""
    configuration = run(pool, "docker", **({"shm_size": "2g", "gpu_device": "3"} if pool == "ota-gpu" else {}))

    class Client:
        api = type("Api", (), {"_version": "1.50"})

        def version(self) -> dict[str, str]:
            return {"Version": "28.0.0"}

    settings = DockerWorker(work_pool_name=pool)._build_container_settings(Client(), configuration)  # type: ignore[arg-type]
    sent = _create_container_args({**settings, "version": "1.50"})
    host = sent["host_config"]
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["Tmpfs"] == {"/tmp": ""}
    assert host["AutoRemove"] and host["Binds"] == ["ota_home:/var/lib/ota"]
    assert settings["network"] == "ota"
    if pool == "ota-gpu":
        assert host["ShmSize"] == 2 * 2**30
        assert host["DeviceRequests"] == [
            {"Driver": "nvidia", "Count": 0, "DeviceIDs": ["3"], "Capabilities": [["gpu"]], "Options": {}}
        ]
    else:
        assert "DeviceRequests" not in host


@pytest.mark.parametrize("pool", POOLS)
def test_kubernetes_takes_the_job_that_comes_of_it(pool: str) -> None:
    job = run(pool, "kubernetes").job_manifest
    pod = job["spec"]["template"]["spec"]
    for name in ("parallelism", "completions"):  # Prefect's workers insist on these here, where Kubernetes ignores them
        assert pod.pop(name) == 1
    validate(job, latest_version(), strict=True)
    (container,) = pod["containers"]
    assert is_restricted(pod)
    assert pod["automountServiceAccountToken"] is False
    assert container["args"] == ["prefect", "flow-run", "execute"]
    assert container["envFrom"] == [{"configMapRef": {"name": "ota-config"}}, {"secretRef": {"name": "ota-secrets"}}]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]} == {
        "cache": dockerfile_environment()["OTA_HOME"], "tmp": "/tmp", "shm": "/dev/shm",
    }  # fmt: skip
    assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == "ota-cache"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    gpus = container["resources"]["limits"].get("nvidia.com/gpu")
    assert (gpus, bool(pod["nodeSelector"]), bool(pod["tolerations"])) == (
        (1, True, True) if pool == "ota-gpu" else (None, False, False)
    )


def test_a_deployment_can_ask_for_other_nodes_gpus_and_memory() -> None:
    wanted = {"gpu_count": 2, "node_selector": {"pool": "h100"}, "shm_size": "32Gi", "image": "here/ota-merging:1"}
    job = run("ota-gpu", "kubernetes", **wanted).job_manifest
    pod = job["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert pod["containers"][0]["image"] == "here/ota-merging:1"
    assert pod["nodeSelector"] == {"pool": "h100"}
    assert {"medium": "Memory", "sizeLimit": "32Gi"} in [volume.get("emptyDir") for volume in pod["volumes"]]


@pytest.mark.parametrize("pool, kind", [pair for pair in PAIRS if pair[1] != "process"])
def test_the_image_is_the_one_that_compose_builds(pool: str, kind: str) -> None:
    assert defaults(pool, kind)["image"] == compose("gpu")[pool.replace("ota-", "worker-")]["image"]


def server_environment() -> dict[str, str]:
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME

    return {
        **os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), "PREFECT_HOME": str(PREFECT_HOME.value()),
        "PREFECT_WORKER_QUERY_SECONDS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip


def prefect(*arguments: str, cwd: Path = ROOT, timeout: float = 120) -> str:
    command = [sys.executable, "-m", "prefect", *arguments]
    done = subprocess.run(command, cwd=cwd, env=server_environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("pool, kind", PAIRS)
def test_a_server_takes_the_template_again_and_again(prefect_server: None, pool: str, kind: str) -> None:
    file = INFRA / "pools" / f"{pool.removeprefix('ota-')}-{kind}.json"
    for _ in range(2):  # at every start of the stack
        prefect("work-pool", "create", f"{pool}-{kind}", "--type", kind, "--base-job-template", str(file), "--overwrite")
    with get_client(sync_client=True) as client:
        kept = client.read_work_pool(f"{pool}-{kind}")
    assert kept.type == kind and kept.base_job_template == template(pool, kind)


FLOW = """
import os
from pathlib import Path
from prefect import flow

@flow
def tell(file: str) -> None:
    Path(file).write_text("|".join([os.environ["OTA_WORK_POOL"], os.environ["CUDA_VISIBLE_DEVICES"], os.environ["AWS_SECRET_ACCESS_KEY"], os.getcwd()]))
"""


@pytest.mark.slow
def test_a_run_on_a_process_pool_gets_the_environment_of_pool_and_worker(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker per GPU: CUDA_VISIBLE_DEVICES of the worker says which, and the secrets are the worker's."""
    (tmp_path / "told.py").write_text(FLOW)
    prefect(
        "work-pool", "create", "ota-gpu", "--type", "process", "--base-job-template", str(INFRA / "pools" / "gpu-process.json"),
        "--overwrite",
    )  # fmt: skip
    deploy = ["deploy", "told.py:tell", "--name", "gpu", "--pool", "ota-gpu", "--job-variable", f"working_dir={tmp_path}"]
    prefect("--no-prompt", *deploy, cwd=tmp_path)
    prefect("deployment", "run", "tell/gpu", "--param", f"file={tmp_path / 'told'}", cwd=tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-worker")
    prefect("worker", "start", "--pool", "ota-gpu", "--limit", "1", "--run-once", cwd=tmp_path)
    assert (tmp_path / "told").read_text() == f"ota-gpu|1|secret-of-the-worker|{tmp_path}"
