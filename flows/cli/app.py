"""The command ``ota``. Heavy packages are imported by the commands that need them, so that ``ota --help`` answers at once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli import adapters as cli_adapters
from flows.cli import analysis as cli_analysis
from flows.cli import compare as cli_compare
from flows.cli import engine as cli_engine
from flows.cli import estimate as cli_estimate
from flows.cli import experts as cli_experts
from flows.cli import flows as cli_flows
from flows.cli import registry as cli_registry
from flows.cli import retention as cli_retention
from flows.cli import search as cli_search
from flows.cli import stack as cli_stack
from flows.cli import sync as cli_sync
from flows.cli import tune as cli_tune
from flows.cli import webhooks as cli_webhooks
from flows.cli.common import Commands, Device, Home, progress_bars, show
from ota_core.errors import OtaError

app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Curvature-informed merging of fine-tuned language models.",
)

app.add_typer(cli_stack.app, name="stack")
app.add_typer(cli_webhooks.app, name="webhook")


def demo(
    home: Home = None,
    seed: Annotated[int, typer.Option(help="Seed of data and training.")] = 1,
) -> None:
    """Train a small base and five experts, merge them in six ways, and compare. Needs the extra 'demo'."""
    from tasks.orchestration.prepare import prepare_prefect

    prepare_prefect()
    from flows.lab.demo import run_demo

    for line in run_demo(home=home, seed=seed):
        show(line)


def bench(
    sizes: Annotated[str, typer.Option(help="Billions of parameters.")] = "0.45",
    experts: Annotated[str, typer.Option(help="Numbers of experts.")] = "3",
    runs: Annotated[int, typer.Option(help="Runs of every case.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder for models, bench.json and bench.png.")] = Path(".ota/bench"),
    keep: Annotated[bool, typer.Option("--keep", help="Keep the models for another run.")] = False,
    device: Device = "cpu",
    stages: Annotated[str | None, typer.Option(help="Only these cases, by name.", show_default="all")] = None,
    flow: Annotated[bool, typer.Option(help="Measure the flow with Prefect, too.")] = True,
    mergekit: Annotated[bool, typer.Option("--mergekit", help="Measure mergekit beside it, where it is installed.")] = False,
) -> None:
    """Build synthetic models, and measure every stage against reading the inputs once and writing the output once."""
    from flows.lab.speed import Options, run_bench

    options = Options(
        sizes=_numbers("sizes", sizes, float), experts=_numbers("experts", experts, int), runs=runs, out=out.absolute(), keep=keep, device=device, stages=tuple(stages.split(",")) if stages else None, flow=flow,
        mergekit=mergekit,
    )  # fmt: skip
    with progress_bars() as progress:
        lines = list(run_bench(options, progress))
    for line in lines:
        show(line)


def _numbers(option: str, text: str, kind: Any) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise OtaError(f"--{option}: got '{text}', expected numbers with commas between them") from None


for command in (
    cli_experts.init, cli_engine.merge, cli_engine.plan, cli_engine.compress, cli_estimate.estimate, cli_engine.mask,
    cli_engine.inspect, cli_adapters.extract_lora,
    cli_flows.run, demo, bench, cli_analysis.analyse, cli_analysis.preflight, cli_flows.nightly, cli_flows.study,
    cli_flows.study_real, cli_flows.benchmark, cli_compare.compare, cli_search.search, cli_tune.tune,
    cli_registry.promote, cli_registry.rollback, cli_registry.champion,
    cli_experts.push, cli_experts.harvest, cli_experts.experts, cli_sync.sync, cli_retention.gc,
):  # fmt: skip
    app.command()(command)
