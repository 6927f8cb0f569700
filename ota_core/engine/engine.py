"""The stages of a merge as functions of files: compress, mask, merge. Fused in one process or staged through files, the same bytes.

merge: recipe and inputs → a complete Hugging Face folder. mask: recipe and inputs → one mask file per expert.
"""

import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

from pydantic import BaseModel, ConfigDict

from ota_core.artifact import ALGORITHM_VERSION, CARD, Record, folder_files, write_record, write_text_atomic
from ota_core.compute.stream import Limits, Progress, Stream, parse_memory, peak_memory_gib
from ota_core.engine.dropped import dropped_notes
from ota_core.engine.licences import Cards, read_cards
from ota_core.engine.model_card import model_card
from ota_core.engine.output import (
    Put,
    Shards,
    check_apart,
    copy_companions,
    merge_blocks,
    needs,
    plan_files,
    write_holes,
    write_weights,
)
from ota_core.engine.ties import check_ties
from ota_core.errors import OtaError
from ota_core.files.architecture import is_embedding
from ota_core.files.byte_source import SourceOf
from ota_core.files.checkpoint import read_json
from ota_core.files.place import check_free, new_folder
from ota_core.files.room import Need, check_room, full_disk
from ota_core.files.writer import MAX_SHARD_BYTES, write_index
from ota_core.moments import open_moments
from ota_core.moments.compression import CompressionReport, is_compressed, kept_as_trained, label_of, write_compressed
from ota_core.moments.match import Layout
from ota_core.plan.found import Found
from ota_core.plan.inputs import LayoutOf, MergeInputs, merge_identity, resolve_local
from ota_core.plan.masks import MaskWriter
from ota_core.plan.plan import MergePlan, open_plan
from ota_core.plan.prepare import block_mask, prepare_curvature
from ota_core.plan.scoring import ffg_scoring
from ota_core.plan.views import Block, ExpertView, block_elements
from ota_core.recipe.recipe import MergeRecipe
from ota_core.rules.base import Rule
from ota_core.rules.ota import density_report
from ota_core.rules.rule import rule_of

Opens = Callable[[Path, Path, Mapping[str, tuple[int, ...]], int | None], list[str]]
"""Looks at a merged folder as who loads it will (``tasks/merging/opened.py``). Raises OtaError, returns notes."""


