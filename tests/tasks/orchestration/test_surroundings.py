"""Proxies, signals, and places that cannot be written to: what a command finds around it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import ota_core
from ota_core.compute import loop_cache
from tasks.orchestration.prepare import exempt_loopback
from tests.checkpoints import random_base, write_checkpoint

PROXY = "http://127.0.0.1:9"  # nobody answers at the port of "discard"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def test_without_a_proxy_nothing_changes(bare: pytest.MonkeyPatch) -> None:
    exempt_loopback()
    assert not {"NO_PROXY", "no_proxy"} & os.environ.keys()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
def test_loopback_is_asked_directly(bare: pytest.MonkeyPatch, name: str) -> None:
    """PrefectHQ/prefect, boto/botocore and mlflow all ask httpx, botocore or requests, which look at NO_PROXY."""
    import httpx
    import requests.utils
    from botocore.utils import should_bypass_proxies

    bare.setenv(name, PROXY)
    bare.setenv("no_proxy", "example.org, localhost")
    exempt_loopback()
    exempt_loopback()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "example.org,localhost,127.0.0.1,::1"
    for host in ("127.0.0.1:4200", "localhost:8333"):
        assert should_bypass_proxies(f"http://{host}/") and requests.utils.should_bypass_proxies(f"http://{host}/", no_proxy=None)
        with httpx.Client() as client:
            assert "Proxy" not in str(type(client._transport_for_url(httpx.URL(f"http://{host}/"))._pool))
    assert not should_bypass_proxies("http://example.com/")


def test_everything_exempt_stays_so(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("HTTP_PROXY", PROXY)
    bare.setenv("NO_PROXY", "*")
    exempt_loopback()
    assert os.environ["NO_PROXY"] == "*"


def test_a_flow_behind_a_proxy_and_its_end_by_sigterm(tmp_path: Path, bare: pytest.MonkeyPatch) -> None:
    """Prefect's temporary server is reached although a proxy is set, and is gone when the process is told to end."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "from flows.cli.common import user_errors\nfrom tasks.orchestration.prepare import prepare_prefect\n"
        "with user_errors():\n"
        "    prepare_prefect()\n"
        "    from prefect import flow\n"
        "    @flow\n"
        "    def wait():\n"
        f"        pathlib.Path({str(tmp_path / 'up')!r}).write_text('up')\n"
        "        time.sleep(300)\n"
        "    wait()\n"
    )
    settings = {"PREFECT_HOME": str(tmp_path / "prefect"), "HTTP_PROXY": PROXY, "HTTPS_PROXY": PROXY, "PREFECT_API_URL": ""}
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment.pop("PREFECT_API_URL")
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([sys.executable, str(script)], env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        until = time.monotonic() + 150
        while not (tmp_path / "up").exists():
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        assert any("uvicorn" in " ".join(child.cmdline()) for child in children)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        _, left = psutil.wait_procs(children, timeout=20)
        assert left == []
    finally:
        for child in [*(psutil.Process(process.pid).children(recursive=True) if process.poll() is None else [])]:
            child.kill()
        process.kill()


def test_sigterm_leaves_no_half_written_folder(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib\nfrom flows.cli.common import user_errors\nfrom ota_core.files.place import new_folder\n"
        f"with user_errors(), new_folder(pathlib.Path({str(tmp_path / 'out')!r}), overwrite=False):\n    print('up', flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM and list(tmp_path.iterdir()) == []


def test_loops_compile_where_neither_the_install_nor_a_home_can_be_written_to(tmp_path: Path) -> None:
    """LMCache/LMCache#4597, polakowo/vectorbt#476: "no locator available" in containers with another user. Here no user, root included, can write."""
    install = tmp_path / "install"
    shutil.copytree(Path(ota_core.__file__).parent, install / "ota_core", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [install / "ota_core", *(path for path in (install / "ota_core").rglob("*") if path.is_dir())]:
        (folder / "__pycache__").write_text("")  # a file in the place of the folder
    model = write_checkpoint(tmp_path / "m", random_base())
    (tmp_path / "tmp").mkdir()
    others = [p for p in sys.path if p and Path(p).resolve() != Path(ota_core.__file__).parent.parent.resolve()]
    environment = {key: value for key, value in os.environ.items() if key not in {"NUMBA_CACHE_DIR", "XDG_CACHE_HOME"}}
    environment |= {"HOME": "/dev/null", "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": os.pathsep.join([str(install), *others])}
    script = (
        "import ota_core, sys; from pathlib import Path\n"
        "from ota_core.engine.engine import merge; from ota_core.recipe.recipe import MergeRecipe\n"
        f"recipe = MergeRecipe.model_validate({{'merge_method': 'linear', 'models': [{{'model': {str(model)!r}}}]}})\n"
        f"merge(recipe, Path({str(tmp_path / 'out')!r})); print(ota_core.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(str(install)) and (tmp_path / "out" / "model.safetensors").exists()
    (cache,) = (tmp_path / "tmp").glob("ota-numba-*")
    assert cache.stat().st_mode & 0o777 == 0o700 and list(cache.rglob("*.nbi"))  # kept for the next command


def test_a_temporary_folder_of_somebody_else_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What numba keeps are pickles: others must not be able to put some there."""
    monkeypatch.setattr(loop_cache.tempfile, "tempdir", str(tmp_path))
    taken = tmp_path / f"ota-numba-{os.getuid()}"
    taken.mkdir(mode=0o777)
    taken.chmod(0o777)
    found = loop_cache._temporary()
    assert found != taken and found.stat().st_mode & 0o777 == 0o700
    taken.chmod(0o700)
    assert loop_cache._temporary() == taken
