"""``ota gc``: what may be deleted, as tables or JSON, and its deletion."""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.common import Artifacts, Home, TrackingUri, progress_bars
from ota_core.errors import OtaError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ota_core.artifact import Kind
    from tasks.registry.retention.plan import Item, Outcome, Plan
    from tasks.registry.retention.retention import Retention

ROWS = 40
_USUAL = ("unreferenced", "unused")


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

    where = places(home, artifacts)
    tracking = Tracking(tracking_uri=tracking_uri, root=where.tracking)
    rule = Retention(ArtifactStore(where.artifacts, where.cache), tracking, days, _kinds(kinds))
    plan = rule.plan()
    local = plan_cache(where.cache, rule.since) if cache else None
    if not as_json:
        _show(_lines(plan, local, rule, everything))
    done = emptied = None
    if delete:
        with progress_bars() as progress:
            done = rule.collect(plan, progress)
            emptied = collect_cache(local, lambda _, count, total: progress("cache", count, total)) if local else None
    if as_json:
        facts = {"tracking": tracking.shown, "days": days, "notes": list(plan.notes), **_facts(plan, done)}
        facts |= {"versions_without_weights": done.versions, "unfinished_uploads": done.uploads} if done else {}
        facts |= {"cache": _facts(local, emptied)} if local else {}
        typer.echo(json.dumps(facts))
    else:
        _show(_result([plan, *([local] if local else [])], [done, emptied]))


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


def _lines(plan: "Plan", cache: "Plan | None", rule: "Retention", everything: bool) -> Iterable["RenderableType"]:
    from rich.text import Text

    yield Text(f"Artifacts in {plan.root}, kept by MLflow at {rule.tracking.shown}", style="dim")
    if plan.going:
        yield _table(plan, rule.now, everything)
    if plan.kept:
        yield _kept(plan)
    for note in plan.notes:
        yield Text.assemble(("Note: ", "yellow"), note)
    if cache is not None:
        yield Text(f"Cache in {cache.root}", style="dim")
        if cache.going:
            yield _table(cache, rule.now, everything)


def _table(plan: "Plan", now: datetime, everything: bool) -> "RenderableType":
    """One row per thing. Only what it is takes a second line where the terminal is narrow."""
    rows = plan.listed
    shown = rows if everything else rows[:ROWS]
    cells = [
        [
            one.stored.kind,
            one.stored.name.lstrip(".")[:8],
            _what(one),
            age_text(now - one.stored.used),
            size_text(one.stored.size),
        ]
        for one in shown
    ]
    if len(rows) > len(shown):
        rest = sum(item.stored.size for item in rows[len(shown) :])
        cells.append(["…", "", f"{len(rows) - len(shown):,} smaller ones (--all lists them)", "", size_text(rest)])
    total = ["", "", f"{len(rows):,} in all, which frees", "", size_text(plan.frees)]
    return _drawn("May go", ["kind", "id", "what", "unused", "size"], [*cells, total], numbers={3, 4})


def _what(item: "Item") -> str:
    """What it is, and why it may go where that is not the usual reason."""
    if item.why in _USUAL:
        return item.what
    return f"{item.what} ({item.why})" if item.what else item.why


def _kept(plan: "Plan") -> "RenderableType":
    kept: dict[str, list[int]] = defaultdict(list)
    for item in plan.kept:
        kept[item.why].append(item.stored.size)
    every = sorted(kept.items(), key=lambda item: -sum(item[1]))
    rows = [[why, f"{len(sizes):,}", size_text(sum(sizes))] for why, sizes in every]
    total = ["in all", f"{sum(map(len, kept.values())):,}", size_text(sum(map(sum, kept.values())))]
    return _drawn("Kept", ["why", "artifacts", "size"], [*rows, total], numbers={1, 2})


def _drawn(title: str, header: list[str], rows: list[list[str]], *, numbers: set[int]) -> "RenderableType":
    """A table that ends with its sum."""
    from tasks.pages.tables import Cells
    from tasks.pages.terminal import draw

    return draw(Cells(header, rows, frozenset(numbers), breaks=frozenset({len(rows) - 2})), title=title)


def _result(plans: Sequence["Plan"], outcomes: Sequence["Outcome | None"]) -> Iterable["RenderableType"]:
    from rich.text import Text

    going, done = sum(len(plan.going) for plan in plans), [outcome for outcome in outcomes if outcome]
    if not going:
        yield "Nothing to delete."
    elif not done:
        yield f"Nothing was deleted. The same with --delete frees {size_text(sum(plan.frees for plan in plans))}."
    else:
        yield f"Deleted {sum(len(one.deleted) for one in done):,} of {going:,}, {size_text(sum(one.frees for one in done))}."
        versions = ", ".join(number for one in done for number in one.versions)
        if versions:
            yield Text(f"Without weights now, and tagged so in MLflow: versions {versions} of the registered model.")
        spared = ", ".join(f"{item.stored.kind} {item.stored.name[:8]}" for one in done for item in one.spared)
        if spared:
            yield Text(f"In use since they were listed, and left: {spared}.")
    if uploads := sum(one.uploads for one in done):
        yield f"Ended {uploads:,} uploads to S3 that were never finished."


def _facts(plan: "Plan", done: "Outcome | None") -> dict[str, Any]:
    """For JSON."""
    facts: dict[str, Any] = {
        "root": plan.root, "frees": plan.frees, "going": [item.facts() for item in plan.going], "kept": [item.facts() for item in plan.kept],
    }  # fmt: skip
    if done is not None:
        facts |= {"deleted": [item.stored.uri for item in done.deleted], "spared": [item.stored.uri for item in done.spared]}
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
