"""What the local stack consists of and where it lies: folders, ports, addresses, workers, credentials."""

import hashlib
import os
import re
import tempfile
from pathlib import Path

import psutil
from pydantic import Field

from ota_core.artifact import write_text_atomic
from ota_core.errors import OtaError
from ota_core.frozen import Frozen
from tasks.local.loopback import HOST, free_ports, taken
from tasks.local.s3_command import PORTS, client_environment
from tasks.settings import home_folder

ROOT = Path(__file__).resolve().parents[3]
"""The repository: deployments and templates lie beside the packages."""
DEMO_BUCKET, BUCKET = "ota-demo", "ota"
CPU_POOL, GPU_POOL = "ota-cpu", "ota-gpu"
SERVERS = ("s3", "mlflow", "prefect")
CPU_RUNS = 4
"""Flow runs at a time on the CPU worker: most of the time they wait for the GPU worker."""
SOCKET_BYTES = 100
"""A Unix socket's path has room for 104 bytes on macOS, 108 on Linux."""


class StackError(OtaError):
    """The local stack cannot be started, stopped or reached."""


class Ports(Frozen):
    """Where the servers listen, on loopback only."""

    prefect: int = Field(default=4200, ge=1, le=65535)
    mlflow: int = Field(default=5000, ge=1, le=65535)
    s3: tuple[int, ...] = Field(default=(8334, 8335, 8336, 8337, 8338, 8339, 8333, 8340), min_length=PORTS, max_length=PORTS)
    """As ``tasks.local.s3_command`` orders them; the gateway is the last but one."""

    @property
    def gateway(self) -> int:
        return self.s3[-2]

    def all(self) -> dict[int, str]:
        """Every port with the option that moves it."""
        return {self.prefect: "--prefect-port", self.mlflow: "--mlflow-port"} | dict.fromkeys(self.s3, "--s3-port")


def choose_ports(*, prefect: int | None, mlflow: int | None, s3: int | None) -> Ports:
    """The default ports but for those given. SeaweedFS takes eight, from the gateway's on. Raises StackError."""
    for option, port, room in (("--prefect-port", prefect, 1), ("--mlflow-port", mlflow, 1), ("--s3-port", s3, PORTS)):
        if port is not None and not 1 <= port <= 65536 - room:
            raise StackError(f"{option}: got {port}, expected a number from 1 to {65536 - room}")
    first = s3 or Ports().gateway
    inner = list(range(first + 1, first + PORTS))
    chosen = Ports(prefect=prefect or 4200, mlflow=mlflow or 5000, s3=(*inner[:-1], first, inner[-1]))
    if len(chosen.all()) < PORTS + 2:
        raise StackError(
            f"the ports overlap: Prefect {chosen.prefect}, MLflow {chosen.mlflow}, S3 {first} to {first + PORTS - 1}; choose others"
        )
    return chosen


def unused_ports(last: Ports | None) -> Ports:
    """The ports of the last run where they are free, since caches and links know objects by their address; else any free ones."""
    if last is not None and not taken(last.all()):
        return last
    prefect, mlflow, *s3 = free_ports(PORTS + 2)
    return Ports(prefect=prefect, mlflow=mlflow, s3=tuple(s3))


def check_ports(ports: Ports) -> None:
    """Raise StackError that names every port in use, who holds it where the system tells, and the option that moves it."""
    moved_by = ports.all()
    held: dict[tuple[str, str], list[int]] = {}
    for port in sorted(taken(moved_by)):
        held.setdefault((_holder(port), moved_by[port]), []).append(port)
    if held:
        lines = [f"  {', '.join(map(str, busy))}{holder}; move it with {option}" for (holder, option), busy in held.items()]
        raise StackError(
            "ports that the stack needs are in use:\n"
            + "\n".join(lines)
            + "\nstop what uses them, choose others, or let --free-ports choose; nothing was started"
        )


def _holder(port: int) -> str:
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
                return f": held by {psutil.Process(one.pid).name()} (pid {one.pid})"
    except psutil.Error:
        pass  # macOS tells this to root only
    return ""


