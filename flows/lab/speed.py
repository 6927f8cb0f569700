"""The benchmark, in its order: build models of one size, measure every case beside the floor, remove the models, go on."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from ota_core.artifact import write_text_atomic
from ota_core.compute.stream import Progress, pick_device
from ota_core.errors import OtaError
from ota_core.moments.compression import passes
from ota_core.plan.inputs import resolve_local
from ota_core.plan.plan import open_plan
from ota_core.recipe.recipe import load_recipe
from tasks.local.speed.cases import FLOW_STAGES, MERGES, Case, cases_of, chosen
from tasks.local.speed.machine import machine
from tasks.local.speed.measure import FLOOR, FloorRound, Run, floor_of, measure_floor, run_command
from tasks.local.speed.models import Models, Shape, build, bytes_on_disk, shape_of
from tasks.local.speed.pictures import bench_chart, frame_of
from tasks.local.speed.report import report
from tasks.local.speed.results import Bench, CaseResult, Combination
from tasks.local.speed.server import QUIET, prefect_server
from tasks.merging.describe_plan import bytes_read, mask_bytes_read
from tasks.pages.pictures.picture import png

REFERENCE = (0.45, 3)
"""Billions of parameters and experts: ratios are promised for this size, seconds for any."""
# The page cache shares the memory with the merge and everything else.
CACHE_SHARE = 0.8
WARM_UP = (
    "Every case ran once before it was measured, so that inputs are in the page cache where they fit, their digests are remembered "
    "and compiled loops are cached. Each run is a process of its own; its imports count in the wall time, not in the stage's."
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure: every size with every number of experts."""

    sizes: tuple[float, ...]
    """Billions of parameters."""
    experts: tuple[int, ...]
    runs: int
    out: Path
    keep: bool
    device: str
    stages: tuple[str, ...] | None
    """Names of cases; None for all."""
    flow: bool
    mergekit: bool


def run_bench(options: Options, progress: Progress) -> Iterator[Any]:
    """Measure, and say what was found: tables at the end. Raises OtaError before anything is built.

    progress: told the combination, the runs done and the runs in all.
    """
    shapes, names = _checked(options)
    device = pick_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    _check_space(options, shapes, names)
    measured: list[Combination] = []
    with _workplace(options) as work, ExitStack() as stack:
        prefect = {"temp": {**QUIET, "PREFECT_HOME": str(options.out / "prefect-temp")}}
        if any(name in names for name in FLOW_STAGES if name.endswith("server")):
            prefect["server"] = stack.enter_context(prefect_server(options.out / "prefect-server"))
        for size, shape in shapes.items():
            folder = options.out / "models" / f"{size:g}B"
            yield f"building {size:g} B × {max(options.experts)} experts in {folder}"
            started = time.perf_counter()
            models = build(folder, shape, max(options.experts))
            built = time.perf_counter() - started
            for count in options.experts:
                cases = cases_of(names, models, count, work, device=device, prefect=prefect, promised=(size, count) == REFERENCE)
                tell = partial(progress, f"{size:g} B × {count} experts")
                found, rounds = _measure(cases, models, count, options.runs, work, tell)
                measured.append(
                    Combination(
                        billions=size,
                        parameters=shape.parameters,
                        experts=count,
                        build_seconds=built,
                        cases=found,
                        floor_rounds=rounds,
                    )
                )
                bench = Bench(machine=machine(device), floor_definition=FLOOR, notes=[WARM_UP], combinations=measured)
                # After every combination: what was measured survives an interruption.
                write_text_atomic(options.out / "bench.json", bench.model_dump_json(indent=1) + "\n")
            if not options.keep:
                shutil.rmtree(folder)
    yield from report(bench)
    raw = f"raw runs: {options.out / 'bench.json'}"
    if frame_of(bench).empty:  # no case among these is drawn
        yield raw
        return
    (options.out / "bench.png").write_bytes(png(bench_chart(bench)))
    yield f"{raw}; picture: {options.out / 'bench.png'}"


def _checked(options: Options) -> tuple[dict[float, Shape], list[str]]:
    """Billions of parameters to the model of that size, and the names of the cases. Raises OtaError for options that cannot be."""
    problems = []
    if not options.sizes or not options.experts:
        problems.append("sizes and experts: at least one of each is expected")
    problems += [f"experts: got {count}, expected at least 2" for count in options.experts if count < 2]
    if options.runs < 1:
        problems.append("runs: at least one is expected")
    if problems:
        raise OtaError("; ".join(problems))
    shapes = {size: shape_of(size) for size in options.sizes}
    return shapes, chosen(options.stages, flow=options.flow, mergekit=options.mergekit)


