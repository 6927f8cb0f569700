"""A real ``mlflow server`` on loopback, and a merge to log; shared by the tests of the tracking files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks.tracking.merge import ChildRun, InputRef, MergeRun

CAPABILITIES = ("math", "code")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def mlflow_server(folder: Path, *, seconds: float = 240) -> Iterator[str]:
    """The address of a server whose database and artifacts lie in the folder. On leaving, its whole process group is stopped."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts")]
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True, env=_plain_environment())
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, folder / "server.log", seconds)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def _plain_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | {"MLFLOW_DISABLE_TELEMETRY": "true"}


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"mlflow server did not come up within {seconds} s:\n{log.read_text()[-2000:]}")


def a_merge(name: str = "ota", **changes: Any) -> MergeRun:
    """A merge of two experts with made-up scores."""
    scores = {"base": (0.2, 0.1), "math-expert": (0.9, 0.1), "code-expert": (0.2, 0.8), name: (0.6, 0.5)}
    roles = {"base": "base", "math-expert": "expert", "code-expert": "expert", name: "merge"}
    own = {"math-expert": "math", "code-expert": "code"}
    children = [
        ChildRun(
            name=model,
            role=roles[model],
            capability=own.get(model),
            digest=f"digest-{model}",
            metrics={f"score/{c}": s for c, s in zip(CAPABILITIES, values, strict=True)} | {"score/avg": sum(values) / 2},
        )
        for model, values in scores.items()
    ]
    table = [
        {"model": m, "role": roles[m], "capability": own.get(m), "math": v[0], "code": v[1], "average": sum(v) / 2}
        for m, v in scores.items()
    ]
    values: dict[str, Any] = {
        "name": name,
        "method": "ota",
        "params": {
            "density": 0.4,
            "power": 0.5,
            "compression": "rank1",
            "base_model": "s3://models/base",
            "experts": "math, code",
        },
        "tags": {"recipe_fingerprint": f"fp-{name}", "prefect_flow_run_id": "flow-1", "git_commit": "abc123"},
        "metrics": {"score/math": 0.6, "score/code": 0.5, "score/avg": 0.55, "retention/math": 0.6 / 0.9, "negative_transfer": 0},
        "recipe_yaml": "merge_method: ota\n",
        "record": {"kind": "merged", "files": {"model.safetensors": 12}},
        "model_uri": f"s3://models/merged/{name}",
        "model_digest": f"digest-{name}",
        "model_card": "# A merge\n",
        "inputs": [
            InputRef(name="base", source="s3://models/base", digest="b" * 64, role="base"),
            InputRef(name="math-expert", source="/data/experts/math", digest="m" * 64, role="expert"),
            InputRef(name="code-expert", source="org/code@main", digest="c" * 64, role="expert"),
        ],
        "children": children,
        "table": table,
        "pictures": {"plots/scores.png": b"\x89PNG of the scores"},
    }
    return MergeRun(**(values | changes))
