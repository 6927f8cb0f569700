"""The command ``ota search``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli.common import Artifacts, DataDir, Device, Home, MergeMemory, Overlap, TrackingUri, show
from ota_core.errors import OtaError

NOTHING_HOLDS = 3
"""Exit code where no trial holds all floors."""

_RANGE = "as low:high, with :log or :linear behind; none leaves it as it is"


def search(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="Recipe to begin with, or a search (YAML): a file or s3://….", show_default=False),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Where the winner's recipe goes (YAML).", show_default=False)],
    suite: Annotated[
        str | None, typer.Option(help="Suite that chooses, on documents that judge nothing.", show_default=False)
    ] = None,
    data_dir: DataDir = None,
    budget: Annotated[
        float | None, typer.Option(help="Evaluations on all documents; on half of them counts half.", show_default="40")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Points to try at most.", show_default="as the budget allows")] = None,
    rungs: Annotated[
        str | None,
        typer.Option(
            help="Documents of each task: a trial goes on to the next number while it is good.", show_default="25,50,100"
        ),
    ] = None,
    reduction: Annotated[int | None, typer.Option(help="Of so many trials at a rung one goes on.", show_default="2")] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            help="What every capability must reach: base, a fraction of its expert's score (0.9), score:0.4, or none; for one capability "
            "as math=0.9. Where the suite measures a held-out loss, the score is the likelihood of a byte, 2 to the minus bits per byte. May be repeated.",
            show_default="base",
        ),
    ] = None,
    density: Annotated[str | None, typer.Option(help=f"Densities, {_RANGE}.", show_default="0.05:1:log")] = None,
    per_expert: Annotated[
        bool | None,
        typer.Option("--per-expert/--shared", help="A density for each expert, or one for all.", show_default="per expert"),
    ] = None,
    lambda_: Annotated[str | None, typer.Option("--lambda", help=f"Scale λ, {_RANGE}.", show_default="0.5:2")] = None,
    weight: Annotated[str | None, typer.Option(help=f"Weight of each expert, {_RANGE}.", show_default="none")] = None,
    scaling_factor: Annotated[
        str | None, typer.Option(help=f"Factor on each expert's curvature weight, {_RANGE}.", show_default="none")
    ] = None,
    power: Annotated[str | None, typer.Option(help=f"Exponent of the curvature, {_RANGE}.", show_default="none")] = None,
    t: Annotated[str | None, typer.Option(help=f"Position between two models (slerp), {_RANGE}.", show_default="none")] = None,
    ridge: Annotated[
        str | None, typer.Option(help=f"Weight of what is merged in a row-space regression, {_RANGE}.", show_default="none")
    ] = None,
    choose: Annotated[
        list[str] | None,
        typer.Option(
            help="Words of which one is chosen: merge_method=ota,ties,rowspace, refine=none,rowspace; also of scope, metric, normalise, "
            "denominator, fallback, masked_merge. A method has of the ranges what it uses. May be repeated.",
            show_default="none",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the optimiser.", show_default="0")] = None,
    test: Annotated[str | None, typer.Option(help="Suite that judges the winner, once, at the end.", show_default="none")] = None,
    test_data_dir: Annotated[str | None, typer.Option(help="Its data.", show_default="--data-dir")] = None,
    overlap: Overlap = None,
    device: Device = "auto",
    memory: MergeMemory = "2GiB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    home: Home = None,
    artifacts: Artifacts = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Search the densities and λ of RECIPE, and the methods that --choose names, for the best average under a floor for each capability; write
    the winner as recipe OUT. λ auto stays auto, without --lambda.

    Run the same again to go on with an interrupted search, or with a larger --budget to add to one; with a smaller one only the trials that
    it pays for count. Exit code 3: no trial holds all floors.
    """
    from ota_core.compute.stream import parse_memory, pick_device
    from tasks.evaluation.suites import load_suite
    from tasks.experiments.search.config import recipe_of
    from tasks.orchestration.prepare import prepare_prefect

    ranges = {
        "density": density,
        "lambda": lambda_,
        "weight": weight,
        "scaling_factor": scaling_factor,
        "power": power,
        "t": t,
        "ridge": ridge,
    }
    space = {key: None if value == "none" else value for key, value in ranges.items() if value is not None}
    space |= {} if per_expert is None else {"per_expert": per_expert}  # type: ignore[dict-item]
    space |= _choices(choose or [])
    measured = {"evaluations": budget, "trials": trials, "rungs": _numbers(rungs), "reduction": reduction}
    given = {
        "suite": suite,
        "data_dir": data_dir,
        "seed": seed,
        "test": test,
        "test_data_dir": test_data_dir,
        "overlap": overlap,
        "floor": floors_of_options(floor),
    }
    config = _config(recipe, space, measured, {key: value for key, value in given.items() if value is not None})
    check_file(out, such_as="best.yaml", overwrite=overwrite)
    _, folder = recipe_of(config)
    load_suite(config.suite)
    if config.test:
        load_suite(config.test)
    parse_memory(memory)
    pick_device(device)
    prepare_prefect()
    from flows.search import search_flow
    from tasks.experiments.search.result import render, verdict
    from tasks.settings import as_device, places

    outcome = search_flow(
        config, out=out, device=as_device(device), memory=memory, recipe_dir=folder, home=home, artifacts=artifacts, tracking_uri=tracking_uri
    )  # fmt: skip
    show(render(outcome.tuned))
    show_end(
        "winner", outcome.test, config.test, verdict(outcome.tuned), out, outcome.logged, places(home, artifacts), tracking_uri
    )
    if not outcome.tuned.feasible:
        raise typer.Exit(NOTHING_HOLDS)


