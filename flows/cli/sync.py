"""The command ``ota sync``: what MLflow could not be told."""

import typer

from flows.cli.common import Home, TrackingUri


def sync(home: Home = None, tracking_uri: TrackingUri = None) -> None:
    """Send MLflow what earlier runs could not log, because it was away or they were killed. Sending twice changes nothing."""
    from ota_core.errors import OtaError, raise_all
    from tasks.settings import places
    from tasks.tracking.outbox import FOLDER
    from tasks.tracking.outbox import sync as send

    where, problems, sent = places(home), [], 0
    for unsent, found in send(where.home, where.tracking, tracking_uri):
        if isinstance(found, OtaError):
            problems.append(f"{unsent.what.kind} {unsent.what.name!r}: {found}")
            continue
        sent += 1
        typer.echo(f"logged {unsent.what.kind} {unsent.what.name!r}: MLflow run {found.url or found.run_id}")
    raise_all(problems)
    if not sent:
        typer.echo(f"nothing waits in {where.home / FOLDER}")
