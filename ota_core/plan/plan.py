"""Opens everything a merge reads and checks that it fits together, before a byte is written. All problems are reported at once."""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from ota_core.compute.blocks import matrix_shape, row_blocks
from ota_core.compute.descriptors import raise_limit
from ota_core.compute.stream import BLOCK_ELEMENTS, CACHE_ELEMENTS, Limits, Stream, parse_memory, pick_device
from ota_core.errors import CheckpointError, OtaError, raise_all
from ota_core.files.checkpoint import Checkpoint
from ota_core.fused.sources import KINDS
from ota_core.moments import Moments, choice_in
from ota_core.plan.estimated import unlike
from ota_core.plan.expert_moments import check_moments, moments_problems, open_expert
from ota_core.plan.expert_scales import ExpertScales, scales_for
from ota_core.plan.fit.chat_template import chat_template
from ota_core.plan.fit.config import config_problems
from ota_core.plan.fit.names import agree
from ota_core.plan.fit.quantised import quantised_problems
from ota_core.plan.fit.tensors import tensor_jobs
from ota_core.plan.guard import Guard
from ota_core.plan.inputs import ExpertInput, MergeInputs, ModelInput
from ota_core.plan.masks import MaskFile
from ota_core.plan.sliced.assembly import Assembly, assemble, own_jobs, sliced_jobs
from ota_core.plan.views import Block, ExpertView, ModelView, TensorJob
from ota_core.plan.vocabulary.match import Vocabulary, is_vocabulary_tensor, match, tensor_names, tied_tensors
from ota_core.plan.vocabulary.wanted import Wanted
from ota_core.recipe.methods import FFG, WITHOUT_BASE
from ota_core.recipe.recipe import MergeRecipe


