"""Whether a process of the stack does its work, asked over HTTP as a client would ask."""

import json
from datetime import datetime
from typing import Any

from tasks.local.loopback import get
from tasks.local.s3_command import is_serving
from tasks.local.stack.layout import Stack, Worker


def problem_of(stack: Stack, name: str, started: float) -> str | None:
    """None when it does, else what is missing. ``started``: when the process began, in seconds since 1970."""
    if name == "s3":
        return None if is_serving(stack.ports.s3) else "no answer"
    if name == "mlflow":
        return None if get(f"{stack.urls['mlflow']}/health") is not None else "no answer"
    if name == "prefect":
        return None if get(f"{stack.api}/health") is not None else "no answer"
    return _problem_of_worker(stack, next(worker for worker in stack.workers if worker.name == name), started)


def _problem_of_worker(stack: Stack, worker: Worker, started: float) -> str | None:
    """A worker is online when the server has heard of it since its process began; a predecessor's last word does not count."""
    answer = get(f"{stack.api}/work_pools/{worker.pool}/workers/filter", body=b"{}")
    if answer is None:
        return "unknown to Prefect"
    seen = next((one for one in json.loads(answer) if one["name"] == worker.name), None)
    if seen is None:
        return "not online yet"
    if seen["status"] != "ONLINE" or _seconds(seen) < started:
        return "offline"
    return None


def _seconds(worker: dict[str, Any]) -> float:
    heard = worker["last_heartbeat_time"]
    return datetime.fromisoformat(heard.replace("Z", "+00:00")).timestamp() if heard else 0.0
