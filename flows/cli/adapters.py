"""The command ``ota extract-lora``."""

import time
from typing import Annotated, Any, Literal

import typer

from flows.cli.common import AsJson, Device, Fetch, Home, Memory, Out, Overwrite, progress_bars, show
from ota_core.errors import OtaError


def extract_lora(
    merged: Annotated[str, typer.Argument(metavar="MERGED", help="Checkpoint folder, s3://…, or org/name.", show_default=False)],
    out: Out,
    base: Annotated[str, typer.Option(help="The model that the adapter is to be applied to.", show_default=False)],
    rank: Annotated[int, typer.Option(help="Largest rank of a matrix.")] = 32,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Take lower ranks where they leave no more than this share of a matrix's difference.", show_default=False
        ),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Singular values by LAPACK, rather than by a randomised iteration: far slower.")
    ] = False,
    whole: Annotated[
        list[str] | None,
        typer.Option(help="Store what changed of these whole: embeddings, norms, biases. May be repeated.", show_default=False),
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Data type of the adapter.")] = "float32",
    device: Device = "cpu",
    memory: Memory = "2GiB",
    overwrite: Overwrite = False,
    fetch: Fetch = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Write the difference of MERGED from its base as a LoRA adapter into the folder OUT, with what it lacks of each tensor."""
    from ota_core.compute.stream import parse_memory, pick_device
    from ota_core.engine.output import check_apart
    from ota_core.extract.extract import ExtractOptions
    from ota_core.files.place import check_free, new_folder
    from tasks.merging.extract import extract_adapter, opened_pair

    kinds = [kind for item in whole or [] for kind in item.split(",")]
    if unknown := sorted({*kinds} - {"embeddings", "norms", "biases"}):
        raise OtaError(f"--whole: got {', '.join(unknown)}, expected embeddings, norms or biases")
    given: dict[str, Any] = {
        "rank": rank,
        "max_error": max_error,
        "exact": exact,
        "whole": tuple(dict.fromkeys(kinds)),
        "dtype": dtype,
    }
    options = ExtractOptions(**given)
    options.check()
    check_free(out, overwrite=overwrite)
    budget, started = parse_memory(memory), time.perf_counter()
    with (
        progress_bars() as progress,
        opened_pair(merged, base, home=home, memory=budget, fetch=fetch, progress=progress) as pair,
    ):
        check_apart(out, pair.inputs)
        with new_folder(out, overwrite=overwrite) as folder:
            report = extract_adapter(folder, pair, options, memory=budget, device=pick_device(device), progress=progress)
    if as_json:
        typer.echo(report.model_dump_json())
        return
    from tasks.pages import terminal
    from tasks.pages.adapters import errors_table

    for note in [*pair.notes, *report.notes]:
        typer.echo(f"note: {note}")
    show(terminal.table(errors_table(report)))
    typer.echo(
        f"{out}: {report.parameters:,} parameters; {len(report.tensors)} tensors differ, {report.unchanged} do not; the adapter lacks "
        f"{report.error:.4g} of the difference; {time.perf_counter() - started:.1f} s"
    )
