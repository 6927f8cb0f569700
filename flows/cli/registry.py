"""The commands on the registered model: who is champion, making another one champion, and going back."""

import getpass
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.common import Home, TrackingUri
from tasks.tracking.names import REGISTERED_MODEL

Name = Annotated[str, typer.Option(help="Registered model in MLflow.")]
Publish = Annotated[
    str | None,
    typer.Option(metavar="ROOT", help="Also copy it to ROOT/<name>/<version> (a folder or s3://…) and point latest.json to it."),
]


def promote(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Its number, or 'challenger'.", show_default=False)],
    reason: Annotated[str, typer.Option(help="Why, for the version's tags and the history.")] = "promoted by hand",
    publish: Publish = None,
    tracking_uri: TrackingUri = None,
    home: Home = None,
    name: Name = REGISTERED_MODEL,
) -> None:
    """Make VERSION of the registered model the champion, whatever the gate said."""
    from tasks.registry import promotion
    from tasks.tracking.registered import CHALLENGER

    where = _registry(tracking_uri, home, name)
    if version == CHALLENGER:
        found = promotion.current(CHALLENGER, **where)
        if found is None:
            raise promotion.PromotionError(
                f"{name!r} has no challenger; name the version by its number (ota champion shows them)"
            )
        version = found.version
    _report(promotion.promote(version, by=_user(), reason=reason, **where), publish, tracking_uri, home, name)


def rollback(
    to: Annotated[
        str | None, typer.Option(metavar="VERSION", help="An earlier champion.", show_default="the one replaced last")
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for the version's tags and the history.")] = "rolled back by hand",
    publish: Publish = None,
    tracking_uri: TrackingUri = None,
    home: Home = None,
    name: Name = REGISTERED_MODEL,
) -> None:
    """Make the version champion again that the champion replaced. Every call goes one promotion further back, as far as weights were kept:

    ``ota gc`` keeps those of the champion's predecessor, and of what was used within its days.
    """
    from tasks.registry import promotion

    where = _registry(tracking_uri, home, name)
    _report(promotion.rollback(by=_user(), reason=reason, to=to, **where), publish, tracking_uri, home, name)


def champion(tracking_uri: TrackingUri = None, home: Home = None, name: Name = REGISTERED_MODEL) -> None:
    """Show the champion, the challenger, and the history of promotions and rollbacks."""
    from tasks.registry import promotion
    from tasks.tracking.registered import CHALLENGER, CHAMPION

    where = _registry(tracking_uri, home, name)
    for alias in (CHAMPION, CHALLENGER):
        for line in _described(alias, promotion.current(alias, **where)):
            typer.echo(line)
    moves = promotion.history(**where)
    typer.echo("history:" if moves else "history: none")
    for move in moves:
        typer.echo(f"  {move.at[:19]}Z  {move.action:<8}  {move.from_version or '–'} → {move.to}  {move.by}: {move.reason}")


def _registry(tracking_uri: str | None, home: Path | None, name: str) -> dict[str, Any]:
    """Which registered model, as ``tasks.registry.promotion`` takes it."""
    from tasks.settings import places

    return {"tracking_uri": tracking_uri, "root": places(home).tracking, "name": name}


def _described(alias: str, version: Any) -> Iterator[str]:
    if version is None:
        yield f"{alias}: none"
        return
    yield f"{alias}: version {version.version} of {version.name}"
    yield f"  weights {version.source_uri}"
    yield f"  digest  {version.digest}"
    yield f"  run     {version.run_id or 'none'}"
    if reason := version.tags.get("gate/reason"):
        yield f"  gate    {version.tags.get('gate/decision', '')}: {reason}"


def _report(done: Any, publish: str | None, tracking_uri: str | None, home: Path | None, name: str) -> None:
    """Say what became champion, and publish it where that is asked for."""
    from tasks.registry.publish import publish_champion
    from tasks.settings import places

    number = done.champion.version
    replaced = f"in place of version {done.replaced}" if done.replaced else "the first one"
    typer.echo(
        f"champion: version {number} of {name}, {replaced}" if done.moved else f"champion: version {number} of {name}, as before"
    )
    if publish:
        where = places(home)
        latest = publish_champion(publish, cache=where.cache, tracking_uri=tracking_uri, tracking=where.tracking, name=name)
        typer.echo(f"published: {latest.uri}, latest.json points to it")


def _user() -> str:
    """Who runs this, by the system's name for them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"user {os.getuid()}"
