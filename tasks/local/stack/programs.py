"""The stack's processes: their commands, their environments, and the supervisord configuration that keeps them running."""

import base64
import hashlib
import json
import os
import shlex
import sys
from pathlib import Path

from ota_core.artifact import write_text_atomic
from tasks.local.loopback import HOST
from tasks.local.s3_command import WEED_SETTINGS, find_weed, weed_command
from tasks.local.stack.layout import CPU_POOL, ROOT, SERVERS, Stack, Worker, socket_of
from tasks.settings import ROOTS

OURS = "OTA_STACK"
"""Environment variable that marks every process of a stack, and what those start, with the stack's folder."""
NAME = "OTA_STACK_PROCESS"
"""Marks them with the name of the process."""
FOREIGN = ("AWS_", "MLFLOW_", "OTA_", "PREFECT_", "WEED_")
"""What a stack takes from nobody's environment."""
HEARTBEAT_SECONDS = 30
"""Prefect's least: flow runs tell the server so often that they live."""
QUIET = {"DO_NOT_TRACK": "1", "NO_COLOR": "1", "PYTHONUNBUFFERED": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def programs(stack: Stack) -> dict[str, dict[str, object]]:
    """Process name to its ``command`` and what it adds to the environment, ``env``. Neither holds a secret."""
    folder, python = stack.folder, sys.executable
    listen = ["--host", HOST, "--port"]
    mlflow = [python, "-m", "mlflow", "server", *listen, str(stack.ports.mlflow), "--workers", "1"]
    mlflow += ["--backend-store-uri", f"sqlite:///{folder}/mlflow/mlflow.db"]
    mlflow += ["--artifacts-destination", str(folder / "mlflow" / "artifacts")]
    prefect = [python, "-m", "prefect", "server", "start", *listen, str(stack.ports.prefect)]
    found: dict[str, dict[str, object]] = {
        "s3": {
            "command": weed_command(find_weed(), folder / "s3", stack.ports.s3),
            "env": WEED_SETTINGS,
        },
        # What runs MLflow's background jobs (evaluations by language models) is more processes that nothing here uses.
        "mlflow": {"command": mlflow, "env": {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}},
        "prefect": {"command": prefect, "env": prefect_environment(stack)},
    }
    return found | {worker.name: _worker(stack, worker) for worker in stack.workers}


def prefect_environment(stack: Stack) -> dict[str, str]:
    """Settings of the Prefect server. Leases in files let a concurrency limit outlive a restart of the server."""
    return {
        "PREFECT_HOME": str(stack.folder / "prefect"),
        # The pages would look for the API on port 4200 else: `prefect server start --port` does not tell them.
        "PREFECT_SERVER_UI_API_URL": stack.api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }


def _worker(stack: Stack, worker: Worker) -> dict[str, object]:
    home = stack.worker_home(worker.name)
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", worker.pool, "--name", worker.name]
    inherited = inherited_environment(stack, "")
    env = {
        **{key: value for key, value in stack.client_environment("").items() if key not in inherited},
        "OTA_HOME": str(home),
        "OTA_WORK_POOL": worker.pool,
        "OTA_NIGHTLY": os.environ.get("OTA_NIGHTLY") or str(ROOT / "deployments" / "nightly.yaml"),
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    if allowed := os.environ.get(ROOTS):
        env[ROOTS] = allowed
    if worker.pool == CPU_POOL:
        env["OTA_GPU_DEPLOYMENT"] = "stage/gpu"
    if worker.gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = worker.gpu
    return {"command": [*command, "--limit", str(worker.limit)], "env": env}


def write_programs(stack: Stack) -> None:
    """Write ``programs.json`` and ``supervisord.conf``, and make the folders that they name."""
    folders = ["logs", "s3", "prefect", "mlflow/artifacts", *(f"{worker.name}/prefect" for worker in stack.workers)]
    for name in folders:
        (stack.folder / name).mkdir(parents=True, exist_ok=True)
    stack.folder.chmod(0o700)
    write_text_atomic(programs_file(stack.folder), json.dumps(programs(stack), indent=1) + "\n")
    write_text_atomic(config_file(stack.folder), config(stack))


def programs_file(folder: Path) -> Path:
    return folder / "programs.json"


def config_file(folder: Path) -> Path:
    return folder / "supervisord.conf"


def config(stack: Stack) -> str:
    """supervisord's configuration. Every process is started through ``tasks.local.stack.exec``, which reads ``programs.json``."""
    folder, socket = stack.folder, socket_of(stack.home)
    lines = [
        "; Written by `ota stack up`; changes are lost.",
        "[supervisord]", f"logfile = {folder}/logs/supervisord.log", "logfile_maxbytes = 10MB", "logfile_backups = 3",
        f"pidfile = {folder}/supervisord.pid", f"directory = {folder}", "umask = 077", "identifier = ota-stack", "",
        "[unix_http_server]", f"file = {socket}", "chmod = 0700", "",
        "[rpcinterface:supervisor]", "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface", "",
        "[supervisorctl]", f"serverurl = unix://{socket}", "",
    ]  # fmt: skip
    for name in stack.names:
        is_server = name in SERVERS
        lines += [
            f"[program:{name}]",
            f"command = {shlex.quote(sys.executable)} -m tasks.local.stack.exec {name}",
            # Ended in the opposite order: workers first, so that nothing misses its server.
            f"priority = {10 if is_server else 20}",
            # Workers wait for their pools and deployments.
            f"autostart = {'true' if is_server else 'false'}",
            "autorestart = true", "startsecs = 5", "startretries = 3",
            "stopasgroup = true", "killasgroup = true",
            # weed takes half a minute to obey SIGTERM. Its files are written through: nothing acknowledged is lost by SIGKILL.
            f"stopwaitsecs = {1 if name == 's3' else 15}",
            "redirect_stderr = true", f"stdout_logfile = {stack.log(name)}", "stdout_logfile_maxbytes = 10MB", "stdout_logfile_backups = 3",
            "",
        ]  # fmt: skip
    return "\n".join(lines)


def supervisor_environment(stack: Stack, secret_key: str) -> dict[str, str]:
    """supervisord's environment: the caller's, but for what would change servers or workers, and what every process inherits."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return kept | inherited_environment(stack, secret_key)


def inherited_environment(stack: Stack, secret_key: str) -> dict[str, str]:
    """What every process of the stack has in its environment. Secrets are passed on here, never through a file."""
    path = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    client = stack.client_environment(secret_key)
    passed = {name: client[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "NO_PROXY", "no_proxy")}
    passed["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"] = webhook_key(secret_key)
    return QUIET | passed | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path)), OURS: str(stack.folder)}


def webhook_key(secret_key: str) -> str:
    """What MLflow encrypts the secrets of webhooks with, a Fernet key. Made from the stack's own secret, so that it outlives a restart."""
    return base64.urlsafe_b64encode(hashlib.sha256(b"mlflow webhooks\n" + secret_key.encode()).digest()).decode()
