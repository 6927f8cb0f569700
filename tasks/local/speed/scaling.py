"""The paper exercise of docs/scaling.md: what merges of large models take on named hardware, from what the benchmark measured.

`python -m tasks.local.speed.scaling .ota/bench/bench.json` prints the tables. Nothing here was measured at these sizes: work grows with
parameters × experts (the benchmark shows that), bytes are counted, and the slowest of disk, network and processors sets the time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ota_core.compute.stream import BLOCK_ELEMENTS, MAX_THREADS
from ota_core.errors import OtaError
from ota_core.plan.plan import bytes_per_element
from tasks.local.speed.results import Bench, CaseResult

EXPERTS = 5
WIDTHS = {8: 4096, 70: 8192, 405: 16384}
"""Billions of parameters → hidden width of Llama 3.1 of that size, which decides how small rank1 is."""
WEIGHT_BYTES, MOMENT_BYTES = 2, 4  # bfloat16, float32


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Where a merge would run. Rates in GB/s, of the whole machine or of all machines together, as sustained reads and writes."""

    name: str
    cores: int
    read: float
    write: float
    source: str
    """What the reads come through."""
    hosts: int = 1
    """Machines that share out the shards."""

    @property
    def threads(self) -> int:
        """That compute, on all machines: a merge takes at most ``MAX_THREADS`` by default."""
        return self.hosts * min(MAX_THREADS, self.cores // self.hosts)


HARDWARE = (
    Hardware(name="workstation: 16 cores, one PCIe 4 NVMe drive", cores=16, read=6.0, write=4.0, source="disk"),
    Hardware(name="AWS i4i.32xlarge: 64 cores, 8 NVMe drives", cores=64, read=20.0, write=10.0, source="disk"),
    Hardware(
        name="8 × AWS c7i.8xlarge: 16 cores and 12.5 Gbit/s each, from and to S3",
        cores=128, read=8 * 1.4, write=8 * 1.4, source="network", hosts=8,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Constants:
    """Measured: core-seconds for an element of an expert, and resident bytes of a merge on the machine of the benchmark."""

    merge: float
    ranking: float
    compress: float
    resident: int
    threads: int

    @classmethod
    def of(cls, bench: Bench) -> "Constants":
        """From the combination with the most runs that holds what is needed. Raises OtaError when there is none."""
        for combination in sorted(bench.combinations, key=lambda one: -max(len(case.runs) for case in one.cases)):
            cases = {one.name: one for one in combination.cases if one.in_page_cache}
            seconds = {name: _stage(cases.get(name)) for name in ("ota-threshold", "ota-density", "compress")}
            peak = cases["ota-density"].peak_bytes if "ota-density" in cases else None
            if peak and all(seconds.values()):
                work, cores = combination.parameters * combination.experts / bench.machine.cores, bench.machine.cores
                merge, density, compress = (value or 0.0 for value in seconds.values())
                return cls(
                    merge / work, (density - merge) / work, compress * cores / combination.parameters, peak, bench.machine.cores
                )
        raise OtaError(
            "the benchmark holds no combination in the page cache with ota-threshold, ota-density and compress; run them"
        )


def _stage(case: CaseResult | None) -> float | None:
    return case.stage_seconds if case is not None else None


@dataclass(frozen=True)
class Pass:
    """One pass over the inputs."""

    what: str
    read: float
    written: float
    core_seconds: float


def passes(parameters: float, constants: Constants, *, compressed: bool, rounds: int = 1) -> list[Pass]:
    """The passes of OTA with an exact global density over ``EXPERTS`` experts. Bytes of the data; the base is read once a pass.

    compressed: rank1 second moments. v is then read once, an expert at a time, and never again. rounds: 1 where a sample of the scores
    comes first, 2 where shards are surveyed on several machines.
    """
    work = parameters * EXPERTS
    weights = WEIGHT_BYTES * parameters * (1 + EXPERTS)
    moments = 0.0 if compressed else MOMENT_BYTES * work
    found = [Pass("compress", MOMENT_BYTES * work, 0.0, constants.compress * work)] if compressed else []
    return [
        *found,
        Pass("thresholds", rounds * (weights + moments), 0.0, rounds * constants.ranking * work),
        Pass("merge", weights + moments, WEIGHT_BYTES * parameters, constants.merge * work),
    ]


def time_of(step: Pass, hardware: Hardware) -> tuple[float, str]:
    """Seconds of a pass, and what they are spent on: reading, computing and writing overlap, the slowest counts."""
    limits = {
        hardware.source: step.read / 1e9 / hardware.read,
        "writing": step.written / 1e9 / hardware.write,
        "processors": step.core_seconds / hardware.threads,
    }
    slowest = max(limits, key=lambda name: limits[name])
    return limits[slowest], slowest


def resident(constants: Constants, hardware: Hardware, billions: int, *, compressed: bool) -> float:
    """Bytes on each machine: what was measured, the blocks of its further threads, the factors of rank1."""
    more = max(0, hardware.threads // hardware.hosts - constants.threads)
    factors = EXPERTS * billions * 1e9 * MOMENT_BYTES * 2 / WIDTHS[billions] if compressed else 0.0
    return constants.resident + more * BLOCK_ELEMENTS * bytes_per_element(EXPERTS) + factors


def tables(bench: Bench) -> Iterator[str]:
    """Markdown, line by line."""
    constants = Constants.of(bench)
    yield f"Measured on {bench.machine.line()}:"
    yield f"for one element of one expert {1e9 * constants.merge:.2f} core-nanoseconds to merge, {1e9 * constants.ranking:.2f} to rank,"
    yield f"{1e9 * constants.compress:.2f} to compress (rank1); {constants.resident / 2**30:.2f} GiB resident."
    for compressed in (False, True):
        yield ""
        yield f"**{'rank1' if compressed else 'Full'} second moments, {EXPERTS} experts, exact global density**"
        yield ""
        yield "| parameters | hardware | read | written | time | memory | limited by |"
        yield "|---:|---|---:|---:|---:|---:|---|"
        for billions in WIDTHS:
            for hardware in HARDWARE:
                rounds = 1 if hardware.hosts == 1 else 2
                steps = passes(billions * 1e9, constants, compressed=compressed, rounds=rounds)
                timed = [time_of(step, hardware) for step in steps]
                limits = ", ".join(f"{step.what}: {why}" for step, (_, why) in zip(steps, timed, strict=True))
                memory = f"{resident(constants, hardware, billions, compressed=compressed) / 2**30:.1f} GiB" + (
                    " each" if hardware.hosts > 1 else ""
                )
                yield (
                    f"| {billions} B | {hardware.name} | {_tb(sum(s.read for s in steps))} | {_tb(sum(s.written for s in steps))} "
                    f"| {_time(sum(seconds for seconds, _ in timed))} | {memory} | {limits} |"
                )


def _tb(size: float) -> str:
    return f"{size / 1e12:.2f} TB" if size >= 1e12 else f"{size / 1e9:.0f} GB"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def main(path: Annotated[Path, typer.Argument(metavar="BENCH_JSON", help="What `ota bench` wrote.")]) -> None:
    """Print the tables."""
    for line in tables(Bench.model_validate_json(path.read_text(encoding="utf-8"))):
        typer.echo(line)


if __name__ == "__main__":
    typer.run(main)
