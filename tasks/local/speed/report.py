"""The benchmark for the eye: tables of at most 120 columns, and what was found about memory."""

from typing import Any

import pandas as pd

from tasks.local.speed.cases import MEMORY_TARGET, MERGES
from tasks.local.speed.results import Bench, CaseResult, Combination
from tasks.pages import terminal
from tasks.pages.tables import GB, MIB, RATIO, SECONDS, Column, Table


def report(bench: Bench) -> list[Any]:
    """Everything to print, for rich."""
    lines: list[Any] = [f"machine: {bench.machine.line()}", bench.floor_definition, *(f"note: {note}" for note in bench.notes)]
    for combination in bench.combinations:
        lines += [part for one in tables(combination) for part in ("", terminal.table(one))]
        lines += [f"{one.name}: skipped, {one.skipped}" for one in combination.cases if one.skipped]
    return [*lines, "", *findings(bench)]


def tables(combination: Combination) -> list[Table]:
    """One size with one number of experts: what is compared with the floor, then the flow and what else is measured in seconds."""
    cached = all(one.in_page_cache for one in combination.cases)
    title = (
        f"{combination.billions:g} B parameters ({combination.parameters:,}) × {combination.experts} experts"
        + ("" if cached else ": inputs not in the page cache")
        + f"; models built in {combination.build_seconds:.0f} s"
    )
    frame = pd.DataFrame([_row(one) for one in combination.cases if one.runs])
    wall = Column("seconds", "wall s (min to max)", SECONDS, ends=("fastest", "slowest"), absent="")
    cpu, peak = Column("cpu_seconds", "CPU s", SECONDS, absent=""), Column("peak_bytes", "peak MiB", MIB, absent="")
    kinds = {
        title: [
            wall, cpu, Column("stage_seconds", "stage s", SECONDS, absent=""), peak, Column("planned_read_bytes", "read GB planned", GB, absent=""),
            Column("output_bytes", "wrote GB", GB), Column("floor", "floor s, read +write +fsync"), Column("command_ratio", "wall ÷ floor", RATIO),
            Column("stage_ratio", "stage ÷ floor", RATIO, absent=""), Column("stage_ratio_without_fsync", "without fsync", RATIO, absent=""),
        ],
        "the flow and the shell": [
            wall, cpu, peak, Column("stages_sum", "stages alone s", SECONDS, absent=""),
            Column("overhead_seconds", "more than these s", SECONDS, absent=""),
        ],
    }  # fmt: skip
    return [
        Table(name, part, [Column("case"), *columns, Column("target")])
        for (name, columns), against in zip(kinds.items(), (True, False), strict=True)
        if len(part := frame[(frame["floor"] != "") == against] if len(frame) else frame)
    ]


def _row(one: CaseResult) -> dict[str, Any]:
    """A case's numbers, in seconds and bytes, and its floor and target in words."""
    walls = [run.seconds for run in one.runs]
    names = (
        "seconds", "cpu_seconds", "stage_seconds", "peak_bytes", "planned_read_bytes", "output_bytes", "command_ratio", "stage_ratio",
        "stage_ratio_without_fsync", "stages_sum", "overhead_seconds",
    )  # fmt: skip
    several = {"fastest": min(walls), "slowest": max(walls)} if len(walls) > 1 else {"fastest": None, "slowest": None}
    floor = "+".join(f"{part:.2f}" for part in (one.floor.read, one.floor.write, one.floor.fsync)) if one.floor else ""
    return {"case": one.name, **{name: getattr(one, name) for name in names}, **several, "floor": floor, "target": _verdict(one)}


def _verdict(one: CaseResult) -> str:
    if one.target is None or one.met is None:
        return ""
    unit = {"ratio": "", "seconds": " s", "overhead": " s more", "against": " × one file"}[one.target.kind]
    return f"≤{one.target.limit:g}{unit} {'met' if one.met else 'miss'}"


def findings(bench: Bench) -> list[str]:
    """Memory against its target, over all combinations; what compressions leave; what a GPU reaches."""
    merges = [
        one
        for c in bench.combinations
        for one in c.cases
        if one.runs and (one.name in {"mask", *MERGES} or one.name.startswith(("compress", "moments")))
    ]
    found = []
    if merges:
        worst = max(merges, key=lambda one: one.peak_bytes or 0)
        peak = worst.peak_bytes or 0
        found.append(
            f"peak memory: at most {peak / 2**20:.0f} MiB ({worst.name}, {worst.parameters / 1e9:.2f} B × {worst.experts}); "
            f"target 1024 MiB: {'met' if peak <= MEMORY_TARGET else 'missed'}"
        )
    for one in merges:
        if one.runs[0].sqrt_error is not None:
            found.append(
                f"{one.name}: {one.runs[0].bytes_per_param:.4f} bytes per parameter, relative error of √v {one.runs[0].sqrt_error:.4f}"
            )
    for c in bench.combinations:
        for one in c.cases:
            if one.one_file_ratio is not None:
                found.append(
                    f"{one.name}: {one.stage_seconds:.2f} s of reading, {one.one_file_ratio:.2f} times that of one file "
                    f"({one.one_file_seconds:.2f} s), peak {(one.peak_bytes or 0) / 2**20:.0f} MiB"
                )
    copies = bench.machine.gpu_copies
    for one in merges if copies else ():
        if one.planned_read_bytes and one.stage_seconds:
            rate = one.planned_read_bytes / one.stage_seconds / 1e9
            found.append(
                f"{one.name}: {rate:.1f} GB/s of tensors through the stage; plain copies: {copies['to']:.1f} GB/s to the GPU, "
                f"{copies['from']:.1f} from it, {copies['on']:.0f} on it"
            )
    return found
