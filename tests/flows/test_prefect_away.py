"""Prefect's server is away, is no Prefect server, or restarts in the middle: one message, a way without it, and nothing lost."""

import http.server
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from ota_core.errors import OtaError
from tasks.orchestration import prepare
from tests.flows.cli.typed import invoke
from tests.ota_core.engine.test_output import llama_experts
from tests.servers import S3Test, free_port, wait_until
from tests.tasks.storage.s3_proxy import Answer, Proxy
from tests.tasks.storage.streaming.test_streaming import remote

REPOSITORY = Path(__file__).parents[2]


def environment(tmp_path: Path, api: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "OTA_"))}
    return plain | {
        "PREFECT_API_URL": api,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "COLUMNS": "200",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }


def ota_run(tmp_path: Path, api: str, *options: str) -> subprocess.CompletedProcess[str]:
    """``ota run`` of the recipe in the folder, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "flows.cli",
        "run",
        str(tmp_path / "recipe.yaml"),
        "--suite",
        "none",
        "--home",
        str(tmp_path / "home"),
    ]
    return subprocess.run(
        [*command, *options], cwd=REPOSITORY, env=environment(tmp_path, api), capture_output=True, text=True, check=False
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(llama_experts(tmp_path)))
    return tmp_path / "recipe.yaml"


def test_nobody_at_the_address_is_one_message(tmp_path: Path, recipe: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}/api"
    done = ota_run(tmp_path, address)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "Error" in line]
    assert (
        line.startswith(f"Error: the Prefect server at {address} cannot be reached")
        and "--no-server" in line
        and "ota merge" in line
    )


@pytest.mark.parametrize(
    "command",
    [
        ("run", "RECIPE", "--suite", "none"), ("nightly", "deployments/nightly.yaml"), ("study", "deployments/studies/demo.yaml"),
        ("study-real", "--only-models"), ("benchmark", "org/name", "--suite", "demo"), ("search", "RECIPE", "OUT", "--suite", "demo"),
        ("tune", "RECIPE", "OUT", "--suite", "demo"), ("demo",), ("stack", "deploy"),
    ],
    ids=lambda command: " ".join(command[:2]),
)  # fmt: skip
def test_every_command_that_needs_it_says_so_once(
    tmp_path: Path, recipe: Path, command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    for name in (
        "PREFECT_SERVER_ANALYTICS_ENABLED",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS",
        "PREFECT_CLIENT_MAX_RETRIES",
    ):
        monkeypatch.setenv(name, "0")  # put back after the test
    words = {"RECIPE": str(recipe), "OUT": str(tmp_path / "out.yaml")}
    address = f"127.0.0.1:{free_port()}/api"
    with temporary_settings({PREFECT_API_URL: f"http://me:secret@{address}"}):
        done = invoke(*(words.get(word, word) for word in command))
    assert done.exit_code == 2 and "Traceback" not in done.output, (done.output, done.exception)
    (line,) = [line for line in done.stderr.splitlines() if "Error" in line]
    assert f"http://{address}" in line and "Prefect server" in line and "secret" not in done.output
    assert not (tmp_path / "home").exists() or not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


@pytest.mark.slow
def test_without_a_server_it_merges_all_the_same(tmp_path: Path, recipe: Path) -> None:
    done = ota_run(tmp_path, f"http://127.0.0.1:{free_port()}/api", "--no-server")
    assert done.returncode == 0, done.stderr
    merged = next((tmp_path / "home" / "artifacts" / "merged").iterdir())
    assert f"merged model: {merged}" in done.stdout and (merged / "record.json").is_file()


@pytest.mark.parametrize(("status", "said"), [(404, "answers 404"), (502, "answers 502"), (401, None), (200, None)])
def test_who_answers(status: int, said: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of somebody else's is no Prefect server; one that wants a password is."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: None)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with temporary_settings({PREFECT_API_URL: f"http://me:secret@127.0.0.1:{server.server_port}/api"}):
            if said is None:
                prepare.check_server()
            else:
                with pytest.raises(OtaError, match=said) as seen:
                    prepare.check_server()
                assert "secret" not in str(seen.value)
        server.shutdown()


def test_an_error_of_a_server_that_went_away_is_known() -> None:
    import httpx
    from prefect.settings import PREFECT_API_URL, temporary_settings

    def failed(url: str) -> RuntimeError:
        error = RuntimeError("Failed to reach API")
        error.__cause__ = httpx.ConnectError("refused", request=httpx.Request("GET", url))
        return error

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        said = prepare.lost_server(failed("http://127.0.0.1:9/api/flow_runs/"))
        assert said is not None and "went away" in said and "Nothing that was computed is lost" in said
        assert prepare.lost_server(failed("http://127.0.0.1:10/other")) is None
        assert prepare.lost_server(ValueError("other")) is None


@contextmanager
def prefect(tmp_path: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A Prefect server that keeps its runs in the folder."""
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    settings = environment(tmp_path, f"http://127.0.0.1:{port}/api")
    with open(tmp_path / "server.log", "ab") as log:
        process = subprocess.Popen(command, env=settings, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "server.log").read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    try:
        wait_until(answers, (tmp_path / "server.log").read_text, seconds=400)
        yield process
    finally:
        os.killpg(process.pid, 9)
        process.wait()


@pytest.mark.slow
def test_a_server_that_restarts_during_a_run_loses_nothing(tmp_path: Path, proxy: Proxy, s3_server: S3Test) -> None:
    """It is killed while an expert is fetched, and comes back after the fetch has gone on."""
    port, reached, go_on = free_port(), threading.Event(), threading.Event()
    (tmp_path / "models").mkdir()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(remote(llama_experts(tmp_path / "models"), s3_server.uri)))

    def hold(answer: Answer) -> None:
        if answer.method == "GET" and answer.path.endswith("expert1/model.safetensors"):
            reached.set()
            go_on.wait(600)

    proxy.change = hold
    found: list[subprocess.CompletedProcess[str]] = []
    runner = threading.Thread(target=lambda: found.append(ota_run(tmp_path, f"http://127.0.0.1:{port}/api")))
    with prefect(tmp_path, port):
        runner.start()
        wait_until(lambda: reached.is_set() or found, lambda: found, seconds=400)
    go_on.set()  # the server is away now
    with prefect(tmp_path, port):
        runner.join(600)
        (done,) = found
        assert done.returncode == 0, done.stderr
        merged = next((tmp_path / "home" / "artifacts" / "merged").iterdir())
        assert (merged / "record.json").is_file() and (merged / "report.html").is_file()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/flow_runs/filter", data=b"{}", headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert b'"COMPLETED"' in answer.read()