class MergeReport(BaseModel):
    """What a merge did. ``results`` also stand in the record."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    results: dict[str, Any]
    seconds: dict[str, float]
    peak_memory_gib: float
    notes: list[str]

    @property
    def densities(self) -> dict[str, Any]:
        """Expert → threshold, density, kept, total, per_tensor; empty without FFG."""
        found: dict[str, Any] = self.results.get("densities", {})
        return found


def merge(
    recipe: MergeRecipe,
    out: Path,
    *,
    recipe_dir: Path | None = None,
    inputs: MergeInputs | None = None,
    layout_of: LayoutOf | None = None,
    overwrite: bool = False,
    shard_size: int = MAX_SHARD_BYTES,
    opens: Opens | None = None,
    **limits: Unpack[Limits],
) -> MergeReport:
    """Merge and write the folder ``out``: shards, configuration, tokenizer, model card, and ``record.json`` last.

    inputs: local files; without them the recipe's models must be folders, looked up beside ``recipe_dir`` and here. Nothing of the result
    depends on ``limits`` (but for one unit in the last place of the output type on a GPU). Raises OtaError, with all problems
    at once, before anything is written; ``opens`` looks at the complete folder before it takes its name; ``out`` appears complete or not at all.
    """
    check_free(out, overwrite=overwrite)
    inputs = inputs or resolve_local(recipe, recipe_dir, layout_of)
    check_apart(out, inputs)
    with full_disk(out), new_folder(out, overwrite=overwrite) as folder:
        report = merge_into(folder, recipe, inputs, shard_size=shard_size, opens=opens, **limits)
        inputs.verify()
        identity, config, digests = merge_identity(recipe, inputs, shard_size)
        provenance = {
            **environment(limits.get("device", "cpu")),
            "sources": sources(inputs),
            "recipe": described(recipe),
            "seconds": report.seconds,
            "notes": report.notes,
        }
        record = Record(
            kind="merged",
            fingerprint=identity,
            algorithm_version=ALGORITHM_VERSION,
            config=config,
            inputs=digests,
            files=folder_files(folder),
            provenance=provenance,
            results=report.results,
        )
        write_record(folder, record)
    return report


def merge_into(
    folder: Path,
    recipe: MergeRecipe,
    inputs: MergeInputs,
    *,
    shard_size: int = MAX_SHARD_BYTES,
    opens: Opens | None = None,
    **limits: Unpack[Limits],
) -> MergeReport:
    """Write everything of a merged model but its record into an empty folder. Who calls owns the folder: its name, record and removal."""
    with _prepared(recipe, inputs, folder, limits) as (plan, rule, prepare):
        cards = noted_cards(plan)  # before the weights: what somebody wrote must not end what took hours
        started = time.perf_counter()
        shards = plan_files(plan, shard_size)
        write_weights(plan, rule, folder, shards)
        fingerprint, results = complete_folder(plan, rule, rule.found(), folder, shards, shard_size, opens, cards)
        seconds = {"prepare": prepare, "merge": time.perf_counter() - started}
        return MergeReport(
            fingerprint=fingerprint, results=results, seconds=seconds, peak_memory_gib=peak_memory_gib(), notes=plan.notes
        )


def merge_into_memory(recipe: MergeRecipe, inputs: MergeInputs, put: Put, **limits: Unpack[Limits]) -> MergeReport:
    """Merge, and hand every tensor's rows to ``put`` as ``merge_into`` would write them, to the bit; nothing is written.

    ``put`` is called from several threads, once for every row of every tensor. Raises OtaError before the first call for what is wrong
    with the inputs; what a call has taken before a later error is part of no whole merge.
    """
    with _prepared(recipe, inputs, None, limits) as (plan, rule, prepare):
        started = time.perf_counter()
        merge_blocks(plan, rule, plan.jobs, put)
        fingerprint, _, _ = merge_identity(recipe, inputs)
        seconds = {"prepare": prepare, "merge": time.perf_counter() - started}
        return MergeReport(
            fingerprint=fingerprint, results=rule.results(rule.found()), seconds=seconds, peak_memory_gib=peak_memory_gib(), notes=plan.notes
        )  # fmt: skip


def outline_into(folder: Path, recipe: MergeRecipe, inputs: MergeInputs) -> None:
    """The folder that ``merge_into`` would write, with holes for weights: what ``merge_into_memory`` needs a model from, in kilobytes.

    The first and the last row of every tensor hold numbers of its own (``output.marks``), so that a loader can be watched: whether it keeps a
    tensor as the file has it. Raises OtaError.
    """
    with open_plan(recipe, inputs, with_moments=False) as plan:
        shards = plan_files(plan)
        write_holes(folder, shards)
        write_index(folder, shards)
        copy_companions(plan, folder)


@contextmanager
def _prepared(
    recipe: MergeRecipe, inputs: MergeInputs, scratch: Path | None, limits: Limits
) -> Iterator[tuple[MergePlan, Rule, float]]:
    """The opened plan and its rule, ready for the first block, and the seconds that took."""
    started = time.perf_counter()
    with open_plan(recipe, inputs, **limits) as plan:
        plan.scratch = scratch
        check_ties(plan)
        if scratch is not None:
            check_room(needs(plan, scratch))
        rule = rule_of(plan)
        rule.prepare()
        yield plan, rule, time.perf_counter() - started


def complete_folder(
    plan: MergePlan, rule: Rule, found: Found, folder: Path, shards: Shards, shard_size: int, opens: Opens | None, cards: Cards
) -> tuple[str, dict[str, Any]]:
    """Everything beside the weights but the record: index, configuration, tokenizer, model card. Returns fingerprint and results."""
    write_index(folder, shards)
    copy_companions(plan, folder)
    plan.notes += dropped_notes(plan)
    if opens is not None and _differs(plan, folder):
        rows = next((job.shape[0] for job in plan.jobs if is_embedding(job.name)), None)
        plan.notes += opens(folder, plan.source_folder(), {job.name: job.shape for job in plan.jobs}, rows)
    results = rule.results(found)
    identity, _, _ = merge_identity(plan.recipe, plan.inputs, shard_size)
    write_text_atomic(folder / CARD, model_card(plan.recipe, plan.inputs, results, identity, cards=cards))
    return identity, results


def noted_cards(plan: MergePlan) -> Cards:
    """The inputs' own cards; what cannot be read of them is a note."""
    cards = read_cards(plan.inputs)
    plan.notes += [card.note for card in cards.values() if card.note is not None]
    return cards


def _differs(plan: MergePlan, folder: Path) -> bool:
    """Whether a merged folder differs from its source's in more than numbers: only then can it fail to open where that opens.

    Building a class without weights takes seconds, which most merges would pay for nothing.
    """
    source, config = plan.source(), folder / "config.json"
    written = read_json(config) if config.exists() else {}
    settings = {*source.config, *written} - {"dtype", "torch_dtype", "quantization_config"}
    shapes = {name: tuple(source.info(name).shape) for name in source.names()}
    return bool(
        plan.assembly is not None
        or plan.recipe.chat_template is not None
        or (plan.vocabulary and (plan.vocabulary.added or plan.vocabulary.source))
        or {job.name: tuple(job.shape) for job in plan.jobs} != shapes
        or source.quantised is not None
        or any(source.config.get(key) != written.get(key) for key in settings)
        or "auto_map" in source.config
    )


