"""What the tests of infra/ share: its files, as their own tools read them."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
PROFILES = ("gpu", "cpu-only")
POOLS = ("ota-cpu", "ota-gpu")
TYPES = ("process", "docker", "kubernetes")
# Values for everything that the compose file asks for; none of them can be mistaken for another.
VALUES = {
    name: f"value-of-{name.lower()}"
    for name in (
        "POSTGRES_PASSWORD", "PREFECT_DB_PASSWORD", "MLFLOW_DB_PASSWORD", "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY",
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "TORCH_CPU_INDEX",
    )
}  # fmt: skip


def tool(name: str) -> str:
    """A program that a wheel of the development environment brings."""
    return str(Path(sys.executable).parent / name)


def run_compose(*arguments: str, values: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Compose itself, without an engine and without what this machine's environment holds."""
    command = [tool("docker-compose"), "-f", str(INFRA / "compose.yaml"), "--env-file", os.devnull, *arguments]
    environment = {"PATH": os.environ["PATH"], "HOME": os.devnull, **values}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@cache
def compose(profile: str) -> dict[str, Any]:
    """The services of a profile as Compose understands them, with VALUES filled in."""
    done = run_compose("--profile", profile, "config", "--format", "json", values=VALUES)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]


def compose_text() -> str:
    return (INFRA / "compose.yaml").read_text()


@cache
def manifests() -> list[dict[str, Any]]:
    """Every object that the kustomization lists."""
    folder = INFRA / "kubernetes"
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [document for name in names for document in yaml.safe_load_all((folder / name).read_text())]


def manifest(kind: str, name: str) -> dict[str, Any]:
    (found,) = [one for one in manifests() if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def template(pool: str, kind: str) -> dict[str, Any]:
    """The base job template of a pool, such as ota-gpu, of a type of worker."""
    return json.loads((INFRA / "pools" / f"{pool.removeprefix('ota-')}-{kind}.json").read_text())


def defaults(pool: str, kind: str) -> dict[str, Any]:
    properties = template(pool, kind)["variables"]["properties"]
    return {name: one["default"] for name, one in properties.items() if one.get("default") is not None}


def dockerfile_environment() -> dict[str, str]:
    from dockerfile_parse import DockerfileParser

    with open(INFRA / "Dockerfile", "rb") as file:
        lines = DockerfileParser(fileobj=file, env_replace=False).structure
    pairs = [re.findall(r"(\w+)=(\S+)", line["value"]) for line in lines if line["instruction"] == "ENV"]
    return dict(pair for line in pairs for pair in line)


def deployments() -> list[dict[str, Any]]:
    return yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
