"""The command ``ota tune``."""

from typing import Annotated, Any

import typer

from flows.cli.common import Artifacts, DataDir, Device, Home, MergeMemory, Overlap, TrackingUri, show
from flows.cli.search import check_file, floors_of_options, show_end
from ota_core.errors import OtaError


def tune(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="Recipe to begin with, or a tuning (YAML): a file or s3://….", show_default=False),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where the recipe with the scales goes (YAML).", show_default=False)],
    suite: Annotated[
        str | None, typer.Option(help="Suite whose documents are learned from; they judge nothing.", show_default=False)
    ] = None,
    data_dir: DataDir = None,
    per: Annotated[
        str | None,
        typer.Option(help="What shares an expert's coefficient: tensor, layer, role or expert.", show_default="tensor"),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="mean of the capabilities' losses; worst: the one highest above its expert's own; floors: the mean, with a penalty below --floor; "
            "kl: the distance to each expert's predictions on its own prompts, which needs no answers.",
            show_default="mean",
        ),
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            help="With --objective floors, what every capability must reach: base, a fraction of its expert's likelihood of a byte (0.98), score:0.4, "
            "or none; for one capability as math=0.98. May be repeated.",
            show_default="base",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps at most.", show_default="32")] = None,
    blocks: Annotated[
        int | None, typer.Option(help="Blocks of text of each capability to learn from.", show_default="16")
    ] = None,
    held_out: Annotated[
        int | None, typer.Option(help="Blocks of each capability, of other documents, that say when to stop.", show_default="6")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a block at most.", show_default="512")] = None,
    batch: Annotated[int | None, typer.Option(help="Blocks of each capability in a step.", show_default="1")] = None,
    rate: Annotated[
        float | None, typer.Option(help="About what a coefficient changes by in a step.", show_default="0.05")
    ] = None,
    penalty: Annotated[
        float | None, typer.Option(help="Weight of the mean squared distance from the start.", show_default="0.01")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Decides which documents are taken.", show_default="0")] = None,
    test: Annotated[str | None, typer.Option(help="Suite that judges the result, once, at the end.", show_default="none")] = None,
    test_data_dir: Annotated[str | None, typer.Option(help="Its data.", show_default="--data-dir")] = None,
    overlap: Overlap = None,
    device: Device = "auto",
    memory: MergeMemory = "2GiB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    home: Home = None,
    artifacts: Artifacts = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Learn by what each expert's part of RECIPE's merged edit is to be multiplied, by gradient on validation documents; write the recipe
    OUT and beside it its file of scales, which `ota merge` and `ota run` apply.

    Needs the memory of one model and of one layer's gradients, besides --memory.
    """
    from ota_core.compute.stream import parse_memory, pick_device
    from tasks.evaluation.suites import load_suite
    from tasks.experiments.tune.config import recipe_of
    from tasks.orchestration.prepare import prepare_prefect

    given = {
        "suite": suite, "data_dir": data_dir, "per": per, "objective": objective, "floor": floors_of_options(floor), "steps": steps, "blocks": blocks,
        "held_out": held_out, "length": length, "batch": batch, "rate": rate, "penalty": penalty, "seed": seed, "test": test,
        "test_data_dir": test_data_dir, "overlap": overlap,
    }  # fmt: skip
    config = _config(recipe, {key: value for key, value in given.items() if value is not None})
    check_file(out, such_as="tuned.yaml", overwrite=overwrite)
    _, folder = recipe_of(config)
    load_suite(config.suite)
    if config.test:
        load_suite(config.test)
    parse_memory(memory)
    pick_device(device)
    prepare_prefect()
    from flows.tune import tune_flow
    from tasks.experiments.tune.result import render, verdict
    from tasks.settings import as_device, places

    outcome = tune_flow(
        config, out=out, device=as_device(device), memory=memory, recipe_dir=folder, home=home, artifacts=artifacts, tracking_uri=tracking_uri
    )  # fmt: skip
    show(render(outcome.learned))
    show_end(
        "tuned", outcome.test, config.test, verdict(outcome.learned), out, outcome.logged, places(home, artifacts), tracking_uri
    )


def _config(source: str, given: dict[str, Any]) -> Any:
    """The tuning from a file that holds one, or a recipe; what the command line says wins over the file."""
    from tasks.experiments.tune.config import ScalesConfig, load_tuning
    from tasks.merging.recipes import parse_config, read_yaml

    raw = read_yaml(source)
    held: dict[str, Any] = {"recipe": source}
    if isinstance(raw, dict) and "recipe" in raw:
        held = load_tuning(source).model_dump(mode="json", by_alias=True, exclude_unset=True)
    merged = held | given
    if "suite" not in merged:
        raise OtaError("--suite is missing: the suite to learn from, such as demo-validation; it must not be the one that judges")
    return parse_config(ScalesConfig, merged, "ota tune")
