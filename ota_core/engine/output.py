"""The output folder of a merge: weights as they are computed, then everything a Hugging Face folder needs, the record last."""

import contextlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ota_core.compute.blocks import matrix_shape
from ota_core.engine.companions import CODE, bring_template, set_dtype, set_rows, write_json
from ota_core.errors import CheckpointError, OtaError
from ota_core.files.checkpoint import CONFIG_FILES, SENTENCES, TOKENIZER_PATTERNS, companion_files, read_json
from ota_core.files.quantised.settings import without_quantisation
from ota_core.files.room import Need
from ota_core.files.rows import Rows
from ota_core.files.tokens import add_tokens
from ota_core.files.writer import MAX_SHARD_BYTES, SafetensorsWriter, TensorSpec, plan_shards
from ota_core.moments.compression import compressed_bytes, compression_of
from ota_core.plan.fit.chat_template import chat_template, write_template
from ota_core.plan.guard import not_finite, unfit_output
from ota_core.plan.inputs import ExpertInput, MergeInputs
from ota_core.plan.plan import MergePlan
from ota_core.plan.sliced.layers import with_layers
from ota_core.plan.views import Block, ModelView, TensorJob, block_elements

if TYPE_CHECKING:
    from ota_core.rules.base import Rule


def check_apart(out: Path, inputs: MergeInputs) -> None:
    """Raise OtaError when writing ``out`` would replace an input."""
    target = out.resolve()
    for item in inputs.models:
        held = [*item.folders, *([item.moments] if isinstance(item, ExpertInput) and item.moments else [])]
        if any(path.resolve().is_relative_to(target) for path in held):
            raise OtaError(f"{out} is, or holds, an input of the merge ({item.name}: {item.path}); choose another output")


ASIDE = 4 * 2**20
"""Bytes that are kept free for what is written beside weights and tokenizer."""


Shards = list[tuple[str, list[TensorSpec]]]
"""Weight files by name, and the tensors of each."""


def plan_files(plan: MergePlan, max_shard_bytes: int = MAX_SHARD_BYTES) -> Shards:
    """The output's weight files and the tensors of each."""
    return plan_shards([TensorSpec(job.name, job.shape, job.dtype) for job in plan.jobs], max_shard_bytes)


def needs(plan: MergePlan, folder: Path, *, whole: bool = True) -> list[Need]:
    """What a merge into ``folder`` takes of its disk; of a part of one its weights alone. Nothing is estimated: the sizes are known."""
    wanted = [
        Need(folder, sum(job.elements * job.dtype.itemsize for job in plan.jobs if plan.is_here(job)), "the merged weights")
    ]
    if not whole:
        return wanted
    beside = sum(path.stat().st_size for path in companion_files(plan.source_folder(), (*CONFIG_FILES, *TOKENIZER_PATTERNS)))
    wanted.append(Need(folder, beside + ASIDE, "tokenizer, record, card and page"))
    if plan.recipe.needs_moments and plan.recipe.setting("compression") == "log8":
        codes = sum(compressed_bytes(job.shape, "log8") for job in plan.merged_jobs())
        raw = [one for one in plan.experts if one.moments is not None and compression_of(one.moments) is None]
        wanted.append(
            Need(plan.scratch or Path(tempfile.gettempdir()), codes * len(raw), "log8 of the second moments, meanwhile")
        )
    return wanted


def write_weights(plan: MergePlan, rule: "Rule", folder: Path, shards: Shards) -> None:
    """Merge every block of these files and write it to its place; the bytes do not depend on the order of the blocks."""
    by_tensor: dict[str, SafetensorsWriter] = {}

    def put(name: str, start: int, rows: Rows) -> None:
        by_tensor[name].write_rows(name, start, rows.held)

    with contextlib.ExitStack() as stack:
        for file, specs in shards:
            writer = stack.enter_context(SafetensorsWriter(folder / file, specs, {"format": "pt"}))
            by_tensor |= dict.fromkeys((spec.name for spec in specs), writer)
        merge_blocks(plan, rule, [job for job in plan.jobs if job.name in by_tensor], put)


def write_holes(folder: Path, shards: Shards) -> None:
    """These files with every tensor in its place, of which only ``marks`` are written: the rest are zeros that take no room on the disk."""
    for file, specs in shards:
        with SafetensorsWriter(folder / file, specs, {"format": "pt"}, holes=True) as writer:
            for spec in specs:
                rows, _ = matrix_shape(spec.shape)
                for row in {0, rows - 1} if spec.dtype.is_floating_point and spec.bytes else ():
                    writer.write_rows(spec.name, row, marks(spec, row).held)


