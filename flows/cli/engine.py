"""What ``ota compress`` and ``ota mask`` do beyond calling the engine: look up a source, write to a temporary sibling."""

import json
import os
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ota_core.compute.stream import Progress, Stream, parse_memory
from ota_core.errors import MomentsError, OtaError
from ota_core.files.checkpoint import Checkpoint, weight_files
from ota_core.merge import engine
from ota_core.merge.output import check_apart, check_free, new_folder
from ota_core.moments import find_moments, moments_files, none_found, open_moments
from ota_core.moments.compression import CompressionReport, open_compressed
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import MergeRecipe
from tasks.merging.architecture import parameter_layout
from tasks.settings import places
from tasks.storage import models as storage
from tasks.storage.streaming.streams import Streams

if TYPE_CHECKING:
    from ota_core.analysis.agreement import Agreement


class Compressed(NamedTuple):
    """What a compression led to."""

    report: CompressionReport
    agreement: "Agreement | None"
    """With a base to compare by."""
    seconds: dict[str, float]
    """Of each part."""
    notes: list[str]


def compress_source(
    source: str,
    out: Path,
    *,
    method: str,
    rank: int | None = None,
    memory: str,
    overwrite: bool,
    home: Path | None,
    progress: Progress,
    fetch: bool = False,
    base: str | None = None,
    density: float = 0.4,
) -> Compressed:
    """Compress the second moments of a checkpoint, or of a file of moments, into the file ``out``. Raises OtaError.

    With a ``base``, also how far saliency and the FFG mask at ``density`` agree with those of the full second moments. What lies in S3
    is read by ranges, or with ``fetch`` downloaded first.
    """
    if not 0 < density <= 1:
        raise OtaError(f"density: got {density}, expected a number in (0, 1]")
    check_free(out, overwrite=overwrite)
    if out.is_dir():
        raise OtaError(f"{out} is a folder; name a file such as moments.safetensors")
    budget, cache = parse_memory(memory), places(home).cache
    with ExitStack() as stack:
        streams = None if fetch else stack.enter_context(Streams(cache=cache, memory=budget))
        source_of = streams.source_of if streams else None

        def bring(model: str, what: str) -> Path:
            if streams is not None and storage.is_s3(model):
                return streams.model(model).path
            return storage.fetch(model, cache=cache, progress=partial(progress, what)).path

        path = Path(source).expanduser()
        folder = path.parent
        if not path.is_file():
            folder = bring(source, "fetch")
            found = find_moments(folder)
            if found is None:
                raise MomentsError(none_found(source))
            path = found
            if streams is not None:
                streams.settle(moments_files(path), partial(progress, "fetch"))
        layout = partial(parameter_layout, folder) if (folder / "config.json").is_file() else None
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OtaError(f"{out.parent} cannot be written to ({error}); choose another output") from None
        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        try:
            started = time.perf_counter()
            report = engine.compress_moments(
                path,
                temporary,
                method=method,
                rank=rank,
                layout=layout,
                source_of=source_of,
                memory=memory,
                progress=progress,
            )
            seconds = {"compress": time.perf_counter() - started}
            agreed = None
            if base is not None:
                from ota_core.analysis.agreement import agreements  # with it comes torch

                reference = bring(base, "fetch base")
                if streams is not None:
                    streams.settle([*weight_files(folder), *weight_files(reference)], partial(progress, "fetch"))
                stream = Stream(memory=budget, progress=progress)
                with (
                    closing(open_moments(path, layout=layout, source_of=source_of)) as full,
                    closing(open_compressed(temporary)) as compressed,
                    closing(Checkpoint(folder, source_of)) as expert,
                    closing(Checkpoint(reference, source_of)) as start,
                ):
                    stream.droppable = [full.drop_pages, compressed.drop_pages, expert.drop_pages, start.drop_pages]
                    [agreed] = agreements(full, [compressed], expert, start, density=density, stream=stream)
                seconds["compare"] = time.perf_counter() - started - seconds["compress"]
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)
    return Compressed(report, agreed, seconds, streams.notes if streams else [])


def mask_recipe(
    recipe: MergeRecipe, inputs: MergeInputs, out: Path, *, device: str, memory: str, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """Masks of every expert in the folder ``out``, with their densities in ``densities.json``."""
    check_apart(out, inputs)
    with new_folder(out, overwrite=overwrite) as folder:
        found = engine.mask(recipe, folder, inputs=inputs, device=device, memory=memory, progress=progress)
        (folder / "densities.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found
