"""``ota stack``: the local stack's commands and what they print."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.common import Commands, table_width

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    help="Prefect, MLflow, S3 and workers as processes on this machine (extra 'demo'); `deploy`: for machines of your own.",
)

Home = Annotated[
    Path | None, typer.Option(help="The stack lies in stack/ below this folder.", show_default="$OTA_HOME or ~/.ota")
]


@app.command()
def up(
    prefect_port: Annotated[int | None, typer.Option(help="Port of the Prefect server.", show_default="4200")] = None,
    mlflow_port: Annotated[int | None, typer.Option(help="Port of the MLflow server.", show_default="5000")] = None,
    s3_port: Annotated[
        int | None, typer.Option(help="Port of the S3 server, the first of eight in a row.", show_default="8333")
    ] = None,
    free_ports: Annotated[bool, typer.Option("--free-ports", help="Take any ports that are free.")] = False,
    experts: Annotated[
        str, typer.Option(help="What to train and upload: demo (minutes, once), smoke (seconds, learned nothing) or none.")
    ] = "demo",
    home: Home = None,
) -> None:
    """Start everything in the background, deploy everything, upload the demo's experts."""
    from flows import stack
    from tasks.local.stack.layout import StackError, choose_ports, home_of

    if experts not in ("demo", "smoke", "none"):
        raise StackError(f"--experts: got '{experts}', expected demo, smoke or none")
    asked = {"prefect": prefect_port, "mlflow": mlflow_port, "s3": s3_port}
    if free_ports and any(asked.values()):
        raise StackError("--free-ports chooses all ports; leave out the options that name one")
    ports = None if free_ports else choose_ports(**asked)
    done = stack.up(home_of(home), ports=ports, experts=experts, step=_step)  # type: ignore[arg-type]
    _say_up(done, any(asked.values()))


@app.command()
def deploy(
    kind: Annotated[str, typer.Option("--type", help="Type of the workers: process, docker or kubernetes.")] = "process",
) -> None:
    """Make work pools, deployments and automations on the Prefect server of PREFECT_API_URL, for workers anywhere. Starts nothing."""
    from tasks.orchestration import deploy as stack_deploy

    done = stack_deploy.deploy(kind)
    for what, names in done._asdict().items():
        typer.echo(f"{what}: {', '.join(names)}")


@app.command()
def down(
    delete: Annotated[
        bool, typer.Option("--delete", help="Remove the stack's data, too, after asking. Trained experts stay.")
    ] = False,
    home: Home = None,
) -> None:
    """Stop the stack's processes, and nothing else. Its data stay."""
    from flows import stack
    from tasks.local.stack.layout import folder_of, home_of

    where = home_of(home)
    if delete and folder_of(where).is_dir():
        typer.confirm(
            f"Remove {_short(folder_of(where))}: what lies in its S3 server, Prefect's and MLflow's databases?", abort=True
        )
    count = stack.down(where, delete=delete)
    typer.echo(f"{count} processes stopped" if count else f"nothing runs in {_short(folder_of(where))}")
    if delete:
        typer.echo("its data are removed")


@app.command()
def status(home: Home = None) -> None:
    """Every process with its health. Exit code 1 when one of them does not do its work, 2 when the stack does not run."""
    from flows import stack
    from tasks.local.stack.layout import home_of

    rows = stack.status(home_of(home))
    shown = [
        [one.name, one.state.lower(), str(one.pid or ""), "" if one.uptime is None else str(one.uptime), problem or "ok", url]
        for one, problem, url in rows
    ]
    _show_table(["name", "state", "pid", "uptime", "health", "url"], shown)
    if any(row.problem for row in rows):
        raise typer.Exit(1)


@app.command()
def restart(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A process as `ota stack status` names it.", show_default=False)],
    home: Home = None,
) -> None:
    """Restart one process, and wait until it does its work again."""
    from flows import stack
    from tasks.local.stack.layout import home_of

    with _step(f"restart {name}"):
        stack.restart(home_of(home), name)


@contextmanager
def _step(what: str, url: str = "") -> Iterator[None]:
    """A spinner while the block runs, a line with its seconds afterwards."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    started = time.monotonic()
    with console.status(f"{what}  {url}"):
        yield
    console.print(f"{time.monotonic() - started:6.1f} s  {what}  [dim]{url}[/dim]".rstrip())


def _say_up(done: Any, asked_ports: bool) -> None:
    stack, env = done.stack, _short(done.stack.folder / "env.sh")
    if done.was_running:
        kept = "; its ports stay: `ota stack down` first to move them" if asked_ports else ""
        typer.echo(f"\nThe stack was running; everything is deployed again{kept}.")
    typer.echo("")
    _show_table(["name", "url", "log"], [[name, stack.urls.get(name, ""), _short(stack.log(name))] for name in stack.names])
    ota = _short(_program("ota"))
    lines = ["", f". {env}    # this shell uses the stack", f"{ota} stack status", f"{ota} stack down"]
    shown = [name for name in done.deployments if not name.startswith(("part/", "stage/"))]
    lines[2:2] = [f"{_short(_program('prefect'))} deployment run {name}" for name in shown]
    typer.echo("\n".join(lines))


def _program(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def _short(path: Path) -> str:
    """Relative to the working folder where it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _show_table(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console

    from tasks.pages.tables import Cells
    from tasks.pages.terminal import draw

    Console(highlight=False, width=table_width()).print(draw(Cells(header, rows)))
