"""The benchmark for the eye: tables of at most 120 columns, and what was found about memory."""

from typing import Any

from rich import box
from rich.table import Table

from tasks.local.speed.cases import MEMORY_TARGET, MERGES
from tasks.local.speed.results import Bench, CaseResult, Combination

WIDTH = 120


def report(bench: Bench) -> list[Any]:
    """Everything to print, for rich."""
    lines: list[Any] = [f"machine: {bench.machine.line()}", bench.floor_definition, *(f"note: {note}" for note in bench.notes)]
    for combination in bench.combinations:
        lines += ["", stages_table(combination)]
        if any(one.runs and not one.floor for one in combination.cases):
            lines += ["", commands_table(combination)]
        lines += [f"{one.name}: skipped, {one.skipped}" for one in combination.cases if one.skipped]
    return [*lines, "", *findings(bench)]


def stages_table(combination: Combination) -> Table:
    """One size with one number of experts: what is compared with the floor."""
    cached = all(one.in_page_cache for one in combination.cases)
    title = (
        f"{combination.billions:g} B parameters ({combination.parameters:,}) × {combination.experts} experts"
        + ("" if cached else ": inputs not in the page cache")
        + f"; models built in {combination.build_seconds:.0f} s"
    )
    result = _table(title)
    for header in (
        "wall s\n(min–max)", "CPU\ns", "stage\ns", "peak\nMiB", "read GB\nplanned", "wrote\nGB", "floor s, read\n+write+fsync",
        "wall ÷\nfloor", "stage ÷ floor\n(no fsync)",
    ):  # fmt: skip
        result.add_column(header, justify="right", no_wrap=True)
    result.add_column("target\non wall", no_wrap=True)
    for one in combination.cases:
        if one.runs and one.floor:
            floor = "+".join(f"{part:.2f}" for part in (one.floor.read, one.floor.write, one.floor.fsync))
            result.add_row(
                one.name, _wall(one), _short(one.cpu_seconds), _short(one.stage_seconds), _mib(one), _gb(one.planned_read_bytes),
                _gb(one.output_bytes), floor, _short(one.command_ratio), _stage_ratio(one), _verdict(one),
            )  # fmt: skip
    return result


def commands_table(combination: Combination) -> Table:
    """The flow, and what else is measured in seconds."""
    result = _table("the flow and the shell")
    for header in ("wall s\n(min–max)", "CPU\ns", "peak\nMiB", "stages alone\ns", "more than these\ns"):
        result.add_column(header, justify="right", no_wrap=True)
    result.add_column("target", no_wrap=True)
    for one in combination.cases:
        if one.runs and not one.floor:
            over = _short(one.overhead_seconds)
            result.add_row(one.name, _wall(one), _short(one.cpu_seconds), _mib(one), _short(one.stages_sum), over, _verdict(one))
    return result


def _table(title: str) -> Table:
    result = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), width=WIDTH, show_edge=False)
    result.add_column("case", no_wrap=True)
    return result


def _wall(one: CaseResult) -> str:
    walls = [run.seconds for run in one.runs]
    return _short(one.seconds) + (f" ({_short(min(walls))}–{_short(max(walls))})" if len(walls) > 1 else "")


def _short(value: float | None) -> str:
    """Three digits or so."""
    return "" if value is None else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def _mib(one: CaseResult) -> str:
    return "" if one.peak_bytes is None else f"{one.peak_bytes / 2**20:.0f}"


def _gb(size: int | None) -> str:
    return "" if size is None else _short(size / 1e9)


def _stage_ratio(one: CaseResult) -> str:
    if one.stage_ratio is None:
        return ""
    return f"{_short(one.stage_ratio)} ({_short(one.stage_ratio_without_fsync)})"


def _verdict(one: CaseResult) -> str:
    if one.target is None or one.met is None:
        return ""
    unit = {"ratio": "", "seconds": " s", "overhead": " s more"}[one.target.kind]
    return f"≤{one.target.limit:g}{unit} " + ("[green]met[/]" if one.met else "[red]miss[/]")


def findings(bench: Bench) -> list[str]:
    """Memory against its target, over all combinations; what compressions leave; what a GPU reaches."""
    merges = [
        one
        for c in bench.combinations
        for one in c.cases
        if one.runs and (one.name in {"mask", *MERGES} or one.name.startswith("compress"))
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
    copies = bench.machine.gpu_copies
    for one in merges if copies else ():
        if one.planned_read_bytes and one.stage_seconds:
            rate = one.planned_read_bytes / one.stage_seconds / 1e9
            found.append(
                f"{one.name}: {rate:.1f} GB/s of tensors through the stage; plain copies: {copies['to']:.1f} GB/s to the GPU, "
                f"{copies['from']:.1f} from it, {copies['on']:.0f} on it"
            )
    return found
