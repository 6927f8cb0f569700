"""The command ``ota``. Heavy packages are imported by the commands that need them, so that ``ota --help`` answers at once."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli import analysis as cli_analysis
from flows.cli import compare as cli_compare
from flows.cli import experts as cli_experts
from flows.cli import flows as cli_flows
from flows.cli import real as cli_real
from flows.cli import registry as cli_registry
from flows.cli import retention as cli_retention
from flows.cli import search as cli_search
from flows.cli import stack as cli_stack
from flows.cli.common import (
    Artifacts,
    DataDir,
    Device,
    Fetch,
    Home,
    Limit,
    Memory,
    Out,
    Overwrite,
    Recipe,
    TrackingUri,
    load_numba,
    progress_bars,
    recipe_inputs,
    show,
    user_errors,
)
from ota_core.errors import OtaError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Curvature-informed merging of fine-tuned language models.",
)

app.add_typer(cli_stack.app, name="stack")

AsJson = Annotated[bool, typer.Option("--json", help="Print what was done as one line of JSON.")]
ShardSize = Annotated[str, typer.Option(help="Largest weight file of the merged model, for example 2GB.")]


@app.command()
def merge(
    recipe: Recipe,
    out: Out,
    device: Device = "cpu",
    memory: Memory = "2GiB",
    overwrite: Overwrite = False,
    fetch: Fetch = False,
    shard_size: ShardSize = "5GB",
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Merge the experts of RECIPE into the checkpoint folder OUT. No server is needed."""
    from ota_core.compute.stream import parse_size
    from ota_core.merge import engine
    from ota_core.merge.output import check_free
    from ota_core.recipe.recipe import load_recipe

    with user_errors():
        loaded = load_recipe(recipe)
        check_free(out, overwrite=overwrite)
        file_size = parse_size(shard_size, "shard size", "1KB")
        load_numba()
        with (
            progress_bars() as progress,
            recipe_inputs(loaded, recipe, home=home, memory=memory, fetch=fetch, progress=progress) as (inputs, notes),
        ):
            report = engine.merge(
                loaded, out, inputs=inputs, device=device, memory=memory, overwrite=overwrite, shard_size=file_size,
                progress=progress,
            )  # fmt: skip
        if as_json:
            typer.echo(report.model_dump_json())
            return
        for note in [*notes, *report.notes]:
            typer.echo(f"note: {note}")
        for name, density in report.densities.items():
            typer.echo(f"{name}: kept {density['kept']:,} of {density['total']:,} elements (density {density['density']:.6f})")
        seconds = sum(report.seconds.values())
        typer.echo(
            f"{out}: merged in {seconds:.1f} s, peak memory {report.peak_memory_gib:.2f} GiB, fingerprint {report.fingerprint}"
        )


@app.command()
def plan(recipe: Recipe, memory: Memory = "2GiB", home: Home = None) -> None:
    """Say what a merge of RECIPE would read and write, its peak memory, and the problems found. Touches no weights."""
    from ota_core.recipe.recipe import load_recipe
    from tasks.merging.describe_plan import describe_plan

    with user_errors():
        for line in describe_plan(load_recipe(recipe), recipe.resolve().parent, memory, home):
            typer.echo(line)