def described(recipe: MergeRecipe) -> dict[str, Any]:
    """The recipe as a record keeps it: what it says, in JSON."""
    return recipe.model_dump(mode="json", by_alias=True, exclude_none=True)


def mask(
    recipe: MergeRecipe,
    out: Path,
    *,
    inputs: MergeInputs,
    only: str | None = None,
    **limits: Unpack[Limits],
) -> dict[str, Any]:
    """Write ``<expert>.safetensors`` with the FFG mask of every expert that FFG masks (or of ``only`` one) into the folder ``out``.

    Returns expert → threshold, realised density, counts. Raises OtaError; a recipe without FFG has no masks to write.
    """
    if not any(recipe.ffg(i) for i in range(len(recipe.models))):
        raise OtaError("the recipe has no FFG masks: merge_method must be ota, with a density below 1 or a precond_threshold")
    recipe.check_uniform("a file of masks")
    found: dict[str, Any] = {}
    with open_plan(recipe, inputs, **limits) as plan:
        plan.scratch = out
        bits = sum(-(-job.elements // 8) for job in plan.merged_jobs())
        check_room([*needs(plan, out)[2:], Need(out, bits * sum(recipe.ffg(i) for i in range(len(recipe.models))), "the masks")])
        if only is not None:
            plan.experts = [expert for expert in plan.experts if expert.name == only]
        plan.experts = [expert for expert in plan.experts if recipe.ffg(expert.index)]
        facts = prepare_curvature(plan)
        for expert in plan.experts:
            found[expert.name] = _write_mask(plan, expert, facts, out / f"{expert.name}.safetensors")
    return found


def _write_mask(plan: MergePlan, expert: ExpertView, facts: Any, path: Path) -> dict[str, Any]:
    jobs = plan.curved(expert)
    taus = facts.thresholds[expert.index]
    kept: dict[str, int] = {}
    header = {"expert": expert.name, "thresholds": {n: _json(t) for n, t in taus.items()}}

    def work(block: Block) -> tuple[str, int]:
        mask, kept = block_mask(plan, facts, expert, block)
        writer.write(block[0].name, block[1], mask)
        return block[0].name, kept

    scoring = ffg_scoring(plan)
    with MaskWriter(path, {job.name: job.shape for job in jobs}, header) as writer:
        counts = plan.stream.map(
            work,
            plan.blocks(jobs, multiple=8),
            what=f"mask {expert.name}",
            size=block_elements,
            ahead=lambda block: scoring.prefetch([expert.index], block),
        )
    for name, count in counts:
        kept[name] = kept.get(name, 0) + count
    return density_report(plan, expert, taus, kept)


def _json(tau: float) -> float | str:
    return tau if tau != float("inf") else "inf"


def compress_moments(
    source: Path,
    out: Path,
    *,
    method: str,
    rank: int | None = None,
    layout: Layout = None,
    source_of: SourceOf | None = None,
    tensors: Collection[str] | None = None,
    memory: str | int = "2GiB",
    progress: Progress | None = None,
) -> CompressionReport:
    """Compress the second moments in ``source`` into the safetensors file ``out``, by any method of ``ota_core.moments.compression``.

    rank: of ``rank_k``, 4 by default; ``none`` writes v under the model's names.
    layout: the model's parameters, or a function that builds them, for optimizer states that number them.
    source_of: where the bytes of v come from, if not from the files themselves.
    tensors: the names of the weights, which v gets, too. Raises MomentsError.
    """
    moments = open_moments(source, layout=layout, source_of=source_of, tensors=tensors)
    try:
        stream = Stream(memory=parse_memory(memory), progress=progress, droppable=[moments.drop_pages])
        if is_compressed(moments) and not kept_as_trained(moments):
            raise OtaError(f"{source} is compressed with {label_of(moments)} already; compress the full second moments instead")
        return write_compressed(moments, out, method=method, rank=rank, stream=stream)
    finally:
        moments.close()


def environment(device: str) -> dict[str, Any]:
    """Where and with what a stage ran; it never decides the bytes."""
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "device": device,
    }


def sources(inputs: MergeInputs) -> dict[str, str]:
    """Where each input came from, as the recipe calls it."""
    return {model.name: model.source for model in inputs.models}
