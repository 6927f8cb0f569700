"""The manifests, against the schemas of Kubernetes and against each other."""

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml
from kubernetes_validate import ValidationError, latest_version, validate

from tests.infra.read import INFRA, POOLS, manifest, manifests, template

VERSIONS = ("1.32", latest_version())
FOLDER = INFRA / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
PODS = {
    f"{one['kind']} {one['metadata']['name']}": one["spec"]["template"]["spec"]
    for one in manifests()
    if one["kind"] in {"Deployment", "Job"}
}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_fits_the_schema_of_kubernetes(version: str) -> None:
    assert len(manifests()) == 10
    for one in manifests():
        validate(one, version, strict=True)
    broken = {**manifest("Deployment", "ota-worker-gpu"), "spec": {"replica": 1}}
    with pytest.raises(ValidationError):
        validate(broken, version, strict=True)


def test_the_kustomization_lists_every_file() -> None:
    assert sorted(KUSTOMIZATION["resources"]) == sorted({file.name for file in FOLDER.glob("*.yaml")} - {"kustomization.yaml"})


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_puts_all_into_the_namespace_with_a_tag() -> None:
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = list(yaml.safe_load_all(done.stdout))
    assert len(built) == len(manifests())
    for one in built:
        validate(one, latest_version(), strict=True)
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "ota"
    images = re.findall(r"image: (\S+)", done.stdout)
    assert len(images) == len(PODS) and all(re.fullmatch(r"ota-merging:\d+\.\d+\.\d+-cpu", image) for image in images)


def is_restricted(pod: dict[str, Any]) -> bool:
    """Kubernetes' Pod Security Standard "restricted", which the namespace enforces, and a root folder that nobody writes to."""
    security = pod["securityContext"]
    return (
        security["runAsNonRoot"] is True
        and security["runAsUser"] >= 10000
        and security["seccompProfile"] == {"type": "RuntimeDefault"}
        and not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
        and all(set(volume) <= {"name", "emptyDir", "persistentVolumeClaim"} for volume in pod["volumes"])
        and all(
            one["securityContext"]
            == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
            for one in pod["containers"]
        )
    )


@pytest.mark.parametrize("pod", sorted(PODS))
def test_pods_may_run_in_the_namespace(pod: str) -> None:
    assert manifest("Namespace", "ota")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    assert is_restricted(PODS[pod])
    for container in PODS[pod]["containers"]:
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]) and "memory" in container["resources"]["limits"]
        assert {"configMapRef": {"name": "ota-config"}} in container["envFrom"]
        assert {"secretRef": {"name": "ota-secrets"}} in container["envFrom"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in PODS[pod]["volumes"]}


def test_secrets_are_referred_to_and_not_here() -> None:
    assert "Secret" not in {one["kind"] for one in manifests()}
    names = set(manifest("ConfigMap", "ota-config")["data"])
    names |= {variable["name"] for pod in PODS.values() for one in pod["containers"] for variable in one.get("env", [])}
    assert not [name for name in names if re.search(r"PASSWORD|SECRET_ACCESS|ACCESS_KEY|TOKEN", name)]


@pytest.mark.parametrize("pool", POOLS)
def test_each_pool_has_a_worker_with_probes_of_its_health_server(pool: str) -> None:
    deployment = manifest("Deployment", pool.replace("ota-", "ota-worker-"))
    assert deployment["spec"]["selector"]["matchLabels"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    command = " ".join(container["args"])
    assert command.startswith(f"prefect worker start --pool {pool} --type kubernetes ") and "--with-healthcheck" in command
    (port,) = container["ports"]
    assert port == {"name": "health", "containerPort": 8080}
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "health"}


def test_workers_may_do_what_they_do_and_only_here() -> None:
    assert not [one for one in manifests() if one["kind"].startswith("ClusterRole")]
    role, binding = manifest("Role", "ota-worker"), manifest("RoleBinding", "ota-worker")
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    assert [one["name"] for one in binding["subjects"]] == ["ota-worker"]
    allowed = {(name, verb) for rule in role["rules"] for name in rule["resources"] for verb in rule["verbs"]}
    # What prefect-kubernetes calls: jobs are made, watched and deleted, pods watched, their logs and events read.
    assert {("jobs", verb) for verb in ("create", "get", "list", "watch", "delete", "patch")} <= allowed
    assert {(name, verb) for name in ("pods", "pods/log", "events") for verb in ("get", "list", "watch")} <= allowed
    assert not [pair for pair in allowed if pair[0] in {"*", "secrets"} or pair[1] == "*"]
    for pool in POOLS:
        pod = PODS[f"Deployment {pool.replace('ota-', 'ota-worker-')}"]
        assert pod["serviceAccountName"] == "ota-worker"
        (container,) = pod["containers"]
        # The role holds for this namespace alone, so the worker must not watch others.
        variables = {variable["name"]: variable["value"] for variable in container["env"]}
        assert variables["PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"] == "ota"
        spec = template(pool, "kubernetes")["variables"]["properties"]
        assert spec["namespace"]["default"] == KUSTOMIZATION["namespace"] == "ota"
        assert manifest("ServiceAccount", spec["service_account_name"]["default"])["automountServiceAccountToken"] is False
        claim = manifest("PersistentVolumeClaim", spec["cache_claim"]["default"])
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