@app.command()
def compress(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Checkpoint folder, s3://…, org/name, or a file of second moments.", show_default=False
        ),
    ],
    out: Out,
    method: Annotated[str, typer.Option(help="rank1, log8, rank_k or none.")] = "rank1",
    rank: Annotated[int | None, typer.Option(help="Rank of rank_k.", show_default="4")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, to compare saliency and FFG mask with those of the full second moments.")
    ] = None,
    density: Annotated[float, typer.Option(help="Density of the compared masks.")] = 0.4,
    memory: Memory = "2GiB",
    overwrite: Overwrite = False,
    fetch: Fetch = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Compress the second moments of SOURCE into one safetensors file OUT."""
    from flows.cli.engine import compress_source
    from ota_core.moments.compression import compression_label

    with user_errors(), progress_bars() as progress:
        load_numba()
        done = compress_source(
            source,
            out,
            method=method,
            rank=rank,
            memory=memory,
            overwrite=overwrite,
            fetch=fetch,
            home=home,
            progress=progress,
            base=base,
            density=density,
        )
    report, agreed = done.report, done.agreement
    if as_json:
        compared = None if agreed is None else {"spearman": agreed.spearman, "jaccard": agreed.jaccard}
        typer.echo(json.dumps({**report.model_dump(), "agreement": compared, "seconds": done.seconds}))
        return
    for note in done.notes:
        typer.echo(f"note: {note}")
    typer.echo(
        f"{out}: {compression_label(report.method, report.rank)}, {report.parameters:,} parameters, {report.bytes_per_param:.4f} bytes per parameter (float32: 4)"
    )
    typer.echo(f"relative error of the square root of v: {report.sqrt_error:.4f}")
    if agreed is not None:
        typer.echo(
            f"saliency against the full second moments: rank correlation {agreed.spearman:.4f}, "
            f"overlap of the masks at density {agreed.density:g}: {agreed.jaccard:.4f} (Jaccard)"
        )


@app.command()
def mask(
    recipe: Recipe,
    out: Out,
    device: Device = "cpu",
    memory: Memory = "2GiB",
    overwrite: Overwrite = False,
    fetch: Fetch = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Write the FFG mask of every expert of RECIPE into the folder OUT, and print the realised densities."""
    from flows.cli.engine import mask_recipe
    from ota_core.merge.output import check_free
    from ota_core.recipe.recipe import load_recipe

    with user_errors():
        loaded = load_recipe(recipe)
        check_free(out, overwrite=overwrite)
        load_numba()
        with (
            progress_bars() as progress,
            recipe_inputs(loaded, recipe, home=home, memory=memory, fetch=fetch, progress=progress) as (inputs, notes),
        ):
            started = time.perf_counter()
            found = mask_recipe(loaded, inputs, out, device=device, memory=memory, overwrite=overwrite, progress=progress)
            seconds = {"mask": time.perf_counter() - started}
        if as_json:
            typer.echo(json.dumps({"densities": found, "seconds": seconds}))
            return
        for note in notes:
            typer.echo(f"note: {note}")
        for name, density in found.items():
            typer.echo(
                f"{name}: kept {density['kept']:,} of {density['total']:,} elements (density {density['density']:.6f}, threshold {density['threshold']})"
            )


@app.command()
def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="A checkpoint (also s3://… or org/name), a file of second moments or masks, or an artifact.",
            show_default=False,
        ),
    ],
    home: Home = None,
) -> None:
    """Say what PATH holds."""
    from tasks.merging.describe import describe_source

    with user_errors():
        for line in describe_source(path, home):
            typer.echo(line)


@app.command()
def run(
    recipe: Recipe,
    suite: Annotated[str, typer.Option(help="Benchmark suite: a name in deployments/suites, a file, or 'none'.")] = "public",
    data_dir: DataDir = None,
    limit: Limit = None,
    device: Device = "auto",
    memory: Memory = "2GiB",
    home: Home = None,
    artifacts: Artifacts = None,
    tracking_uri: TrackingUri = None,
    runner: Annotated[
        str | None,
        typer.Option(help="Where the merge's parts run: threads, dask, ray or workers.", show_default="$OTA_RUNNER or threads"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="A running Dask scheduler or Ray cluster.", show_default="$OTA_RUNNER_ADDRESS or a local one, for this run"
        ),
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(help="Parts at a time on this machine, each with its own memory budget.", show_default="$OTA_RUNNER_PARTS"),
    ] = None,
    shard_size: ShardSize = "5GB",
) -> None:
    """Run the whole flow: fetch, compress, mask, merge, benchmark, log. Uses a Prefect server where PREFECT_API_URL names one."""
    from flows.cli.flows import run_recipe
    from ota_core.recipe.recipe import load_recipe

    with user_errors():
        loaded = load_recipe(recipe)
        lines = run_recipe(
            loaded, recipe_dir=recipe.resolve().parent, suite=None if suite == "none" else suite, data_dir=data_dir, limit=limit,
            device=device, memory=memory, home=home, artifacts=artifacts, tracking_uri=tracking_uri,
            runner=runner, address=address, parts=parts, shard_size=shard_size,
        )  # fmt: skip
        for line in lines:
            show(line)


@app.command()
def demo(
    home: Home = None,
    seed: Annotated[int, typer.Option(help="Seed of data and training.")] = 1,
) -> None:
    """Train a small base and five experts, merge them in four ways, and compare. Needs the extra 'demo'."""
    from tasks.orchestration.prepare import prepare_prefect

    with user_errors():
        prepare_prefect()
        from flows.lab.demo import run_demo

        for line in run_demo(home=home, seed=seed):
            show(line)


@app.command()
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

    with user_errors():
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


app.command()(cli_analysis.analyse)
app.command()(cli_flows.nightly)
app.command()(cli_flows.study)
app.command()(cli_real.study_real)
app.command()(cli_flows.benchmark)
app.command()(cli_compare.compare)
app.command()(cli_search.search)
app.command()(cli_registry.promote)
app.command()(cli_registry.rollback)
app.command()(cli_registry.champion)
app.command()(cli_experts.push)
app.command()(cli_experts.experts)
app.command()(cli_retention.gc)
