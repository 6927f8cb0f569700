"""The compose file, read by Compose itself."""

import json
import re
from typing import Any

import pytest

from tests.infra.read import INFRA, PROFILES, ROOT, VALUES, compose, compose_text, run_compose

ONE_SHOT = {"buckets", "deploy"}
SECRET = re.compile(r"PASSWORD|SECRET|ACCESS_KEY|TOKEN")
PINNED = re.compile(r"[a-z0-9/.-]+:\d+\.\d+[\w.-]*")
SERVICES = [(profile, name) for profile in PROFILES for name in sorted(compose(profile))]


def workers(profile: str) -> dict[str, str]:
    """Service to its command, of those that are workers."""
    commands = {name: " ".join(one.get("command") or []) for name, one in compose(profile).items()}
    return {name: command for name, command in commands.items() if command.startswith("prefect worker start ")}


def test_each_profile_has_one_worker_of_each_pool() -> None:
    for profile in PROFILES:
        started = [re.search(r"--pool (\S+) --type process --limit (\d+)", one) for one in workers(profile).values()]
        limits = {found[1]: int(found[2]) for found in started if found}
        assert len(limits) == len(started) and set(limits) == {"ota-cpu", "ota-gpu"}
        assert limits["ota-gpu"] == 1, "one run at a time on a GPU"


def test_only_the_gpu_profile_asks_for_a_gpu() -> None:
    (device,) = compose("gpu")["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
    assert compose("gpu")["worker-gpu"]["image"].endswith("-cuda")
    assert not any("devices" in json.dumps(one) for one in compose("cpu-only").values())
    assert workers("cpu-only")["worker-gpu-on-cpu"] == workers("gpu")["worker-gpu"]


@pytest.mark.parametrize("name", sorted(VALUES))
def test_compose_refuses_to_start_without(name: str) -> None:
    done = run_compose("config", "--quiet", values={key: value for key, value in VALUES.items() if key != name})
    assert done.returncode != 0 and f"required variable {name} is missing a value" in done.stderr


@pytest.mark.parametrize("profile, name", SERVICES)
def test_secrets_come_from_the_environment(profile: str, name: str) -> None:
    service = compose(profile)[name]
    for variable, value in (service.get("environment") or {}).items():
        if SECRET.search(variable):
            assert value in VALUES.values(), f"{variable} is written in the file"
    # A command can be read by everybody on the host.
    seen = json.dumps([service.get("command"), service.get("entrypoint"), service.get("healthcheck")])
    assert not any(value in seen for value in VALUES.values())


@pytest.mark.parametrize("profile, name", SERVICES)
def test_every_service_is_pinned_watched_and_restarted(profile: str, name: str) -> None:
    service = compose(profile)[name]
    assert PINNED.fullmatch(service["image"])
    assert list(service["networks"]) == ["ota"]
    assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", []))
    if name in ONE_SHOT:
        assert service["restart"] == "on-failure:5"
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"
    for other, wait in service.get("depends_on", {}).items():
        assert wait["condition"] == ("service_completed_successfully" if other in ONE_SHOT else "service_healthy")
    if service["image"].startswith("ota-merging:"):
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "/tmp" in service["tmpfs"]
        target = service["build"]["target"]
        assert service["image"].endswith(f"-{target}") and service["build"]["dockerfile"] == "infra/Dockerfile"
        assert service["build"]["context"] == str(INFRA) or (INFRA / service["build"]["context"]).resolve() == ROOT


def test_all_start_in_an_order_that_works() -> None:
    for profile in PROFILES:
        services = compose(profile)

        def needs(name: str, services: dict[str, Any] = services) -> set[str]:
            direct = set(services[name].get("depends_on", {}))
            return direct.union(*(needs(one) for one in direct))

        for worker in workers(profile):
            assert needs(worker) == {"deploy", "prefect", "mlflow", "postgres", "buckets", "s3"}


def test_ports_are_published_on_loopback_as_written() -> None:
    published = {port["published"] for one in compose("gpu").values() for port in one.get("ports", [])}
    assert published == {"4200", "5000", "8333"}


def test_mlflow_answers_to_the_names_that_it_is_called_by() -> None:
    services = compose("gpu")
    (hosts,) = re.findall(r"--allowed-hosts=(\S+)", " ".join(services["mlflow"]["command"]))
    called = services["worker-cpu"]["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    assert {called, "127.0.0.1:5000"} <= set(hosts.split(","))


def test_the_buckets_that_are_used_are_created() -> None:
    services = compose("gpu")
    created = set(re.findall(r'"(ota-\w+)"', services["buckets"]["command"][-1]))
    used = set(re.findall(r"s3://([\w-]+)", json.dumps({name: one for name, one in services.items() if name != "buckets"})))
    assert used == created


def test_the_databases_that_are_used_are_created() -> None:
    script = (INFRA / "postgres" / "databases.sql").read_text()
    created = set(re.findall(r"CREATE DATABASE (\w+) OWNER \1;", script))
    services = compose("gpu")
    prefect = services["prefect"]["environment"]
    (mlflow,) = re.findall(r"postgresql\+psycopg2://(\w+)@postgres:5432/\1", " ".join(services["mlflow"]["command"]))
    assert created == {mlflow, prefect["PREFECT_SERVER_DATABASE_NAME"]}
    assert prefect["PREFECT_SERVER_DATABASE_USER"] == prefect["PREFECT_SERVER_DATABASE_NAME"]
    for variable in re.findall(r"\\getenv \w+ (\w+)", script):
        assert variable in services["postgres"]["environment"]
    assert prefect["PREFECT_SERVER_DATABASE_PASSWORD"] == services["postgres"]["environment"]["PREFECT_DB_PASSWORD"]
    assert services["mlflow"]["environment"]["PGPASSWORD"] == services["postgres"]["environment"]["MLFLOW_DB_PASSWORD"]


def test_the_example_names_every_variable_and_no_secret() -> None:
    lines = (INFRA / ".env.example").read_text().splitlines()
    example = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert set(example) == set(re.findall(r"\$\{(\w+)", compose_text()))
    assert {name for name, value in example.items() if value == ""} >= set(VALUES)
    for name in re.findall(r"\$\{(\w+):-", compose_text()):
        (default,) = set(re.findall(rf"\$\{{{name}:-([^}}]*)", compose_text()))
        assert example[name] == default, "the example shows the default"


def test_the_filled_in_example_stays_out_of_git() -> None:
    assert "infra/.env" in (ROOT / ".gitignore").read_text().splitlines()
