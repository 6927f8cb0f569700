"""What a benchmark ran on."""

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from pydantic import Field

from ota_core.frozen import Frozen

_PACKAGES = ("ota-merging", "torch", "numba", "numpy", "safetensors", "prefect", "mlflow", "mergekit")


class Machine(Frozen):
    """Hardware and versions."""

    date: str
    cpu: str
    cores: int
    """That this process may use."""
    memory_bytes: int
    kernel: str
    python: str
    versions: dict[str, str]
    gpu: str | None = None
    gpu_copies: dict[str, float] = Field(default_factory=dict)
    """GB/s of plain copies: to the GPU and from it through pinned memory, and on the GPU (bytes read and written)."""

    def line(self) -> str:
        """One line for people."""
        shown = ", ".join(f"{name} {self.versions[name]}" for name in ("torch", "numba", "prefect") if name in self.versions)
        gpu = f", {self.gpu}" if self.gpu else ""
        return f"{self.cpu}, {self.cores} cores{gpu}, {self.memory_bytes / 2**30:.1f} GiB memory, {self.kernel}, Python {self.python}, {shown}, {self.date}"


def machine(device: str = "cpu") -> Machine:
    """This machine, now, and its GPU where the device is one."""
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
        **(_gpu(device) if device.startswith("cuda") else {}),
    )


COPY_BYTES, COPIES = 256 * 2**20, 5


def _gpu(device: str) -> dict[str, Any]:
    """The GPU's name and what it copies: the medians of a few copies, each timed by the GPU's own events."""
    import torch

    here = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there, other = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))

    def rate(target: torch.Tensor, source: torch.Tensor, moved: int) -> float:
        seconds: list[float] = []
        for _ in range(1 + COPIES):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source, non_blocking=True)
            stop.record()
            torch.cuda.synchronize(device)
            seconds.append(start.elapsed_time(stop) / 1e3)
        return moved / median(seconds[1:]) / 1e9

    copies = {
        "to": rate(there, here, COPY_BYTES),
        "from": rate(here, there, COPY_BYTES),
        "on": rate(other, there, 2 * COPY_BYTES),
    }
    return {"gpu": str(torch.cuda.get_device_name(device)), "gpu_copies": copies}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()
