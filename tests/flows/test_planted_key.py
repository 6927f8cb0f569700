"""Secrets of the environment, of addresses and of signed links are looked for in everything that runs leave, good ones and failed ones."""

import base64
import gzip
import json
import sqlite3
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ota_core.addresses import holds_secret, places_of_secrets, without_secrets
from ota_core.errors import OtaError, RecipeError, StorageError
from ota_core.recipe.recipe import parse_recipe
from tasks.local.s3_server import start_server
from tasks.settings import environment
from tasks.storage import s3
from tasks.tracking.store import resolve_store
from tests.fixtures.planted import LOGIN, SECRETS, SIGNATURE, leaks
from tests.flows.cli.typed import invoke
from tests.flows.merge_fixture import EXPERTS, RUN, upload, write_experts
from tests.servers import free_port, mlflow_server
from tests.tiny_suite import write_tiny_suite

SIGNED = (
    f"https://models.test/base.safetensors?X-Amz-Credential={SECRETS['AWS_ACCESS_KEY_ID']}%2F20261129&X-Amz-Signature={SIGNATURE}"
)
ALL = {**SECRETS, "user of an address": LOGIN[0], "password of an address": LOGIN[1], "signature": SIGNATURE}


@pytest.fixture
def planted(prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An environment that is full of secrets, with an S3 server that takes them; its bucket, which holds the experts."""
    from prefect.settings import PREFECT_API_KEY, temporary_settings

    # As Dask does when it is loaded: from then on exceptions are pickled with their causes.
    pytest.importorskip("tblib.pickling_support").install()

    keys = {name: SECRETS[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_REGION", "OTA_HOME", "OTA_ARTIFACTS"):
        monkeypatch.delenv(name, raising=False)
    with environment(keys):
        server = start_server(tmp_path / "s3")
    for name, value in {**SECRETS, **server.env, "AWS_CONFIG_FILE": "/none", "AWS_SHARED_CREDENTIALS_FILE": "/none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", SECRETS["MLFLOW_TRACKING_USERNAME"])
    with server, temporary_settings({PREFECT_API_KEY: SECRETS["PREFECT_API_KEY"]}):
        uri = server.create_bucket("planted")
        upload(write_experts(tmp_path / "models"), uri)
        yield uri


def databases() -> list[Path]:
    """The folder of the Prefect server's database."""
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import PREFECT_API_DATABASE_CONNECTION_URL, PREFECT_HOME

    APILogHandler().flush()
    return [Path(PREFECT_API_DATABASE_CONNECTION_URL.value().partition("///")[2]).parent, Path(PREFECT_HOME.value())]


def test_what_runs_leave_holds_no_secret(planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, data = write_tiny_suite(tmp_path / "suite")
    recipe: dict[str, Any] = {
        "merge_method": "ota", "base_model": f"{planted}/models/base", "parameters": {"density": 0.4},
        "models": [{"model": f"{planted}/experts/{name}/{RUN}"} for name in EXPERTS],
    }  # fmt: skip
    said: dict[str, str] = {}

    def run(name: str, code: int, wanted: dict[str, Any], *options: object, home: str = "home") -> None:
        """``ota run`` as it is typed, with what it says kept."""
        (tmp_path / "typed").mkdir(exist_ok=True)
        file = tmp_path / "typed" / f"{name}.yaml"
        file.write_text(yaml.safe_dump(wanted))
        done = invoke("run", file, "--home", tmp_path / home, "--device", "cpu", *options)
        said[name] = done.stdout + done.stderr
        assert done.exit_code == code, (name, done.output, done.exception)

    tests = ("--suite", suite, "--data-dir", data, "--limit", 2)
    (tmp_path / "mlflow").mkdir()
    with mlflow_server(tmp_path / "mlflow") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.replace("://", f"://{LOGIN[0]}:{LOGIN[1]}@"))
        run("good", 0, recipe, *tests)
    # The server is away now: what waits for it is kept.
    monkeypatch.setattr("tasks.log.LOGGING", {})
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run("mlflow away", 2, recipe | {"parameters": {"density": 0.3}}, "--suite", "none")
    assert list((tmp_path / "home" / "unsent").glob("*.json")) and "ota sync" in said["mlflow away"]
    run("no such expert", 2, recipe | {"models": [{"model": f"{planted}/experts/none"}]}, "--suite", "none")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS["AWS_SECRET_ACCESS_KEY"] + "x")
        run("refused by S3", 2, recipe, "--suite", "none", home="other")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://{LOGIN[0]}:{LOGIN[1]}@127.0.0.1:{free_port()}")
        run("nobody at S3", 2, recipe, "--suite", "none", home="other")
    run("signed link", 2, recipe | {"base_model": SIGNED}, "--suite", "none")
    # What was typed holds that one by right; the good run left something of every kind.
    left = {path.suffix for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert {".safetensors", ".json", ".md", ".html", ".gz", ".csv"} <= left, left
    assert list((tmp_path / "mlflow").rglob("recipe.yaml")) and (tmp_path / "mlflow" / "server.db").is_file()
    prefect = databases()
    assert any(path.suffix == ".db" for root in prefect for path in root.iterdir())
    places = [tmp_path / "home", tmp_path / "other", tmp_path / "mlflow", *prefect]
    assert leaks(places, said, ALL) == {}


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    import pandas as pd

    secret = "planted/one+2"
    (tmp_path / "a.txt").write_text(f"x{secret}y")
    (tmp_path / "b.json").write_text(json.dumps({"u": "https://h/?a=planted%2Fone%2B2"}))
    (tmp_path / "c.bin").write_bytes(b"Basic " + base64.b64encode(f"user:{secret}".encode()))
    lines = base64.encodebytes(b"x" * 50 + secret.encode()).decode()
    (tmp_path / "c2.json").write_text(json.dumps({"result": lines}))
    assert len(lines.splitlines()) == 2
    (tmp_path / "d.gz").write_bytes(gzip.compress(secret.encode()))
    pd.DataFrame({"x": [secret] * 3}).to_parquet(tmp_path / "e.parquet")
    with zipfile.ZipFile(tmp_path / "f.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", secret)
    with sqlite3.connect(tmp_path / "g.db") as database:
        database.execute("create table t (x text)")
        database.execute("insert into t values (?)", ("z" * 4090 + secret,))
    (tmp_path / "h-plain").write_text("planted/one")
    found = leaks([tmp_path], {"said": secret, "other": "nothing"}, {"key": secret})
    assert sorted(found) == [
        *(f"key in {tmp_path}/{name}" for name in ("a.txt", "b.json", "c.bin", "c2.json", "d.gz", "e.parquet", "f.zip", "g.db")),
        "key in said",
    ]


@pytest.mark.parametrize(
    "address",
    [
        "https://me:pass@host/x", "http://me@host", "postgresql+psycopg2://me:p%40ss@host:5432/db", "s3://KEY:SECRET@bucket/prefix", "https://host/x?token=abc",
        "https://host/x?a=1&X-Amz-Signature=abc", "https://host/x?sig=abc&se=2026", "postgresql://host/db?user=a&password=b",
    ],
)  # fmt: skip
def test_addresses_with_a_secret(address: str) -> None:
    assert holds_secret(address)
    shown = without_secrets(f"cannot open {address}: 403")
    assert not any(secret in shown for secret in ("pass", "p%40ss", "SECRET", "abc", "me@", "=b")) or "password=…" in shown
    assert without_secrets(shown) == shown, "said twice, the same"


@pytest.mark.parametrize(
    "address",
    [
        "sqlite:////home/me@work/mlflow.db", "sqlite:///mlflow@2.db", "https://host/team@x/mlflow", "https://host/x?to=me@there", "http://127.0.0.1:5000",
        "s3://bucket/experts/me@there/run", "org/name@main", "databricks", "databricks://profile", "/mnt/a@b", "https://host/#/x@y", "file:///a@b",
    ],
)  # fmt: skip
def test_an_at_sign_elsewhere_is_no_secret(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import re

    from tasks.settings import Address

    monkeypatch.delenv("OTA_WORK_POOL", raising=False)
    assert not holds_secret(address) and without_secrets(address) == address
    if "://" in address and not address.startswith("s3"):
        assert resolve_store(tracking_uri=address).uri == address
    pattern = Address.__metadata__[0].metadata[0].pattern  # type: ignore[attr-defined]
    assert re.match(pattern, address) and not re.match(pattern, "https://me:x@host/a") and not re.match(pattern, "a://x@host")


def test_recipes_and_stores_refuse_them_in_words_without_them() -> None:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": SIGNED}, {"model": "https://me:hunter2@host/m", "parameters": {"weight": 1}}],
    }
    assert list(places_of_secrets(recipe)) == ["models[0].model", "models[1].model"]
    with pytest.raises(
        RecipeError, match=r"(?s)models\[0\]\.model: the address holds.*models\[1\]\.model: the address holds"
    ) as seen:
        parse_recipe(recipe)
    assert SIGNATURE not in str(seen.value) and "hunter2" not in str(seen.value)
    for call in (
        lambda: s3.list_objects("s3://AKIA:hunter2@bucket/x"),
        lambda: resolve_store(tracking_uri="https://host/x?token=hunter2"),
    ):
        with pytest.raises(StorageError) as caught:
            call()
        assert "hunter2" not in str(caught.value) and isinstance(caught.value, OtaError)
