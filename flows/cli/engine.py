"""The commands that work on files alone: ``ota merge``, ``plan``, ``compress``, ``mask``, ``inspect``. No server is needed."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from flows.cli.common import (
    AllowNonfinite,
    AsJson,
    Device,
    Fetch,
    Home,
    IgnoreDifferences,
    Memory,
    Out,
    Overwrite,
    Recipe,
    ShardSize,
    load_numba,
    progress_bars,
    recipe_inputs,
)
from ota_core.errors import CheckpointError, MomentsError, OtaError
from ota_core.files.room import full_disk
from ota_core.reading import printable


def merge(
    recipe: Recipe,
    out: Out,
    device: Device = "cpu",
    memory: Memory = "2GiB",
    overwrite: Overwrite = False,
    fetch: Fetch = False,
    shard_size: ShardSize = "5GB",
    ignore: IgnoreDifferences = None,
    allow_nonfinite: AllowNonfinite = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Merge the experts of RECIPE into the checkpoint folder OUT. No server is needed.

    Of a file with several recipes (---), each result that another one names is made in a scratch folder beside OUT and removed at the end.
    """
    from ota_core.compute.stream import parse_size
    from ota_core.engine import engine
    from ota_core.files.place import check_free, scratch_folder
    from tasks.merging.opened import opens
    from tasks.merging.stages import read_stages

    with ExitStack() as stack:
        stages = [one.with_recipe(one.recipe.ignoring(ignore).allowing_nonfinite(allow_nonfinite)) for one in read_stages(recipe)]
        check_free(out, overwrite=overwrite, keep=[recipe])
        file_size = parse_size(shard_size, "shard size", "1KB")
        if len(stages) > 1:
            for line in _planned_stages(stages, recipe, memory, home):
                del line  # raises what is wrong with any stage before the first is merged
        load_numba()
        folders: dict[str, Path] = {}
        for one in stages:
            target = out
            if one.name is not None and one is not stages[-1]:
                target = folders[one.name] = stack.enter_context(scratch_folder(out.absolute())) / "result"
            located = one.located(folders) if len(stages) > 1 else one.recipe
            with recipe_inputs(located, recipe, home=home, memory=memory, fetch=fetch, device=device) as (
                inputs,
                notes,
                progress,
            ):
                report = engine.merge(
                    one.recipe, target, inputs=one.named(inputs), device=device, memory=memory, overwrite=overwrite, shard_size=file_size,
                    progress=progress, opens=opens,
                )  # fmt: skip
            if target is not out and not as_json:
                typer.echo(f"{one.name}: merged, fingerprint {report.fingerprint}")
        if as_json:
            typer.echo(report.model_dump_json())
            return
        for note in [*notes, *report.notes]:
            typer.echo(f"note: {printable(note)}")
        for name, density in report.densities.items():
            typer.echo(f"{name}: kept {density['kept']:,} of {density['total']:,} elements (density {density['density']:.6f})")
        if scale := report.results.get("lambda"):
            typer.echo(f"λ = {scale['value']:g}, found from the row spaces of the task vectors")
        seconds = sum(report.seconds.values())
        typer.echo(
            f"{out}: merged in {seconds:.1f} s, peak memory {report.peak_memory_gib:.2f} GiB, fingerprint {report.fingerprint}"
        )


def plan(recipe: Recipe, memory: Memory = "2GiB", ignore: IgnoreDifferences = None, home: Home = None) -> None:
    """Say what a merge of RECIPE would read and write, its peak memory, and the problems found. Touches no weights."""
    from tasks.merging.stages import read_stages

    for line in _planned_stages(
        [one.with_recipe(one.recipe.ignoring(ignore)) for one in read_stages(recipe)], recipe, memory, home
    ):
        typer.echo(printable(line))


