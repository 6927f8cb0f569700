"""``ota gc``: what may be deleted, as tables or JSON, and its deletion."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.common import Artifacts, Home, TrackingUri, progress_bars, user_errors
from ota_core.errors import OtaError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ota_core.artifact import Kind
    from tasks.registry.retention.cache import CacheOutcome, CachePlan
    from tasks.registry.retention.retention import Outcome, Plan

ROWS = 40
_USUAL = "unreferenced"


def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Delete what is listed. Without it nothing is changed.")] = False,
    days: Annotated[
        int,
        typer.Option(
            help="Keep what was made within so many days or found in a local folder, and what MLflow's runs of that time refer to: "
            "reading an artifact from S3 leaves no trace there."
        ),
    ] = 14,
    kinds: Annotated[
        str | None,
        typer.Option(help="Only these kinds, with commas between them.", show_default="all but checkpoint and data"),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Also what was downloaded to this machine and not used for so long.")
    ] = False,
    home: Home = None,
    artifacts: Artifacts = None,
    tracking_uri: TrackingUri = None,
    everything: Annotated[bool, typer.Option("--all", help=f"List every row, not the {ROWS} largest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one line of JSON.")] = False,
) -> None:
    """List the artifacts that no champion, challenger or recent run refers to, with their sizes; --delete removes them.

    What a champion, a challenger, any other alias, the champion's predecessor or a recent run in MLflow refers to stays, with the moments,
    masks and scores that belong to it. All that goes can be computed, or fetched, again.
    """
    from tasks.artifacts.store import ArtifactStore
    from tasks.registry.retention.cache import collect_cache, plan_cache
    from tasks.registry.retention.references import Tracking
    from tasks.registry.retention.retention import Retention
    from tasks.settings import places

    with user_errors():
        where = places(home, artifacts)
        tracking = Tracking(tracking_uri=tracking_uri, root=where.tracking)
        rule = Retention(ArtifactStore(where.artifacts, where.cache), tracking, days, _kinds(kinds))
        plan = rule.plan()
        local = plan_cache(where.cache, rule.since) if cache else None
        if not as_json:
            _show(_lines(plan, local, everything))
        done: Outcome | None = None
        emptied: CacheOutcome | None = None
        if delete:
            with progress_bars() as progress:
                done = rule.collect(plan, progress)
                emptied = collect_cache(local, lambda _, count, total: progress("cache", count, total)) if local else None
        if as_json:
            typer.echo(json.dumps(_as_json(plan, local, done, emptied)))
            return
        _show(_result(plan, local, done, emptied))


def _kinds(text: str | None) -> frozenset["Kind"]:
    from tasks.registry.retention.listing import KINDS
    from tasks.registry.retention.retention import DEFAULT_KINDS

    if text is None:
        return DEFAULT_KINDS
    asked = {part.strip() for part in text.split(",")}
    unknown = sorted(asked - set(KINDS))
    if unknown:
        raise OtaError(f"--kinds: got '{', '.join(unknown)}', expected some of {', '.join(KINDS)}")
    return frozenset(kind for kind in KINDS if kind in asked)


def _show(items: Iterable["RenderableType"]) -> None:
    from rich.console import Console

    console = Console()
    for item in items:
        console.print(item)


def _lines(plan: "Plan", cache: "CachePlan | None", everything: bool) -> Iterable["RenderableType"]:
    from rich.text import Text

    yield Text(f"Artifacts in {plan.root}, kept by MLflow at {plan.tracking}", style="dim")
    rows = [(item.facts(), item.stored.used) for item in plan.going]
    if rows:
        yield _table("May go", rows, plan.frees, plan.now, everything)
    kept: dict[str, list[int]] = defaultdict(list)
    for item in plan.kept:
        kept[item.why].append(item.stored.size)
    if kept:
        yield _kept(kept)
    for note in plan.notes:
        yield Text.assemble(("Note: ", "yellow"), note)
    if cache is not None:
        yield Text(f"Cache in {cache.cache}", style="dim")
        if cache.going:
            yield _table("May go", [(one.facts(), one.used) for one in cache.listed], cache.frees, plan.now, everything)


def _table(
    title: str, rows: Sequence[tuple[dict[str, Any], datetime]], frees: int, now: datetime, everything: bool
) -> "RenderableType":
    """One row per thing. Only what it is takes a second line where the terminal is narrow."""
    shown = rows if everything else rows[:ROWS]
    cells = [
        [facts["kind"], facts["name"].lstrip(".")[:8], _what(facts), age_text(now - used), size_text(facts["bytes"])]
        for facts, used in shown
    ]
    if len(rows) > len(shown):
        rest = sum(facts["bytes"] for facts, _ in rows[len(shown) :])
        cells.append(["…", "", f"{len(rows) - len(shown):,} smaller ones (--all lists them)", "", size_text(rest)])
    total = ["", "", f"{len(rows):,} in all, which frees", "", size_text(frees)]
    return _drawn(title, ["kind", "id", "what", "unused", "size"], [*cells, total], numbers={3, 4})


def _what(facts: dict[str, Any]) -> str:
    """What it is, and why it may go where that is not the usual reason."""
    if facts.get("why", _USUAL) == _USUAL:
        return str(facts["what"])
    return f"{facts['what']} ({facts['why']})" if facts["what"] else str(facts["why"])


def _kept(kept: dict[str, list[int]]) -> "RenderableType":
    every = sorted(kept.items(), key=lambda item: -sum(item[1]))
    rows = [[why, f"{len(sizes):,}", size_text(sum(sizes))] for why, sizes in every]
    total = ["in all", f"{sum(map(len, kept.values())):,}", size_text(sum(map(sum, kept.values())))]
    return _drawn("Kept", ["why", "artifacts", "size"], [*rows, total], numbers={1, 2})


def _drawn(title: str, header: list[str], rows: list[list[str]], *, numbers: set[int]) -> "RenderableType":
    """A table that ends with its sum."""
    from tasks.pages.tables import Cells
    from tasks.pages.terminal import draw

    return draw(Cells(header, rows, frozenset(numbers), breaks=frozenset({len(rows) - 2})), title=title)


def _result(
    plan: "Plan", cache: "CachePlan | None", done: "Outcome | None", emptied: "CacheOutcome | None"
) -> Iterable["RenderableType"]:
    from rich.text import Text

    going = len(plan.going) + (len(cache.going) if cache else 0)
    if not going:
        yield "Nothing to delete."
        return
    if done is None:
        yield f"Nothing was deleted. The same with --delete frees {size_text(plan.frees + (cache.frees if cache else 0))}."
        return
    frees, count = done.frees, len(done.deleted)
    spared: list[str] = [f"{item.stored.kind} {item.stored.name[:8]}" for item in done.spared]
    if emptied is not None:
        frees, count = frees + emptied.frees, count + len(emptied.deleted)
        spared += [f"{one.kind} {one.path.name[:8]}" for one in emptied.spared]
    yield f"Deleted {count:,} of {going:,}, {size_text(frees)}."
    if done.versions:
        yield Text(f"Without weights now, and tagged so in MLflow: versions {', '.join(done.versions)} of the registered model.")
    if spared:
        yield Text(f"In use since they were listed, and left: {', '.join(spared)}.")


def _as_json(plan: "Plan", cache: "CachePlan | None", done: "Outcome | None", emptied: "CacheOutcome | None") -> dict[str, Any]:
    facts: dict[str, Any] = {
        "root": plan.root, "tracking": plan.tracking, "days": plan.days, "frees": plan.frees, "notes": list(plan.notes),
        "going": [item.facts() for item in plan.going], "kept": [item.facts() for item in plan.kept],
    }  # fmt: skip
    if cache is not None:
        facts["cache"] = {
            "root": str(cache.cache), "frees": cache.frees, "going": [one.facts() for one in cache.going],
            "kept": [one.facts() for one in cache.kept],
        }  # fmt: skip
    if done is not None:
        facts["deleted"] = [item.stored.uri for item in done.deleted]
        facts["spared"] = [item.stored.uri for item in done.spared]
        facts["versions_without_weights"] = done.versions
    if emptied is not None:
        facts["cache"] |= {
            "deleted": [str(one.path) for one in emptied.deleted],
            "spared": [str(one.path) for one in emptied.spared],
        }
    return facts


def size_text(count: int) -> str:
    """Bytes as a person reads them, in powers of 1024."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def age_text(age: Any) -> str:
    """A time span in its largest unit."""
    hours = max(0, int(age.total_seconds() // 3600))
    return f"{hours // 24} d" if hours >= 48 else f"{hours} h"