@dataclass(kw_only=True)
class MergePlan:
    """A merge that is ready to run: open inputs, the output's tensors, and how the work is cut."""

    recipe: MergeRecipe
    inputs: MergeInputs
    base: ModelView | None
    experts: list[ExpertView]
    jobs: list[TensorJob]
    vocabulary: Vocabulary | None
    stream: Stream
    device: str
    scratch: Path | None = None
    """A folder for what the merge keeps on disk while it runs; none means the system's."""
    notes: list[str] = field(default_factory=list)
    scales: ExpertScales | None = None
    """By what each expert's part of the merged edit is multiplied, where the recipe names a file of scales."""
    guard: Guard | None = None
    """Who is told of numbers that are not finite; None where the recipe allows them."""
    part: frozenset[str] | None = None
    """The tensors that are worked on here, where a merge is spread over machines; None: all."""
    assembly: Assembly | None = None
    """What each tensor is merged of, where the recipe has slices."""

    @property
    def models(self) -> list[ModelView]:
        """Base first, then the experts."""
        return [*([self.base] if self.base else []), *self.experts]

    def expert(self, index: int) -> ExpertView:
        """The expert at this position of the recipe."""
        return next(expert for expert in self.experts if expert.index == index)

    def is_here(self, job: TensorJob) -> bool:
        """Whether this tensor is worked on here."""
        return self.part is None or job.name in self.part

    def merged_jobs(self) -> list[TensorJob]:
        """The floating-point tensors that are worked on here."""
        return [job for job in self.jobs if not job.copy and self.is_here(job)]

    def canonical_jobs(self) -> list[TensorJob]:
        """The parameters behind them, each once: a tied tensor's own is among them, wherever that is worked on."""
        names = {job.canonical for job in self.merged_jobs()}
        return [job for job in self.jobs if job.name == job.canonical and job.name in names]

    def curved(self, expert: ExpertView) -> list[TensorJob]:
        """The tensors that carry curvature in an expert, here or elsewhere, each parameter once: what N of docs/methods.md section 3 counts."""
        every = not self.recipe.needs_moments and self.recipe.merge_method in FFG  # ranked by magnitude alone
        own = [job for job in self.jobs if not job.copy and job.name == job.canonical]
        return [job for job in own if every or expert.has_curvature(job.name)]

    def blocks(self, jobs: Sequence[TensorJob], multiple: int = 1) -> list[Block]:
        """Every block of these tensors. ``multiple``: rows of a block, but a tensor's last, are a multiple of this."""
        result = []
        for job in jobs:
            cols = max(1, matrix_shape(job.shape)[1])
            step = max(1, self.stream.block_elements // cols)
            step = -(-step // multiple) * multiple
            result += [(job, a, b) for a, b in row_blocks(job.shape, step * cols)]
        return result

    def prefetch(self, block: Block, *, curvature: bool = False) -> None:
        """A hint that every model's rows of this block are read next, with ``curvature`` their second moments too."""
        for view in self.models:
            view.prefetch(*block)
        for expert in self.experts if curvature else ():
            expert.prefetch_curvature(*block)

    def can_fuse(self, experts: Sequence[ExpertView], job: TensorJob, *, base: bool = True) -> bool:
        """Whether the compiled passes give the same bits for this tensor: on the CPU, types that they load.

        ``base``: whether the rule needs the base; rows that an expert lacks are the base's under every rule.
        """
        if self.device != "cpu" or (base and self.base is None):
            return False
        models: list[ModelView] = [*experts]
        if self.base is not None and (base or self.matched_rows(job)):
            models.append(self.base)
        return all(m.checkpoint.info(m.stored_name(job.name)).dtype in KINDS for m in models)

    def matched_rows(self, job: TensorJob) -> bool:
        """Whether the rows of this tensor are matched by token in some model."""
        return is_vocabulary_tensor(job.name) and not all(view.as_it_stands for view in self.models)

    def needs_torch(self) -> bool:
        """Whether some block goes through tensors: no compiled pass loads its type, or λ, row spaces or learned scales need products of matrices."""
        if self.scales is not None or self.recipe.auto or self.recipe.refined:
            return True
        if self.assembly is not None:
            return not all(cut.loads(KINDS) for cut in self.assembly.cuts)
        base = self.base is not None and self.recipe.merge_method not in WITHOUT_BASE
        return not all(self.can_fuse(self.experts, job, base=base) for job in self.merged_jobs())

    @property
    def tensor_elements(self) -> int:
        """How many elements a rule on tensors works on at once: on the CPU what stays in the cache, and within the budget."""
        if self.device != "cpu":
            return self.stream.block_elements
        room = self.stream.memory // 4 // self.stream.threads // tensor_bytes_per_element(len(self.experts))
        return max(1, min(CACHE_ELEMENTS, room, self.stream.block_elements))

    @property
    def source_view(self) -> ModelView:
        """The model whose configuration and tokenizer the output takes."""
        return self.models[self.vocabulary.source if self.vocabulary else 0]

    def source(self) -> Checkpoint:
        """Its tensors and folders."""
        return self.source_view.checkpoint

    def source_folder(self) -> Path:
        """The folder of that configuration."""
        return self.source().config_folder


@contextmanager
def open_plan(
    recipe: MergeRecipe,
    inputs: MergeInputs,
    *,
    with_moments: bool = True,
    need_moments: bool = True,
    **limits: Unpack[Limits],
) -> Iterator[MergePlan]:
    """Open all inputs and check them. Raises OtaError that lists every problem found; closes the files at the end.

    ``with_moments=False`` leaves second moments unopened, for planning before they are at hand; ``need_moments=False`` takes experts
    for which none are given, too: an analysis does without, a merge cannot.
    """
    memory, device = parse_memory(limits.get("memory", "2GiB")), pick_device(limits.get("device", "cpu"))
    stream = Stream(memory=memory, progress=limits.get("progress"))
    most = BLOCK_ELEMENTS
    if device != "cpu":
        from ota_core.compute import gpu

        gpus, most = gpu.gpus_of(device), gpu.BLOCK_ELEMENTS
        stream.lanes, stream.threads = gpu.Lanes(gpus), gpu.BLOCKS_UNDER_WAY * len(gpus)
    stream.threads = limits.get("threads") or stream.threads
    stream.block_elements = limits.get("block_elements") or _block_elements(memory, stream.threads, len(recipe.models), most)
    raise_limit()
    with contextlib.ExitStack() as stack:
        problems: list[str] = []
        opened = [_open(item, problems, stack) for item in inputs.models]
        if problems and with_moments:
            problems += [problem for item in inputs.experts for problem in moments_problems(recipe, item)]
        raise_all(problems, CheckpointError)
        checkpoints = [checkpoint for checkpoint in opened if checkpoint is not None]
        if inputs.base is not None:
            problems += quantised_problems([item.name for item in inputs.models], checkpoints)
        for checkpoint in checkpoints:
            if (
                checkpoint.sharded and inputs.base
            ):  # it was trained from the base, whose configuration it has where it brings none
                checkpoint.config = checkpoint.config or checkpoints[0].config
        names = [item.name for item in inputs.models]
        vocabulary = _vocabulary(recipe, names, checkpoints)
        tensors = [tensor_names(checkpoint) for checkpoint in checkpoints]
        agreed = agree(names, checkpoints, vocabulary.source if vocabulary else 0, [item.parameters for item in inputs.models])
        maps = vocabulary.maps if vocabulary else (None,) * len(checkpoints)
        guard = None if recipe.allow_nonfinite else Guard()
        stream.settle = guard.settle if guard else None
        machine: dict[str, Any] = {"device": device, "count_read": stream.count_read, "guard": guard}
        common: list[dict[str, Any]] = [
            {"name": name, "checkpoint": checkpoint, "tied": tied_tensors(checkpoint), "row_map": row_map, **machine}
            for name, checkpoint, row_map in zip(names, checkpoints, maps, strict=True)
        ]
        base = ModelView(**common.pop(0)) if inputs.base else None
        correct = bool(recipe.setting("bias_correction"))
        own = list(zip(tensors, agreed.renamed, agreed.relaid, strict=True))[len(tensors) - len(common) :]
        experts = [
            ExpertView(**facts, index=i, bias_correction=correct, own_tensors=held, renamed=renamed, relaid=relaid)
            for i, (facts, (held, renamed, relaid)) in enumerate(zip(common, own, strict=True))
        ]
        views: list[ModelView] = [*([base] if base else []), *experts]
        for i, view in enumerate(views):
            view.filled = vocabulary.filled(i, views) if vocabulary else None
        for expert, item in zip(experts, inputs.experts if with_moments else (), strict=with_moments):
            if item.moments is None and not need_moments:
                continue
            open_expert(recipe, expert, item, problems, stack)
        first = views[vocabulary.source if vocabulary else 0]
        configs = [checkpoint.config for checkpoint in checkpoints]
        source = vocabulary.source if vocabulary else 0
        problems += config_problems(names, configs, source, recipe.ignore_config_differences or ())
        assembly = assemble(recipe, base, experts, first) if recipe.sliced else None
        if assembly is not None:
            jobs = sliced_jobs(recipe, assembly, first, vocabulary, problems)
            for expert in experts:
                check_moments(recipe, expert, own_jobs(expert), problems)
        else:
            jobs = tensor_jobs(recipe, views, first, vocabulary, agreed.first_alone, problems)
            for expert in experts:
                check_moments(recipe, expert, jobs, problems)
        if recipe.chat_template is not None:
            try:
                chat_template(recipe, [view.checkpoint.tokenizer_folder for view in views])
            except OtaError as error:
                problems.append(str(error))
        scales = None
        if inputs.scales is not None:
            parameters = [job.name for job in jobs if not job.copy and job.name == job.canonical]
            scales = scales_for(inputs.scales, [expert.name for expert in experts], parameters, problems)
        raise_all(problems, OtaError)
        opened_files: list[Checkpoint | Moments | MaskFile | None] = [*checkpoints]
        for expert in experts:
            opened_files += [expert.moments, expert.full_moments, expert.masks]
        stream.droppable = [item.drop_pages for item in opened_files if item is not None]
        plan = MergePlan(
            recipe=recipe, inputs=inputs, base=base, experts=experts, jobs=jobs,
            vocabulary=vocabulary, stream=stream, device=device, scales=scales, assembly=assembly, guard=guard,
        )  # fmt: skip
        if scales is not None and (other := scales.learned_for_other(recipe)):
            plan.notes.append(f"the scales in {inputs.scales} were learned for other settings: {', '.join(other)}")
        plan.notes += recipe.remarks()
        if (note := unlike(experts, recipe)) is not None:
            plan.notes.append(note)
        plan.notes += agreed.notes
        plan.notes += [f"{view.name}: {note}" for view in views for note in view.checkpoint.notes]
        plan.notes += [f"{item.name}: {note}" for item in inputs.experts if (note := _choice(item))]
        plan.notes += vocabulary.notes if vocabulary else ()
        if vocabulary and any(row_map is not None for row_map in vocabulary.maps):
            plan.notes.append("vocabularies differ: embedding rows are matched by token")
        yield plan


def _choice(item: ExpertInput) -> str | None:
    """Which of several checkpoint-* an expert's second moments are from."""
    if item.moments is None or not item.moments.is_relative_to(item.path):
        return None
    first, *_ = (*item.moments.relative_to(item.path).parts, "")
    choice = choice_in(item.path) if first.startswith("checkpoint-") else None
    return choice.note if choice and choice.name == first else None


def bytes_per_element(experts: int) -> int:
    """Memory that one element of a block takes: mapped or fetched θ and v of every model for this block and the next, and the output."""
    return 2 * (experts * (4 + 4) + 4) + 4


def tensor_bytes_per_element(experts: int) -> int:
    """The same for a rule on tensors: θ, v̂, p, score and mask of every expert in float64 and float32, and the results."""
    return experts * (8 + 8 + 8 + 4 + 4 + 1) + 64


def _block_elements(memory: int, threads: int, experts: int, most: int) -> int:
    return max(1, min(most, memory // 4 // threads // bytes_per_element(experts)))


def _open(item: ModelInput, problems: list[str], stack: contextlib.ExitStack) -> Checkpoint | None:
    try:
        checkpoint = item.opened()
    except CheckpointError as error:
        problems.append(f"{item.name}: {error}")
        return None
    stack.callback(checkpoint.close)
    return checkpoint


def _vocabulary(recipe: MergeRecipe, names: list[str], checkpoints: list[Checkpoint]) -> Vocabulary | None:
    models, said = [], Wanted.of(recipe)
    with_base = recipe.base_model is not None
    for name, checkpoint in zip(names, checkpoints, strict=True):
        embeddings = [n for n in checkpoint.names() if is_vocabulary_tensor(n)]
        if not embeddings and said is not None:
            raise CheckpointError(f"tokenizer: {name} has no embedding of tokens; leave out tokens and pad_to_multiple_of")
        if not embeddings:
            return None
        models.append((name, checkpoint.tokenizer_folder, checkpoint.info(embeddings[0]).shape[0]))
    source = recipe.tokenizer_source
    if source == "union":
        return match(models, source, said, with_base=with_base)
    if source == "base":
        return match(models, 0, said, with_base=with_base)
    wanted = source.removeprefix("model:")
    known = {name: i for i, name in enumerate(names)}
    offset = len(names) - len(recipe.models)
    known |= {entry.model: i + offset for i, entry in enumerate(recipe.models)}
    if wanted not in known:
        raise CheckpointError(f"tokenizer_source: no model '{wanted}'; the recipe's models are {', '.join(names)}")
    return match(models, known[wanted], said, with_base=with_base)


def checkpoint_problems(recipe: MergeRecipe, inputs: MergeInputs) -> list[str]:
    """What ``open_plan`` would find wrong with the checkpoints alone: for who raises already because of something else."""
    try:
        with open_plan(recipe, inputs, with_moments=False):
            return []
    except OtaError as error:
        return list(error.problems)