def marks(spec: TensorSpec, row: int) -> Rows:
    """Numbers that tell this row of this tensor from others: (1, C), multiples of 1/16 up to 1, which every type holds as they are."""
    import torch

    _, cols = matrix_shape(spec.shape)
    seed = zlib.crc32(f"{spec.name} {row}".encode())
    numbers = np.random.default_rng(seed).integers(1, 17, (1, cols)) / 16
    return Rows.of(torch.from_numpy(numbers).to(getattr(torch, spec.dtype.name)))


Put = Callable[[str, int, Rows], None]
"""Takes merged rows: the tensor's name, the first row, the rows (R, C) in the output's type. Called from several threads."""


def merge_blocks(plan: MergePlan, rule: "Rule", jobs: Sequence[TensorJob], put: Put) -> None:
    """Merge every block of these tensors and hand it on. The rule is prepared."""

    def work(block: Block) -> None:
        put(block[0].name, block[1], _copied(rule.plan_of(block[0]), block) if block[0].copy else _merged(plan, rule, block))

    def ahead(block: Block) -> None:
        if not block[0].copy:
            rule.prefetch(block)

    whole, blocks = rule.blocks(jobs)
    plan.stream.map(work, whole, what="regression", size=block_elements, ahead=ahead, at_once=rule.whole_at_once)
    plan.stream.map(work, blocks, what="merge", size=block_elements, ahead=ahead)


def _merged(plan: MergePlan, rule: "Rule", block: Block) -> Rows:
    job, start, stop = block
    shape = (stop - start, block_elements(block) // (stop - start))
    if plan.device == "cpu":
        rows = Rows(job.dtype, np.empty(shape, job.dtype.held))
        rule.merge(block, rows)
    else:
        from ota_core.compute import gpu

        rows = Rows.of(gpu.output_rows(*shape, job.dtype.name))
        rule.merge(block, rows)
        gpu.wait()
    if plan.guard is not None:
        plan.guard.settle()
        _check_finite(block, rows, plan.models)
    return rows


def _check_finite(block: Block, rows: Rows, models: Sequence[ModelView]) -> None:
    """Raise OtaError where rows of the output are not finite: of the model that holds such numbers, if one does (a copy looks at no input)."""
    job, start, stop = block
    if not_finite(rows):
        for view in models:
            view.check_finite(job.name, start, stop)
        raise unfit_output(job.name, start, rows)


def _copied(plan: MergePlan, block: Block) -> Rows:
    """Rows of a tensor that is not of floating point: every model must hold the same. What one model alone holds is its own."""
    job, start, stop = block
    first, *others = plan.models
    if job.alone:
        rows = plan.source_view.stored(job.name, start, stop)
        if plan.guard is not None and job.dtype.is_floating_point:
            _check_finite(block, rows, [plan.source_view])
        return rows
    rows = first.stored(job.name, start, stop)
    for view in others:
        if not np.array_equal(rows.held, view.stored(job.name, start, stop).held):
            raise CheckpointError(
                f"tensor '{job.name}' ({job.dtype}) differs between {first.name} and {view.name}; integer tensors cannot be merged"
            )
    return rows


def copy_companions(plan: MergePlan, folder: Path) -> None:
    """Configuration, tokenizer, chat template and the code of a model that brings its own, from the base or from the model of ``tokenizer_source``."""
    source = plan.source()
    for held, patterns in (
        (source.config_folder, (*CONFIG_FILES, *CODE, *SENTENCES)),
        (source.tokenizer_folder, TOKENIZER_PATTERNS),
    ):
        for path in companion_files(held, patterns):
            target = folder / path.relative_to(held)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    vocabulary = plan.vocabulary
    if vocabulary and vocabulary.added:
        add_tokens(folder, vocabulary.added)
        brought = [plan.models[i] for i in vocabulary.brought]
        note = bring_template(folder, [(view.name, view.checkpoint.tokenizer_folder) for view in brought])
        plan.notes += [note] if note else []
    if plan.recipe.chat_template is not None:
        write_template(folder, chat_template(plan.recipe, [view.checkpoint.tokenizer_folder for view in plan.models]))
    config = folder / "config.json"
    if config.exists():
        settings = without_quantisation(read_json(config))
        if plan.assembly is not None:
            settings = with_layers(settings, plan.assembly.taken)
        if vocabulary:
            set_rows(settings, vocabulary.rows)
        if plan.recipe.output_dtype:
            set_dtype(settings, plan.recipe.output_dtype)
        write_json(config, settings)
