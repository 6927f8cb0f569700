"""Extracting an adapter: two models opened wherever they lie, and the folder with its record."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ota_core.artifact import ALGORITHM_VERSION, Record, fingerprint, folder_files, write_record
from ota_core.compute.stream import Progress
from ota_core.engine.engine import environment
from ota_core.errors import OtaError
from ota_core.extract.extract import ExtractOptions, ExtractReport, extract_into
from ota_core.extract.names import as_loaded
from ota_core.files.checkpoint import Checkpoint
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import parse_recipe
from tasks.merging.inputs import assemble, fetch_all
from tasks.settings import places
from tasks.storage.streaming.streams import Streams


@dataclass(frozen=True)
class Pair:
    """A model and its base, opened."""

    inputs: MergeInputs
    merged: Checkpoint
    base: Checkpoint
    base_name: str
    """As the adapter calls it: what was asked for, with a folder's whole path."""
    notes: list[str]
    bare: frozenset[str]
    """Parameters that no layer of torch's holds."""


@contextmanager
def opened_pair(
    merged: str, base: str, *, home: Path | None, memory: int, fetch: bool = False, progress: Progress | None = None
) -> Iterator[Pair]:
    """Both models: folders, ``s3://…`` (read by ranges, unless ``fetch``), ``org/name``, or base+adapter. Raises OtaError."""
    recipe = parse_recipe({"merge_method": "linear", "base_model": base, "models": [{"model": merged}]})
    cache = places(home).cache
    with ExitStack() as stack:
        streams = None if fetch else stack.enter_context(Streams(cache=cache, memory=memory))
        fetched = fetch_all(recipe, cache=cache, recipe_dir=None, streams=streams, progress=progress)
        inputs = assemble(recipe, fetched, cache=cache, recipe_dir=None, streams=streams)
        assert inputs.base is not None
        start, trained = (stack.enter_context(closing(one.opened())) for one in (inputs.base, inputs.experts[0]))
        name = fetched[0].resolved if Path(fetched[0].resolved).is_dir() else fetched[0].source
        named, bare = [], frozenset[str]()
        for model, input_ in ((start, inputs.base), (trained, inputs.experts[0])):
            try:
                if input_.parameters is not None:
                    loaded = input_.parameters()
                    as_loaded(model, loaded)
                    bare |= loaded.bare
            except OtaError as error:
                named.append(f"{input_.name}: names are those of its files, as transformers cannot tell the model's ({error})")
        notes = [*named, *(streams.notes if streams else []), *start.notes, *trained.notes]
        yield Pair(inputs=inputs, merged=trained, base=start, base_name=name, notes=notes, bare=bare)


def extract_adapter(
    folder: Path, pair: Pair, options: ExtractOptions, *, memory: int, device: str = "cpu", progress: Progress | None = None
) -> ExtractReport:
    """The adapter in an empty folder, its record last. Raises OtaError."""
    report = extract_into(
        folder,
        pair.merged,
        pair.base,
        options,
        memory=memory,
        device=device,
        progress=progress,
        base_name=pair.base_name,
        bare=pair.bare,
    )
    pair.inputs.verify()  # what was read in S3 is still what was listed
    config = options.model_dump(mode="json")
    digests = {"base": str(pair.inputs.models[0].digest), "merged": str(pair.inputs.models[1].digest)}
    record = Record(
        kind="adapter", fingerprint=fingerprint("adapter", config, digests), algorithm_version=ALGORITHM_VERSION, config=config, inputs=digests,
        files=folder_files(folder), provenance=environment(device) | {"sources": {one.name: one.source for one in pair.inputs.models}},
        results=report.model_dump(mode="json"),
    )  # fmt: skip
    write_record(folder, record)
    return report
