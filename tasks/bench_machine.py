"""What a benchmark ran on."""

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

_PACKAGES = ("ota-merging", "torch", "numba", "numpy", "safetensors", "prefect", "mlflow", "mergekit")


class Machine(BaseModel):
    """Hardware and versions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: str
    cpu: str
    cores: int
    """That this process may use."""
    memory_bytes: int
    kernel: str
    python: str
    versions: dict[str, str]
    gpu: str | None = None

    def line(self) -> str:
        """One line for people."""
        shown = ", ".join(f"{name} {self.versions[name]}" for name in ("torch", "numba", "prefect") if name in self.versions)
        gpu = f", {self.gpu}" if self.gpu else ""
        return f"{self.cpu}, {self.cores} cores{gpu}, {self.memory_bytes / 2**30:.1f} GiB memory, {self.kernel}, Python {self.python}, {shown}, {self.date}"


def machine(*, gpu: str | None = None) -> Machine:
    """This machine, now."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Machine(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=_cpu(),
        cores=len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=versions,
        gpu=gpu,
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()
