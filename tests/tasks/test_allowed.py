"""What a deployed flow may touch: what whoever starts a run can name."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.utilities.callables import parameter_schema

from flows.benchmark import benchmark_flow
from flows.merge import merge_flow
from ota_core.errors import OtaError, StorageError
from tasks.evaluation.subject import bring_data
from tasks.evaluation.suites import load_suite
from tasks.merging.recipes import read_yaml
from tasks.settings import allow_path, allow_server, places
from tasks.storage import models as storage
from tasks.tracking.store import resolve_store
from tests.flows.cli.typed import invoke
from tests.ota_core.engine.test_output import llama_experts


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The environment of a worker; its home folder."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("OTA_WORK_POOL", "ota-cpu")
    monkeypatch.setenv("OTA_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.test:5000")
    for name in ("OTA_ALLOWED_ROOTS", "OTA_ARTIFACTS", "OTA_NIGHTLY"):
        monkeypatch.delenv(name, raising=False)
    return home


def test_in_a_shell_everything_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OTA_WORK_POOL", raising=False)
    allow_path("/etc/passwd", "x")
    allow_server("https://elsewhere.test", "x", None)


def test_on_a_worker_its_own_folders(worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_path(worker / "cache" / "x", "x")
    allow_path(load_suite("demo").include_path or "", "x")
    (worker / "link").symlink_to("/etc")
    for path in ("/etc/passwd", worker / ".." / "x", worker / "link" / "passwd", Path(str(worker) + "2")):
        with pytest.raises(StorageError, match="lies on the worker, outside of what its runs may use"):
            allow_path(path, "the file")
    monkeypatch.setenv("OTA_ALLOWED_ROOTS", f" /etc , {tmp_path}/models,https://mlflow.test")
    allow_path("/etc/passwd", "x")
    allow_path(tmp_path / "models" / "a", "x")


@pytest.mark.parametrize("address", ["https://thief.test", "http://mlflow.test.thief.test:5000", "http://mlflow.test:5000@thief.test", "http://mlflow.test:99999"])  # fmt: skip
def test_a_worker_shows_nobody_else_its_credentials(worker: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("OTA_ALLOWED_ROOTS", "https://other.test")
    with pytest.raises(StorageError):
        resolve_store(tracking_uri=address)
    with pytest.raises(StorageError):
        allow_server(address, "server", None)
    assert resolve_store(tracking_uri="http://mlflow.test:5000").uri == resolve_store().uri
    assert resolve_store(tracking_uri="https://other.test:443/x").uri == "https://other.test:443/x"


def test_every_address_of_a_form_is_looked_at(worker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "suite.yaml").write_text("a secret line")
    calls: dict[str, Any] = {
        "recipe": lambda: read_yaml(str(secret / "suite.yaml")),
        "suite": lambda: load_suite(str(secret / "suite.yaml")),
        "data_dir": lambda: bring_data(str(secret), places()),
        "home": lambda: places(secret),
        "artifacts": lambda: places(None, str(secret)),
        "database": lambda: resolve_store(tracking_uri=f"sqlite:///{secret}/mlflow.db"),
        "model": lambda: storage.fetch(str(secret), cache=worker / "cache"),
    }
    for call in calls.values():
        with pytest.raises(StorageError, match="outside of what its runs may use") as caught:
            call()
        assert "a secret line" not in str(caught.value)
    assert list(worker.iterdir()) == []


def test_flows_are_stopped_before_anything_is_read(worker: Path, tmp_path: Path, prefect_server: None) -> None:
    recipe = llama_experts(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    for run in (
        lambda: merge_flow(recipe=str(tmp_path / "r.yaml"), suite=None),
        lambda: merge_flow(recipe=recipe, suite=None, recipe_dir=tmp_path, tracking_uri=None),
        lambda: benchmark_flow(model="s3://b/x", suite="demo", data_dir=str(tmp_path)),
    ):
        with pytest.raises(OtaError, match="outside of what its runs may use"):
            run()


def test_prefects_server_refuses_a_password_before_it_keeps_it() -> None:
    for flow in (merge_flow, benchmark_flow):
        schema = parameter_schema(flow.fn).model_dump()["properties"]["tracking_uri"]
        assert [re.fullmatch(one["pattern"], "https://me:x@host") for one in schema["anyOf"] if "pattern" in one] == [None]
        assert [bool(re.fullmatch(one["pattern"], "https://host/x")) for one in schema["anyOf"] if "pattern" in one] == [True]


def test_the_command_refuses_a_password_in_an_address() -> None:
    done = invoke("benchmark", "m", "--tracking-uri", "https://me:hunter2@host")
    assert done.exit_code == 2 and "MLFLOW_TRACKING_PASSWORD" in done.stderr and "hunter2" not in done.stderr


def test_a_password_in_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match=r"tracking_uri https://mlflow\.test/x held a user name or a password") as caught:
        resolve_store(tracking_uri="https://me:hunter2@mlflow.test/x")
    assert "hunter2" not in str(caught.value)
