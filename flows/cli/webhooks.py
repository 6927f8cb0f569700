"""``ota webhook``: who is told when the champion changes."""

from typing import Annotated

import typer

from flows.cli.common import Commands, TrackingUri
from flows.cli.registry import Name
from tasks.tracking.names import REGISTERED_MODEL

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="Have the MLflow server tell an address of yours when an alias, such as champion, moves.",
)

Which = Annotated[str, typer.Argument(metavar="WEBHOOK", help="Its id or address (ota webhook list).", show_default=False)]


@app.command()
def add(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where to POST to.", show_default=False)],
    name: Name = REGISTERED_MODEL,
    tracking_uri: TrackingUri = None,
) -> None:
    """Add a webhook for the aliases, signed with the secret in OTA_WEBHOOK_SECRET. One that is there is brought up to date."""
    from tasks.registry import webhook

    made = webhook.add(url, name=name, tracking_uri=tracking_uri)
    typer.echo(f"webhook {made.id}: {made.url} is told of {', '.join(made.events)}")


@app.command(name="list")
def list_(tracking_uri: TrackingUri = None) -> None:
    """Show the server's webhooks."""
    from tasks.registry import webhook

    found = webhook.listed(tracking_uri=tracking_uri)
    for one in found:
        typer.echo(f"{one.id}  {one.status.lower()}  {one.url}  {', '.join(one.events)}  {one.name}")
    if not found:
        typer.echo("no webhook; add one with: ota webhook add URL")


@app.command()
def remove(which: Which, tracking_uri: TrackingUri = None) -> None:
    """Remove a webhook."""
    from tasks.registry import webhook

    gone = webhook.remove(which, tracking_uri=tracking_uri)
    typer.echo(f"removed: webhook {gone.id} to {gone.url}")


@app.command()
def test(which: Which, tracking_uri: TrackingUri = None) -> None:
    """Have the server send an example, and show what the receiver answered."""
    from tasks.registry import webhook

    typer.echo(webhook.send_example(which, tracking_uri=tracking_uri))
