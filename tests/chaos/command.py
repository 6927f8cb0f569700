"""The command behind ``make chaos``."""

import logging
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.common import progress_bars, show
from tasks.pages.tables import Cells
from tasks.pages.terminal import draw
from tests.chaos.process import preload
from tests.chaos.scene import Scene
from tests.chaos.scenes import SCENES, world
from tests.chaos.trial import Stage, Trial, keep

MISSED = 5
"""A moment that comes after the end of a run that was quicker than the one that was timed is no kill; at most so many times the kills are tried."""


def chaos(
    kills: Annotated[int, typer.Option(help="Kills at random moments, over all commands.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 1,
    only: Annotated[str | None, typer.Option(help="Only these commands, with commas between them.")] = None,
    points: Annotated[bool, typer.Option(help="Also die before and after every named commit point.")] = True,
    named: Annotated[
        str, typer.Option(help="Only the points whose names begin so, with commas between them.", show_default="all")
    ] = "",
    calls: Annotated[int, typer.Option(min=1, help="At so many calls of each point: the last one, and the first ones.")] = 3,
    at: Annotated[
        str | None, typer.Option(help="Only these moments, as a table of failures names them, with commas; with one --only.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Begin no kill later.", show_default="no limit")] = math.inf,
    folder: Annotated[Path | None, typer.Option(help="Where to work, a new folder.", show_default="a temporary one")] = None,
) -> None:
    """Kill commands, run them again, and compare what is there with what an unkilled run leaves. Exit code 1 where one was not survived."""
    chosen = _chosen(only)
    place = (folder or Path(tempfile.mkdtemp(prefix="ota-chaos-"))).absolute()
    place.mkdir(parents=True, exist_ok=True)
    preload(sorted({module for one in chosen for module in one.preload}))
    trials: list[Trial] = []
    began, cells = time.monotonic(), []
    with ExitStack() as stack:
        stack.enter_context(world(place, chosen))
        shares, progress = sum(one.share for one in chosen), stack.enter_context(progress_bars())
        for kind in chosen:
            stage = Stage.of(kind(place))
            number = round(kills * kind.share / shares)
            wished = _wished(at) if at else list(stage.named(calls, _wished(named))) if points else []
            wanted = wished if at else [*_moments(stage, seed, number), *wished]
            found = []
            in_time = takewhile(lambda _: time.monotonic() - began < 60 * minutes, wanted)
            for trial in _tried(stage, in_time, number, everything=bool(at)):
                found.append(trial)
                progress(kind.name, sum(one.killed for one in found), max(len(wished) + (0 if at else number), len(found)))
            trials += found
            cells.append(_row(kind.name, stage.seconds, found))
            typer.echo("  ".join(cells[-1]))
    failed = [one for one in trials if one.problems]
    killed = [one for one in trials if one.killed]
    total = _row("in all", time.monotonic() - began, trials)
    typer.echo("")
    header = ["command", "seconds", "random kills", "survived", "named points", "survived"]
    show(draw(Cells(header, [*cells, total], frozenset(range(1, 6)), breaks=frozenset({len(cells) - 1}))))
    for one in failed:
        typer.echo(f"NOT SURVIVED  --only '{one.scene}' --at '{one.moment}'")
        for problem in one.problems:
            typer.echo(f"    {problem}")
    survived = sum(not one.problems for one in killed)
    typer.echo(f"make chaos: {len(killed)} kills, {survived} survived")
    if folder is None and not failed:
        shutil.rmtree(place, ignore_errors=True)
    elif failed:
        typer.echo(f"what the failed trials left: {place}")
    if failed:
        raise typer.Exit(1)


def _chosen(only: str | None) -> list[type[Scene]]:
    if only is None:
        return list(SCENES.values())
    names = [name.strip() for name in only.split(",")]
    unknown = sorted(set(names) - set(SCENES))
    if unknown:
        raise typer.BadParameter(f"--only: got {', '.join(unknown)}, expected some of {', '.join(SCENES)}")
    return [SCENES[name] for name in names]


def _wished(text: str) -> list[str]:
    return [one.strip() for one in text.split(",")]


def _moments(stage: Stage, seed: int, number: int) -> Iterator[str]:
    moments = stage.random(seed)
    yield from (next(moments) for _ in range(MISSED * number))


def _tried(stage: Stage, moments: Iterable[str], number: int, *, everything: bool) -> Iterator[Trial]:
    """As many kills at random moments as asked for, and every named point."""
    random, failures = 0, 0
    for moment in moments:
        is_random = not moment.startswith(("before", "after"))
        if is_random and random >= number and not everything:
            continue
        trial = stage.trial(moment)
        if trial.problems:
            failures += 1
            kept = keep(stage.scene, failures)
            typer.echo(f"{trial.scene}: {moment}: {trial.problems[0]} ({kept})", err=True)
        random += is_random and trial.killed
        yield trial


def _row(name: str, seconds: float, trials: Sequence[Trial]) -> list[str]:
    random = [one for one in trials if one.killed and not one.moment.startswith(("before", "after"))]
    named = [one for one in trials if one.killed and one.moment.startswith(("before", "after"))]
    numbers = [len(random), sum(not one.problems for one in random), len(named), sum(not one.problems for one in named)]
    return [name, f"{seconds:.1f}", *map(str, numbers)]


def main() -> None:
    """Runs the command."""
    logging.basicConfig(level=logging.WARNING)
    typer.run(chaos)
