"""CPU, memory and GPU of the machine while a stage runs, for MLflow's page of system metrics.

Stages run before the merge has a run in MLflow, and maybe on other machines. So a stage is sampled where it is computed, and what was
seen lies in its artifact's record, with times and host; whoever logs the merge takes it from there. A stage that was found in the cache
was not computed, and has nothing to tell. Names and units are those of MLflow's own monitor.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from ota_core.frozen import Frozen

INTERVAL = 1.0
"""Seconds between two samples, at first."""
MOST_POINTS = 60
"""Points that are kept of a stage: beyond, pairs become their mean, and the interval doubles."""
SWITCH = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"
"""MLflow's own switch: ``false`` turns the sampling off."""

Values = dict[str, float]
Point = tuple[float, Values]


class SystemPoint(Frozen):
    """The state of one machine at one time."""

    time: float
    """Seconds since 1970."""
    host: str
    values: dict[str, float]
    """``cpu_utilization_percentage`` and so on."""


class Sampler:
    """What the ``sampled`` stage's machine was doing."""

    def __init__(self) -> None:
        self._points: list[Point] = []
        self._interval = INTERVAL
        self._over = threading.Event()

    def run(self) -> None:
        """Sample until ``stop``; the last sample is taken at the end."""
        with _gpus() as gpus:
            psutil.cpu_percent()  # tells what was since the last call
            while not self._over.wait(self._interval):
                self._take(gpus)
            self._take(gpus)

    def stop(self) -> None:
        self._over.set()

    def _take(self, gpus: Sequence[Any]) -> None:
        memory = psutil.virtual_memory()
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
        }
        for i, gpu in enumerate(gpus):
            values |= _gpu_values(i, gpu)
        self._points.append((time.time(), values))
        if len(self._points) > MOST_POINTS:
            self._points = thinned(self._points)
            self._interval *= 2

    def series(self) -> dict[str, Any]:
        """For a record: the host, the times (seconds since 1970) and per metric its values; numbers rounded to a decimal."""
        points = list(self._points)
        names = sorted({name for _, values in points for name in values})
        # A GPU may fail to answer once: only what every point has is a series.
        whole = [name for name in names if all(name in values for _, values in points)]
        return {
            "host": platform.node(),
            "time": [round(at, 3) for at, _ in points],
            "values": {name: [round(values[name], 1) for _, values in points] for name in whole},
        }


def thinned(points: Sequence[Point]) -> list[Point]:
    """Each two neighbours as one: the later time, the mean of the values. A last one without a neighbour stays."""
    pairs = [points[i : i + 2] for i in range(0, len(points), 2)]
    return [
        (pair[-1][0], {name: sum(values[name] for _, values in pair) / len(pair)
                       for name in pair[-1][1] if all(name in values for _, values in pair)})
        for pair in pairs
    ]  # fmt: skip


@contextmanager
def sampled() -> Iterator[Sampler | None]:
    """Samples this machine while the block runs; None when it is switched off."""
    if os.environ.get(SWITCH, "").lower() in {"false", "0"}:
        yield None
        return
    sampler = Sampler()
    thread = threading.Thread(target=sampler.run, name="system-metrics", daemon=True)
    thread.start()
    try:
        yield sampler
    finally:
        sampler.stop()
        thread.join()


def points_of(provenance: Mapping[str, Any], since: float = 0.0) -> list[SystemPoint]:
    """What a record's provenance tells of the machine from a time on (seconds since 1970); nothing for records without it."""
    held = provenance.get("system")
    if not held:
        return []
    return [
        SystemPoint(time=at, host=held["host"], values={name: values[i] for name, values in held["values"].items()})
        for i, at in enumerate(held["time"])
        if at >= since
    ]


@contextmanager
def _gpus() -> Iterator[Sequence[Any]]:
    """NVIDIA's handles; none without a GPU, its driver or the package nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        yield []
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield []
        return
    try:
        yield [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _gpu_values(number: int, handle: Any) -> Values:
    import pynvml

    values: Values = {}
    with suppress(pynvml.NVMLError):
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        values[f"gpu_{number}_memory_usage_megabytes"] = memory.used / 1e6
        values[f"gpu_{number}_memory_usage_percentage"] = memory.used / memory.total * 100
    with suppress(pynvml.NVMLError):
        values[f"gpu_{number}_utilization_percentage"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    with suppress(pynvml.NVMLError):
        values[f"gpu_{number}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(handle) / 1000
    return values