class Worker(Frozen):
    """One Prefect worker and the GPU it sees: "" for none, None where nothing is to be set."""

    name: str
    pool: str
    limit: int
    gpu: str | None


def plan_workers(gpus: tuple[str, ...]) -> tuple[Worker, ...]:
    """A CPU worker and a GPU worker per GPU; without a GPU one that computes on the CPU."""
    cpu = Worker(name="worker-cpu", pool=CPU_POOL, limit=CPU_RUNS, gpu="" if gpus else None)
    if len(gpus) <= 1:
        return cpu, Worker(name="worker-gpu", pool=GPU_POOL, limit=1, gpu=gpus[0] if gpus else None)
    return cpu, *(Worker(name=f"worker-gpu{i}", pool=GPU_POOL, limit=1, gpu=gpu) for i, gpu in enumerate(gpus))


def visible_gpus() -> tuple[str, ...]:
    """Names of the GPUs that torch sees, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    count = torch.cuda.device_count()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in listed.split(",")] if listed else [str(i) for i in range(count)]
    return tuple(names[:count])


class Stack(Frozen):
    """One stack, as ``stack.json`` keeps it."""

    home: Path
    ports: Ports
    workers: tuple[Worker, ...]
    access_key: str
    """Tells whether a later call speaks with the credentials that the S3 server was started with. Not a secret."""

    @property
    def folder(self) -> Path:
        return folder_of(self.home)

    @property
    def names(self) -> tuple[str, ...]:
        """Every process, in the order of their start."""
        return (*SERVERS, *(worker.name for worker in self.workers))

    @property
    def urls(self) -> dict[str, str]:
        ports = {"s3": self.ports.gateway, "mlflow": self.ports.mlflow, "prefect": self.ports.prefect}
        return {name: f"http://{HOST}:{port}" for name, port in ports.items()}

    @property
    def api(self) -> str:
        return f"{self.urls['prefect']}/api"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def worker_home(self, name: str) -> Path:
        """Each worker has its own caches and results, as on a machine of its own; they share S3, Prefect and MLflow."""
        return self.folder / name

    def client_environment(self, secret_key: str) -> dict[str, str]:
        """What a process needs to use the stack's servers and to keep its artifacts in the stack's S3."""
        around = [part for part in (os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or "").split(",") if part]
        direct = ",".join(dict.fromkeys([*around, HOST, "localhost"]))
        return {
            **client_environment(self.ports.s3, access_key=self.access_key, secret_key=secret_key),
            "PREFECT_API_URL": self.api,
            "MLFLOW_TRACKING_URI": self.urls["mlflow"],
            "OTA_ARTIFACTS": f"s3://{BUCKET}/artifacts",
            "NO_PROXY": direct,
            "no_proxy": direct,
        }

    def save(self) -> None:
        write_text_atomic(self.folder / "stack.json", self.model_dump_json(indent=1) + "\n")


def folder_of(home: Path) -> Path:
    """Everything of the stack lies here."""
    return home / "stack"


def home_of(home: Path | None) -> Path:
    """The argument, else OTA_HOME, else ``~/.ota``. Raises StackError on a path that supervisord's configuration cannot hold."""
    found = home_folder(home)
    if re.search(r"\s[;#]|[%\n\r]", str(found)):
        raise StackError(
            f"{str(found)!r} cannot hold the stack: supervisord's configuration takes '%', ' ;' and ' #' for its own; "
            "choose another home"
        )
    return found


def load_stack(home: Path) -> Stack | None:
    """The stack that was last started in this home, None where there was none. Raises StackError when its note is damaged."""
    file = folder_of(home) / "stack.json"
    try:
        return Stack.model_validate_json(file.read_text(encoding="utf-8")).model_copy(update={"home": home})
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StackError(f"{file} cannot be read ({error}); stop what runs with `ota stack down`, then remove it") from None


def socket_of(home: Path) -> Path:
    """Where supervisord listens: in the stack's folder, or in the temporary folder where that path is too long for a socket."""
    path = folder_of(home) / "supervisor.sock"
    if len(os.fsencode(path)) <= SOCKET_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"ota-stack-{digest}.sock"