def check_file(out: str, *, such_as: str, overwrite: bool) -> None:
    """Raises OtaError for a place that a recipe cannot be written to."""
    if Path(out).exists() and not overwrite:
        raise OtaError(f"{out} exists already; choose another file, or replace it with --overwrite")
    if Path(out).is_dir():
        raise OtaError(f"{out} is a folder; name a file such as {such_as}")


def show_end(
    name: str, test: Any, suite: str | None, verdict: str, out: str, logged: Any, where: Any, tracking_uri: str | None
) -> None:  # fmt: skip
    """How what was found (``name``) stands on the suite that judges it, the verdict, the recipe's place, and the way to MLflow's page."""
    from tasks.tracking.merge import open_hint

    if test is not None and test.smoke and not test.smoke.passed:
        show(f"not benchmarked: {test.smoke.said}")
    elif test is not None:
        from tasks.pages.outcome import comparison_table
        from tasks.pages.scores import narrow
        from tasks.pages.terminal import table

        show(table(narrow(comparison_table({name: test}, where), f"Suite {suite}")))
    typer.echo(verdict)
    typer.echo(f"recipe: {out}")
    typer.echo(open_hint(tracking_uri=tracking_uri, root=where.tracking, experiment=logged.experiment_id, run=logged.run_id))


def _config(source: str, space: dict[str, Any], measured: dict[str, Any], given: dict[str, Any]) -> Any:
    """The search from a file that holds one, or a recipe; what the command line says wins over the file."""
    from tasks.experiments.search.config import BUDGET, DEFAULT, SearchConfig, load_search
    from tasks.merging.recipes import parse_config, read_yaml

    raw = read_yaml(source)
    whole = isinstance(raw, dict) and "recipe" in raw
    held: dict[str, Any] = (
        load_search(source).model_dump(mode="json", by_alias=True, exclude_unset=True) if whole else {"recipe": source}
    )
    said = {key: value for key, value in measured.items() if value is not None}
    budget = held.get("budget", BUDGET.model_dump(exclude_unset=True)) | said
    if not whole and measured["trials"] is not None and measured["evaluations"] is None:
        del budget["evaluations"]
    merged = held | given | {"space": held.get("space", {}) | space, "budget": budget}
    if "floor" in given:
        before = held.get("floor", {})
        merged["floor"] = (before if isinstance(before, dict) else {DEFAULT: before}) | given["floor"]
    if "suite" not in merged:
        raise OtaError("--suite is missing: the suite that chooses, such as demo-validation; it must not be the one that judges")
    return parse_config(SearchConfig, merged, "ota search")


def floors_of_options(texts: list[str] | None) -> dict[str, str] | None:
    if not texts:
        return None
    from tasks.experiments.search.config import DEFAULT

    pairs = [text.rpartition("=") for text in texts]
    names = [name or DEFAULT for name, _, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise OtaError(f"--floor: given more than once for {', '.join(twice)}")
    return {name or DEFAULT: value for name, _, value in pairs}


def _choices(texts: list[str]) -> dict[str, str | None]:
    from tasks.experiments.search.space import CHOICES

    found = {}
    for text in texts:
        key, _, words = text.partition("=")
        if key not in CHOICES or not words:
            raise OtaError(
                f"--choose: got '{text}', expected one of {', '.join(CHOICES)} and words, such as refine=none,rowspace"
            )
        if key in found:
            raise OtaError(f"--choose: given more than once for {key}")
        found[key] = words
    return dict(found)


def _numbers(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        raise OtaError(f"--rungs: got '{text}', expected numbers of documents such as 25,50,100") from None
