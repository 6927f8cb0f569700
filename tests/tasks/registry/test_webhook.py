"""Webhooks of a real MLflow server, received by a real HTTP server on loopback."""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet
from typer.testing import CliRunner

from tasks.registry import webhook
from tasks.registry.promotion import promote, rollback
from tasks.registry.webhook import EVENT, WebhookError
from tests.servers import mlflow_server, wait_until
from tests.tasks.registry.registry_fixture import NAME, register, write_model

SECRET = {"OTA_WEBHOOK_SECRET": "a secret that both know"}


@contextmanager
def receiver() -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """(address, what was POSTed: headers in lower case, body)."""
    got: list[tuple[dict[str, str], bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            got.append(({key.lower(): value for key, value in self.headers.items()}, body))
            self.send_response(500 if self.path == "/broken" else 204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", got
    finally:
        server.shutdown()
        server.server_close()


def signature(headers: dict[str, str], body: bytes) -> str:
    """What docs/prefect-mlflow.md tells a receiver to compute."""
    signed = b".".join([headers["x-mlflow-delivery-id"].encode(), headers["x-mlflow-timestamp"].encode(), body])
    digest = hmac.new(SECRET["OTA_WEBHOOK_SECRET"].encode(), signed, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    env = {
        "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": Fernet.generate_key().decode(), "MLFLOW_WEBHOOK_CACHE_TTL": "0",
        "MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true",
        "MLFLOW_WEBHOOK_REQUEST_MAX_RETRIES": "0",
    }  # fmt: skip
    with mlflow_server(tmp_path_factory.mktemp("webhooks"), env=env) as url:
        yield url


def test_a_promotion_and_a_rollback_are_told_and_signed(server: str, tmp_path: Path) -> None:
    with receiver() as (address, got):
        hook = webhook.add(f"{address}/hook", tracking_uri=server, environment=SECRET)
        again = webhook.add(f"{address}/hook", tracking_uri=server, environment=SECRET)
        assert (again.id, again.events, again.status) == (hook.id, (EVENT,), "ACTIVE")
        assert [one.id for one in webhook.listed(tracking_uri=server)] == [hook.id]
        assert webhook.send_example(hook.id, tracking_uri=server) == f"{address}/hook answered 204"
        got.clear()

        def told(alias: str, version: str) -> bool:
            bodies = [json.loads(body) for _, body in got]
            return {"name": NAME, "alias": alias, "version": version} in [one["data"] for one in bodies]

        for number in ("1", "2"):
            folder = write_model(tmp_path / f"m{number}", f"fp{number}", number.encode())
            assert register(tmp_path, str(folder), f"d{number}", tracking_uri=server) == number
        for number in ("1", "2"):
            promote(number, by="anna", reason="good", tracking_uri=server)
            wait_until(lambda n=number: told("champion", n), lambda: got, seconds=30)  # type: ignore[misc]
        got.clear()
        rollback(by="ben", reason="bad", tracking_uri=server)
        wait_until(lambda: told("champion", "1"), lambda: got, seconds=30)
        for headers, body in got:
            assert hmac.compare_digest(headers["x-mlflow-signature"], signature(headers, body))
            assert json.loads(body)["entity"] == "model_version_alias" and json.loads(body)["action"] == "created"

        gone = webhook.remove(f"{address}/hook", tracking_uri=server)
        assert gone.id == hook.id and webhook.listed(tracking_uri=server) == []


def test_the_command(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.cli.app import app

    def run(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["webhook", *words, "--tracking-uri", server])
        return done.exit_code, done.output

    monkeypatch.setenv("OTA_WEBHOOK_SECRET", SECRET["OTA_WEBHOOK_SECRET"])
    with receiver() as (address, got):
        assert run("list") == (0, "no webhook; add one with: ota webhook add URL\n")
        code, said = run("add", f"{address}/broken")
        assert code == 0 and said.endswith(f": {address}/broken is told of {EVENT}\n")
        assert address in run("list")[1] and "secret" not in run("list")[1]
        code, said = run("test", f"{address}/broken")
        assert code == 2 and "did not take the example: it answered 500" in said and len(got) == 1
        code, said = run("remove", "nobody")
        assert code == 2 and "0 webhooks are called 'nobody'; name one by its id: " in said
        assert run("remove", f"{address}/broken")[0] == 0
        monkeypatch.delenv("OTA_WEBHOOK_SECRET")
        code, said = run("add", f"{address}/hook")
        assert code == 2 and "set OTA_WEBHOOK_SECRET to a secret" in said


def test_what_cannot_be_had_is_said(server: str, tmp_path: Path) -> None:
    with pytest.raises(WebhookError, match="delivered by an MLflow server"):
        webhook.listed(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(WebhookError, match=r"'ftp://x' is no address"):
        webhook.add("ftp://x", tracking_uri=server, environment=SECRET)