def _check_space(options: Options, shapes: Mapping[float, Shape], names: Sequence[str]) -> None:
    """Raise OtaError, with every size that the disk has no room for. One size lies there at a time, or all of them with ``keep``."""
    free, most, kept = psutil.disk_usage(str(options.out)).free, max(options.experts), 0
    short = []
    for size, shape in shapes.items():
        kept = bytes_on_disk(shape, most) + (kept if options.keep else 0)
        # One output at a time; the homes of two flows and of the staged run with merged model and masks.
        shards = 4 * sum(name in ("moments-zero3", "moments-fsdp") for name in names)
        need = kept + int(shape.parameters * (8 + shards + 3 * most / 8))
        short += [f"{size:g} B × {most}: {need / 1e9:.1f} GB"] if need > free else []
    if short:
        raise OtaError(
            f"{options.out} has {free / 1e9:.1f} GB free; needed are {', '.join(short)}. Make room, choose another folder with --out, "
            "smaller --sizes or fewer --experts" + (", or leave out --keep" if options.keep else "")
        )


@contextmanager
def _workplace(options: Options) -> Iterator[Path]:
    """An empty folder for recipes, outputs and homes, removed at the end."""
    work = options.out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _measure(
    cases: list[Case], models: Models, count: int, runs: int, work: Path, tell: Callable[[int, int], None]
) -> tuple[list[CaseResult], list[FloorRound]]:
    """Every case once to warm up, then in turns: the floor, each case once, and so on, the floor last."""
    able = [case for case in cases if not case.skipped]
    outputs: dict[str, int] = {}
    total = (1 + runs) * len(able)
    tell(0, total)
    for done, case in enumerate(able, 1):
        _run(case, work)
        tell(done, total)
        outputs[case.name] = case.output_bytes()
        _tidy(case, cases)
    against = [case for case in able if case.inputs]
    files = sorted({file for case in against for file in case.inputs})
    written = _alike({outputs[case.name] for case in against})
    sizes = sorted(set(written.values()))
    rounds: list[FloorRound] = []
    found: dict[str, list[Run]] = {case.name: [] for case in able}
    for turn in range(1, runs + 1):
        rounds.append(measure_floor(files, sizes, work))
        for done, case in enumerate(able, 1 + turn * len(able)):
            found[case.name].append(_run(case, work))
            tell(done, total)
            _tidy(case, cases)
    rounds.append(measure_floor(files, sizes, work))

    read = sum(file.stat().st_size for file in files)
    cached = read <= CACHE_SHARE * psutil.virtual_memory().total
    staged = [sum(run.stage_seconds.values()) for run in found.get("staged", [])]
    one_file = [sum(run.stage_seconds.values()) for run in found.get("moments-one", [])]
    results = [
        CaseResult(
            name=case.name, what=case.what, parameters=models.shape.parameters, experts=count, command=case.command,
            input_bytes=sum(file.stat().st_size for file in case.inputs), output_bytes=outputs.get(case.name, 0),
            planned_read_bytes=_planned(case), in_page_cache=cached, runs=found.get(case.name, []), target=case.target, skipped=case.skipped,
            floor=floor_of(rounds, case.inputs, written[outputs[case.name]]) if case in against else None,
            stages_sum=median(staged) if staged and case.name.startswith("flow-fresh") else None,
            one_file_seconds=median(one_file) if one_file and case.name in ("moments-zero3", "moments-fsdp") else None,
        )
        for case in cases
    ]  # fmt: skip
    return results, rounds


def _alike(sizes: set[int]) -> dict[int, int]:
    """Each size to the one that the floor writes for it: the largest within 1 %, so that models that differ by a card share one floor."""
    return {size: max(other for other in sizes if other <= 1.01 * size) for size in sizes}


def _run(case: Case, work: Path) -> Run:
    case.clear()
    return run_command(case.command, logs=work / "logs" / case.name, environment=case.environment)


def _tidy(case: Case, cases: list[Case]) -> None:
    """Remove the output, unless the next case of the flow finds its cache there."""
    follows = case.name.replace("fresh", "cached")
    if follows == case.name or follows not in {other.name for other in cases}:
        case.clear()


def _planned(case: Case) -> int | None:
    """Tensor bytes read in all passes, by the accounting of ``ota plan``."""
    if case.name.startswith("compress"):
        large = (1 << 10, 1 << 10)  # small tensors, which rank_k stores whole, are a thousandth of a model
        return passes(large, case.name.partition("-")[2] or "rank1") * sum(file.stat().st_size for file in case.inputs)
    if case.recipe is None or case.name not in {"mask", *MERGES}:
        return None
    recipe = load_recipe(case.recipe)
    with open_plan(recipe, resolve_local(recipe)) as plan:
        return mask_bytes_read(plan) if case.name == "mask" else bytes_read(plan)
