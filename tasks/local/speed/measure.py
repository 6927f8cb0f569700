"""Measures commands in processes of their own, and the floor that every merge is compared with."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import Field

from ota_core.errors import OtaError
from ota_core.frozen import Frozen
from tasks.artifacts.processes import tail

ROOT = Path(__file__).resolve().parents[3]
CHUNK = 8 * 2**20
FLOOR = (
    "The floor: every input file of the case read once with plain read() calls into one buffer of 8 MiB, by one thread, then a file "
    "of the output's size written to the same disk and flushed with fsync. Measured in the same run before, between and after the "
    "cases; the median of all counts. Inputs were read before, by the warm-up."
)
# A benchmark must not depend on where the user's own runs go.
_OURS = ("PREFECT", "MLFLOW", "OTA_", "AWS_")


class Run(Frozen):
    """What one run of a command cost, as the system counts it. With its children, where it starts any."""

    seconds: float
    """From the start of the process to its end: interpreter and imports count."""
    user_seconds: float
    system_seconds: float
    peak_bytes: int
    """Largest resident size of one process, pages of mapped files included."""
    stage_seconds: dict[str, float] = Field(default_factory=dict)
    """What the command says of itself: the work without interpreter, imports and looking up inputs."""
    bytes_per_param: float | None = None
    sqrt_error: float | None = None
    """Of a compression: what it leaves of a parameter's 4 bytes, and the relative error of √v."""


class FloorRound(Frozen):
    """One measurement of the disk and the page cache."""

    read_seconds: dict[str, float]
    """By file."""
    write_seconds: dict[int, float]
    """By size in bytes."""
    fsync_seconds: dict[int, float]


class Floor(Frozen):
    """The floor of one case, in seconds: medians over the rounds."""

    read: float
    write: float
    fsync: float

    @property
    def total(self) -> float:
        return self.read + self.write + self.fsync


def run_command(command: Sequence[str], *, logs: Path, environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end. ``logs``: a folder for ``out.txt``, ``err.txt`` and ``cost.json``.

    Of what it prints the last line counts, where that is a JSON object with ``seconds`` by stage. Raises OtaError, with the end
    of its messages, when it fails.
    """
    logs.mkdir(parents=True, exist_ok=True)
    cost = logs / "cost.json"
    cost.unlink(missing_ok=True)
    with open(logs / "out.txt", "wb") as out, open(logs / "err.txt", "wb") as err:
        launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("child.py")), str(cost)]
        done = subprocess.run(
            [*launcher, *command], stdout=out, stderr=err, env=child_environment(environment or {}), check=False
        )
    if done.returncode or not cost.is_file():
        raise OtaError(f"{' '.join(command)} ended with code {done.returncode}; {tail(logs / 'err.txt')}")
    said = _said(logs / "out.txt")
    facts = {key: said[key] for key in ("bytes_per_param", "sqrt_error") if key in said}
    return Run(**json.loads(cost.read_text()), stage_seconds=dict(said.get("seconds", {})), **facts)


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what steers Prefect, MLflow, S3 and this tool; the packages of this folder are found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
    path = os.pathsep.join([str(ROOT), *([kept["PYTHONPATH"]] if "PYTHONPATH" in kept else [])])
    return {**kept, "PYTHONPATH": path, "DO_NOT_TRACK": "1", **more}


def _said(out: Path) -> dict[str, Any]:
    """The object that the command's last line holds; empty where it holds none."""
    lines = out.read_text(errors="replace").splitlines()
    try:
        said = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def measure_floor(files: Sequence[Path], sizes: Sequence[int], scratch: Path) -> FloorRound:
    """Read every file once, write and flush a file of every size in the folder ``scratch``; the files are removed."""
    buffer = bytearray(CHUNK)
    reading = {str(file): _read(file, buffer) for file in files}
    written = {size: _write(scratch / "floor.bin", size, buffer) for size in sizes}
    return FloorRound(
        read_seconds=reading,
        write_seconds={size: write for size, (write, _) in written.items()},
        fsync_seconds={size: fsync for size, (_, fsync) in written.items()},
    )


def floor_of(rounds: Sequence[FloorRound], files: Sequence[Path], size: int) -> Floor:
    """The floor of a case that reads these files and writes so many bytes: the medians of the rounds' sums."""
    return Floor(
        read=median(sum(one.read_seconds[str(file)] for file in files) for one in rounds),
        write=median(one.write_seconds[size] for one in rounds),
        fsync=median(one.fsync_seconds[size] for one in rounds),
    )


def _read(path: Path, buffer: bytearray) -> float:
    started = time.perf_counter()
    with open(path, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    return time.perf_counter() - started


def _write(path: Path, size: int, buffer: bytearray) -> tuple[float, float]:
    """Seconds of writing and of flushing. What is written is what was read last: no zeros that a file system could leave out."""
    view, left = memoryview(buffer), size
    started = time.perf_counter()
    with open(path, "wb", buffering=0) as stream:
        while left:
            left -= stream.write(view[: min(left, len(view))])
        written = time.perf_counter()
        os.fsync(stream.fileno())
        flushed = time.perf_counter()
    path.unlink()
    return written - started, flushed - written
