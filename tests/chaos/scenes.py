"""All scenes, and the world that they share: tiny models, an S3 server, a Prefect server."""

import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tasks.settings import environment
from tests.chaos.files import Compress, CompressOver, Merge, MergeOver, MergeStages
from tests.chaos.process import run
from tests.chaos.runs import API, Run, RunAlone, RunBenchmark, RunInS3, Search
from tests.chaos.scene import Scene
from tests.chaos.served import (
    BUCKET,
    Collect,
    Promote,
    Publish,
    PublishToFolder,
    Push,
    PushToFolder,
    Served,
    Sync,
    SyncAtFirst,
    SyncSearch,
)
from tests.servers import free_port, wait_until

_ALL = (Merge, MergeOver, MergeStages, Compress, CompressOver, Push, PushToFolder, Promote, Publish, PublishToFolder, Collect, Sync,
        SyncAtFirst, SyncSearch, Run, RunInS3, RunAlone, RunBenchmark, Search)  # fmt: skip
SCENES: dict[str, type[Scene]] = {one.name: one for one in _ALL}
_OURS = ("OTA_", "PREFECT_", "MLFLOW_", "AWS_", "HF_")
LARGE = 512
"""Hidden size of a model whose weights are uploaded in two parts."""


@contextmanager
def world(root: Path, scenes: Sequence[type[Scene]]) -> Iterator[None]:
    """What the scenes need: models below ``root/inputs``, servers, and an environment without anything of the user's."""
    plain = {name: None for name in os.environ if name.startswith(_OURS)}
    quiet = {
        "OTA_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "2", "COLUMNS": "200",
        "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    }  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(environment({**plain, **quiet}))
        if any(issubclass(one, Served) for one in scenes):
            from tasks.local.s3_server import running_server

            stack.enter_context(running_server(root / "s3", buckets=(BUCKET.removeprefix("s3://"),)))
        if any(issubclass(one, Run) for one in scenes):
            stack.enter_context(environment({API: stack.enter_context(_prefect(root / "prefect"))}))
        if not (root / "inputs").is_dir():
            _write_inputs(root)
        yield


@contextmanager
def _prefect(home: Path) -> Iterator[str]:
    """The address of a Prefect server that keeps its runs in the folder."""
    home.mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    env = os.environ | {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    with open(home / "server.log", "ab") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def answers() -> bool:
        assert process.poll() is None, (home / "server.log").read_text()[-2000:]
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=5):
            return True
        return False

    try:
        wait_until(answers, (home / "server.log").read_text, seconds=400)
        yield f"http://127.0.0.1:{port}/api"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _write_inputs(root: Path) -> None:
    """The models, one of them with a file that goes to S3 in parts, and a merged model."""
    from tests.flows.merge_fixture import write_experts
    from tests.tiny_models import write_tiny_llama
    from tests.tiny_suite import write_tiny_suite

    write_experts(root / "inputs")
    write_tiny_llama(root / "inputs" / "large", hidden=LARGE)
    write_tiny_suite(root / "inputs" / "suite")
    scene = Model(root)
    scene.folder.mkdir(parents=True)
    scene.make()
    ended = run(scene.words, scene.folder, root / "model.log")
    assert ended.code == 0, (root / "model.log").read_text()


class Model(Merge):
    """The merged model of the other scenes."""

    name = "model"