def _planned_stages(stages: Sequence[Any], recipe: Path, memory: str, home: Path | None) -> Iterator[str]:
    """What ``ota plan`` says of every stage; the results that later ones name are outlines without weights."""
    from tasks.merging.describe_plan import describe_plan, outline

    folders: dict[str, Path] = {}
    with ExitStack() as stack:
        for one in stages:
            located, folder = one.located(folders) if len(stages) > 1 else one.recipe, recipe.resolve().parent
            if len(stages) > 1:
                yield f"{'' if one is stages[0] else chr(10)}stage {one.name or 'of the result'}:"
            yield from describe_plan(located, folder, memory, home)
            if one is not stages[-1]:
                target = folders[one.name] = Path(stack.enter_context(TemporaryDirectory(prefix="ota-plan-"))) / "result"
                outline(located, target, folder, home)


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
        str | None,
        typer.Option(
            help="The base model: to tell trained parameters from frozen ones, and to compare saliency and FFG mask with those of the "
            "full second moments."
        ),
    ] = None,
    density: Annotated[float, typer.Option(help="Density of the compared masks.")] = 0.4,
    memory: Memory = "2GiB",
    overwrite: Overwrite = False,
    fetch: Fetch = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Compress the second moments of SOURCE into one safetensors file OUT."""
    from ota_core.compute.stream import parse_memory
    from ota_core.engine import engine
    from ota_core.files.checkpoint import weight_files
    from ota_core.files.place import check_file, new_file
    from ota_core.files.safetensors_io import SafetensorsFile
    from ota_core.moments import choice_in, find_moments, moments_files, none_found, steps_in_words
    from ota_core.moments.compression import compression_label
    from ota_core.moments.compression.header import read_header
    from ota_core.plan.vocabulary.match import names_in
    from tasks.merging.architecture import parameter_layout
    from tasks.settings import places
    from tasks.storage import models as storage
    from tasks.storage.streaming.streams import Streams

    with progress_bars() as progress, ExitStack() as stack:
        load_numba()
        if not 0 < density <= 1:
            raise OtaError(f"density: got {density}, expected a number in (0, 1]")
        check_file(out, overwrite=overwrite)
        budget, cache = parse_memory(memory), places(home).cache
        streams = None if fetch else stack.enter_context(Streams(cache=cache, memory=budget))
        source_of = streams.source_of if streams else None

        def bring(model: str, what: str) -> Path:
            if streams is not None and storage.is_s3(model):
                return streams.model(model).path
            return storage.fetch(model, cache=cache, progress=partial(progress, what)).path

        path = Path(source).expanduser()
        folder, choice = path.parent, None
        if not path.is_file():
            folder = bring(source, "fetch")
            found = find_moments(folder)
            if found is None:
                raise MomentsError(none_found(source))
            path, choice = found, choice_in(folder)
            if streams is not None:
                streams.settle(moments_files(path), partial(progress, "fetch"))
        reference = bring(base, "fetch base") if base is not None else None
        layout = partial(parameter_layout, folder, reference, source_of) if (folder / "config.json").is_file() else None
        if streams is not None:
            with suppress(CheckpointError):  # a folder without weights: the names of v are then taken as they are
                streams.settle(weight_files(folder), partial(progress, "fetch"))
        tensors = names_in(folder, source_of)
        agreed, started = None, time.perf_counter()
        with full_disk(out), new_file(out, overwrite=overwrite) as temporary:
            report = engine.compress_moments(
                path, temporary, method=method, rank=rank, layout=layout, source_of=source_of, tensors=tensors, memory=memory,
                progress=progress,
            )  # fmt: skip
            seconds = {"compress": time.perf_counter() - started}
            with SafetensorsFile(temporary) as made:
                header = read_header(temporary, made.metadata)
            if reference is not None:
                if streams is not None:
                    streams.settle([*weight_files(folder), *weight_files(reference)], partial(progress, "fetch"))
                agreed = agreement(
                    path, temporary, folder, reference, density=density, memory=budget, layout=layout, source_of=source_of, tensors=tensors,
                    progress=progress,
                )  # fmt: skip
                seconds["compare"] = time.perf_counter() - started - seconds["compress"]
            if streams is not None:
                streams.verify()
    if as_json:
        compared = None if agreed is None else {"spearman": agreed.spearman, "jaccard": agreed.jaccard}
        typer.echo(json.dumps({**report.model_dump(), "agreement": compared, "seconds": seconds}))
        return
    for note in [*([choice.note] if choice else []), *(streams.notes if streams else [])]:
        typer.echo(f"note: {printable(note)}")
    typer.echo(
        f"{out}: {compression_label(report.method, report.rank)}, {report.parameters:,} parameters, {report.bytes_per_param:.4f} bytes per parameter (float32: 4)"
    )
    typer.echo(
        f"β₂ {'unknown' if header.beta2 is None else format(header.beta2, '.6g')}, {steps_in_words(header.steps.values())}"
    )
    typer.echo(f"relative error of the square root of v: {report.sqrt_error:.4f}")
    if agreed is not None:
        typer.echo(said_of(agreed, "the full second moments"))


def agreement(
    full: Path, form: Path, expert: Path, base: Path, *, density: float, memory: int, progress: Any, layout: Any = None, source_of: Any = None,
    tensors: Any = None,
) -> Any:  # fmt: skip
    """How far the second moments in the file ``form`` lead to the saliency and the mask of those in ``full`` (ota_core/analysis/agreement.py)."""
    from ota_core.analysis.agreement import agreements  # with it comes torch
    from ota_core.compute.stream import Stream
    from ota_core.files.checkpoint import Checkpoint
    from ota_core.moments import open_moments

    with (
        closing(open_moments(full, layout=layout, source_of=source_of, tensors=tensors)) as one,
        closing(open_moments(form, layout=layout, tensors=tensors)) as other,
        closing(Checkpoint(expert, source_of)) as trained,
        closing(Checkpoint(base, source_of)) as start,
    ):
        droppable = [one.drop_pages, other.drop_pages, trained.drop_pages, start.drop_pages]
        stream = Stream(memory=memory, progress=progress, droppable=droppable)
        return agreements(one, [other], trained, start, density=density, stream=stream)[0]


def said_of(agreed: Any, what: str) -> str:
    """The agreement in a line; ``what`` it is with."""
    return (
        f"saliency against {what}: rank correlation {agreed.spearman:.4f}, overlap of the masks at density {agreed.density:g}: "
        f"{agreed.jaccard:.4f} (Jaccard)"
    )


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
    from ota_core.engine import engine
    from ota_core.engine.output import check_apart
    from ota_core.files.place import check_free, made_of, new_folder
    from ota_core.recipe.recipe import load_recipe

    loaded = load_recipe(recipe)
    is_masks = made_of("densities.json", "*.safetensors")
    check_free(out, overwrite=overwrite, is_output=is_masks, keep=[recipe])
    load_numba()
    with recipe_inputs(loaded, recipe, home=home, memory=memory, fetch=fetch, device=device) as (inputs, notes, progress):
        started = time.perf_counter()
        check_apart(out, inputs)
        with new_folder(out, overwrite=overwrite, is_output=is_masks) as folder:
            found = engine.mask(loaded, folder, inputs=inputs, device=device, memory=memory, progress=progress)
            inputs.verify()
            (folder / "densities.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        seconds = {"mask": time.perf_counter() - started}
    if as_json:
        typer.echo(json.dumps({"densities": found, "seconds": seconds}))
        return
    for note in notes:
        typer.echo(f"note: {printable(note)}")
    for name, density in found.items():
        typer.echo(
            f"{name}: kept {density['kept']:,} of {density['total']:,} elements (density {density['density']:.6f}, threshold {density['threshold']})"
        )


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

    for line in describe_source(path, home):
        typer.echo(printable(line))
