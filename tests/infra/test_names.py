"""Names that several files have to agree on, and secrets that none of them may hold."""

import ast
import json
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.read import (
    INFRA,
    POOLS,
    PROFILES,
    ROOT,
    TYPES,
    compose,
    defaults,
    deployments,
    dockerfile_environment,
    manifest,
)

# What the flows need from the place that they run in, beside OTA_HOME, which the image sets.
NEEDED = {
    "MLFLOW_TRACKING_URI", "OTA_ARTIFACTS", "OTA_NIGHTLY", "OTA_AWS_BLOCK", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION",
}  # fmt: skip
FILES = sorted(path for path in INFRA.rglob("*") if path.is_file())


@cache
def names_in_the_code() -> set[str]:
    """Every string in the code that is the name of one of our variables."""
    trees = [ast.parse(path.read_text()) for folder in ("flows", "tasks") for path in (ROOT / folder).rglob("*.py")]
    texts = {
        node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {text for text in texts if re.fullmatch(r"OTA_[A-Z_]+", text)}


def environments() -> dict[str, dict[str, Any]]:
    """Where runs take place, to what their environment holds by these files."""
    found: dict[str, dict[str, Any]] = {"image": dockerfile_environment()}
    for profile in PROFILES:
        services = compose(profile).items()
        found |= {f"compose {name}": one["environment"] for name, one in services if name.startswith(("worker", "deploy"))}
    for pool in POOLS:
        found |= {f"{pool} {kind}": defaults(pool, kind)["env"] for kind in TYPES}
    # The Secret is not here; config.yaml says what it has to hold.
    said = re.findall(r"^#.*?(AWS_[A-Z_]+) and (AWS_[A-Z_]+)", (INFRA / "kubernetes" / "config.yaml").read_text(), re.MULTILINE)
    return found | {
        "cluster": manifest("ConfigMap", "ota-config")["data"] | dict.fromkeys(name for pair in said for name in pair)
    }


def test_the_code_reads_every_variable_that_is_set() -> None:
    for where, environment in environments().items():
        ours = {name for name in environment if name.startswith("OTA_")}
        assert ours <= names_in_the_code(), where


@pytest.mark.parametrize(
    "where",
    ["compose worker-cpu", "compose worker-gpu", "compose worker-gpu-on-cpu", "ota-cpu docker", "ota-gpu docker", "cluster"],
)
def test_every_run_finds_what_it_needs(where: str) -> None:
    assert set(environments()[where]) >= NEEDED


def test_prefect_knows_every_setting_of_its_own() -> None:
    from prefect.settings.legacy import _get_settings_fields
    from prefect.settings.models.root import Settings
    from prefect_kubernetes.settings import KubernetesSettings

    known = {name.upper() for name in _get_settings_fields(Settings)} | {"PREFECT_API_AUTH_STRING"}
    known |= {f"PREFECT_INTEGRATIONS_KUBERNETES_{group.upper()}_{field.upper()}" for group, one in KubernetesSettings.model_fields.items()
              for field in getattr(one.annotation, "model_fields", {})}  # fmt: skip
    used = {name for path in FILES for name in re.findall(r"\bPREFECT_[A-Z_]+\b", path.read_text())} - {"PREFECT_DB_PASSWORD"}
    used.discard("PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR")  # in the words of Prefect's own template
    assert len(used) > 10 and used <= known, used - known


def commands() -> str:
    compose_commands = [" ".join(one.get("command") or []) for one in compose("gpu").values()]
    jobs = [manifest("Job", "ota-deploy"), *(manifest("Deployment", pool.replace("ota-", "ota-worker-")) for pool in POOLS)]
    return "\n".join([*compose_commands, *(" ".join(job["spec"]["template"]["spec"]["containers"][0]["args"]) for job in jobs)])


def test_pools_deployments_and_automations_are_made_by_the_command_for_the_workers_types() -> None:
    """What the command does with a server: tests/flows/stack/test_stack_deploy.py."""
    assert compose("gpu")["deploy"]["command"] == ["ota", "stack", "deploy"]
    (job,) = manifest("Job", "ota-deploy")["spec"]["template"]["spec"]["containers"]
    assert job["args"] == ["ota", "stack", "deploy", "--type", "kubernetes"]
    started = re.findall(r"worker start --pool (\S+) --type (\S+)", commands())
    assert set(started) == {(pool, kind) for pool in POOLS for kind in ("process", "kubernetes")}


def test_the_guides_make_automations_and_upload_the_nightly_configuration() -> None:
    guides = [(ROOT / "docs" / "nightly.md").read_text(), (INFRA / "README.md").read_text()]
    assert all("ota stack deploy" in guide and "work-pool create" not in guide for guide in guides)
    named = {
        compose("gpu")["worker-cpu"]["environment"]["OTA_NIGHTLY"],
        manifest("ConfigMap", "ota-config")["data"]["OTA_NIGHTLY"],
    }
    assert named == {"s3://ota-experts/nightly.yaml"} and f"'{named.pop()}'" in guides[1]
    for bucket in set(re.findall(r"s3://(ota-demo)", (ROOT / "deployments" / "prefect.yaml").read_text())):
        assert bucket in guides[1], "the forms are filled in with what only the demo has"


def test_every_deployment_has_its_pool() -> None:
    assert {one["work_pool"]["name"] for one in deployments()} <= set(POOLS)


def test_stages_for_the_gpu_are_sent_to_a_deployment_of_the_gpu_pool() -> None:
    for kind in TYPES:
        flow, _, name = defaults("ota-cpu", kind)["env"]["OTA_GPU_DEPLOYMENT"].partition("/")
        named = [one for one in deployments() if one["name"] == name]
        (target,) = [one for one in named if one["entrypoint"].rpartition(".")[2].removesuffix("_flow") == flow]
        assert target["work_pool"]["name"] == "ota-gpu"


def test_images_carry_the_version_of_the_package() -> None:
    (version,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    named = {tag for path in FILES for tag in re.findall(r"ota-merging:(?:\$\{OTA_VERSION:-)?(\d[\w.]*)", path.read_text())}
    assert named == {version}
    (tag,) = [one["newTag"] for one in yaml.safe_load((INFRA / "kubernetes" / "kustomization.yaml").read_text())["images"]]
    assert tag == f"{version}-cpu"
    assert f"ARG VERSION={version}\n" in (INFRA / "Dockerfile").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_every_file_can_be_read(path: Path) -> None:
    text = path.read_text()
    assert text.endswith("\n") and not text.endswith("\n\n")
    if path.suffix == ".json":
        assert json.dumps(json.loads(text), indent=2) + "\n" == text
    elif path.suffix == ".yaml":
        assert all(isinstance(one, dict) for one in yaml.safe_load_all(text))
    else:
        assert path.suffix in {".py", ".md", ".sql", ".lock", ".dockerignore"} or path.name in {"Dockerfile", ".env.example"}


def secrets_in(text: str) -> list[str]:
    """What looks like a secret: keys of AWS, private keys, values given to names of secrets, and long random words."""
    found = re.findall(r"\bA(?:KIA|SIA)[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----", text)
    # A value that is a reference starts with $ or {{, or names another object.
    names = r"(?:[A-Z_]*(?:PASSWORD|SECRET_ACCESS_KEY|ACCESS_KEY_ID|TOKEN)|\w*password)"
    found += re.findall(rf'(?m)^\W*{names}"?[ \t]*[:=][ \t]*"?([^\s"${{#][^\s"]*)', text)
    for word in re.findall(r"[A-Za-z0-9+/=]{20,}", text):
        counts = Counter(word)
        entropy = -sum(n / len(word) * math.log2(n / len(word)) for n in counts.values())
        if entropy > 4.2 and re.search(r"\d", word) and re.search(r"[A-Z]", word) and re.search(r"[a-z]", word):
            found.append(word)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(INFRA)))
def test_no_file_holds_a_secret(path: Path) -> None:
    assert secrets_in(path.read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "key: AKIA" + "ABCDEFGHIJKLMNOP", "-----BEGIN RSA " + "PRIVATE KEY-----", "  POSTGRES_PASSWORD: hunter2", "AWS_SECRET_ACCESS_KEY=abc",
        '"AWS_SECRET_ACCESS_KEY": "abc"', "x: wJalrXUtnFEMI" + "K7MDENGbPxRfiCYzK9q",
    ],
)  # fmt: skip
def test_a_secret_would_be_seen(text: str) -> None:
    assert secrets_in(text) != []
