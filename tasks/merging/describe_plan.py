"""What ``ota plan`` says, and the bytes that a merge reads. Nothing here reads weights."""

from math import prod
from pathlib import Path

from ota_core.compute.stream import parse_memory, peak_memory_gib
from ota_core.engine.dropped import dropped_notes
from ota_core.engine.output import plan_files
from ota_core.moments import Moments
from ota_core.moments.compression import (
    DEFAULT_RANK,
    IN_MEMORY,
    METHODS,
    compressed_bytes,
    compression_label,
    is_compressed,
    passes,
)
from ota_core.plan.matrices import all_matrices, at_once, bytes_of, operations
from ota_core.plan.plan import MergePlan, bytes_per_element, open_plan
from ota_core.plan.views import ExpertView, ModelView
from ota_core.plan.whole import columns_bytes, is_whole, surveys
from ota_core.recipe.methods import FFG, WITHOUT_BASE
from ota_core.recipe.recipe import MergeRecipe
from ota_core.recipe.varying import least
from tasks.merging.describe import LITTLE, binary_size, counted
from tasks.merging.inputs import assemble, estimated_ones, fetch_all
from tasks.settings import places
from tasks.storage.models import Fetched, is_s3
from tasks.storage.streaming.streams import Streams

GIB = 2**30
# What a merge loads that a plan does not, in bytes: numba with the compiled loops, and torch where a block needs it.
KERNELS, TORCH = 125 * 2**20, 225 * 2**20
CORE, GPU = 3e10, 2e13
"""Operations a second of float32 products, about: of one core of a server, of one GPU."""


def describe_plan(recipe: MergeRecipe, recipe_dir: Path, memory: str, home: Path | None) -> list[str]:
    """Lines that say what the merge would do. Raises OtaError that lists every problem found."""
    budget, cache = parse_memory(memory), places(home).cache
    with Streams(cache=cache, memory=LITTLE, may_download=False) as streams:
        fetched = fetch_all(recipe, cache=cache, recipe_dir=recipe_dir, streams=streams, digests=False)
        models = fetched[1:] if recipe.base_model is not None else fetched
        todo = dict.fromkeys(estimated_ones(recipe, models))
        inputs = assemble(
            recipe, fetched, cache=cache, recipe_dir=recipe_dir, streams=streams, digests=False, estimated=todo
        )  # fmt: skip
        notes = list(streams.notes)
        pending = bool(streams.unread or todo)
        if todo:
            names = ", ".join(inputs.experts[i].name for i in todo)
            notes.append(f"the second moments of {names} are estimated first: gradients of each model in memory (ota estimate)")
        if pending:
            notes.append("the second moments are not counted in the figures above")
        with open_plan(recipe, inputs, memory=budget, with_moments=not pending) as plan:
            lines = [
                f"{recipe.merge_method} of {', '.join(expert.name for expert in plan.experts)}"
                + (f" over {recipe.base_model}" if recipe.base_model else "")
            ]
            lines += [f"  {view.name}: {_place(model, view)}" for view, model in zip(plan.models, fetched, strict=True)]
            if recipe.varies:
                lines += _groups(plan)
            notes = [*plan.notes, *dropped_notes(plan, read=False), *([] if pending else _without_moments(plan)), *notes]
            return [
                *lines, *_bytes(plan, budget), *_options(plan), *(f"note: {note}" for note in notes), "no problems found"
            ]  # fmt: skip


def _groups(plan: MergePlan) -> list[str]:
    """How many different sets of values there are, and the layers of a result with slices. Raises RecipeError for values that contradict each other."""
    from ota_core.plan.groups import parts_of  # with it come the compiled loops

    groups = sum(len(part.groups) for part in parts_of(plan))
    lines = [f"values differ between tensors: {counted(groups, 'group')} of tensors that share theirs"]
    if plan.assembly is not None:
        lines += [f"layers of the result in {stack}: {len(layers)}" for stack, layers in plan.assembly.taken.items()]
    return lines


def outline(recipe: MergeRecipe, out: Path, recipe_dir: Path, home: Path | None) -> None:
    """The folder that the merge would write, with holes for weights. Raises OtaError."""
    cache = places(home).cache
    with Streams(cache=cache, memory=LITTLE, may_download=False) as streams:
        fetched = fetch_all(recipe, cache=cache, recipe_dir=recipe_dir, streams=streams, digests=False)
        todo = dict.fromkeys(estimated_ones(recipe, fetched[1:] if recipe.base_model is not None else fetched))
        inputs = assemble(
            recipe, fetched, cache=cache, recipe_dir=recipe_dir, streams=streams, digests=False, estimated=todo
        )  # fmt: skip
        out.mkdir(parents=True)
        from ota_core.engine.engine import outline_into  # with it come the compiled loops

        outline_into(out, recipe, inputs)


def _place(model: Fetched, view: ModelView) -> str:
    """Where a model lies, and what an adapter lies on."""
    place = model.source if is_s3(model.source) else str(view.checkpoint.path)
    return place if model.under is None else f"{place}, a LoRA adapter on {model.under.source}"


def _without_moments(plan: MergePlan) -> list[str]:
    """Tensors of which an expert has no second moments: fine where training left them alone, which only the weights tell."""
    if not plan.recipe.needs_moments or plan.recipe.setting("missing_curvature") == "mean" or plan.recipe.sliced:
        return []
    notes = []
    for expert in plan.experts:
        names = [job.name for job in plan.merged_jobs() if not expert.has_curvature(job.canonical)]
        if names:
            shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
            notes.append(
                f"{expert.name}: {counted(len(names), 'tensor')} without second moments ({shown}); the merge is refused if training changed them"
            )
    return notes


def _bytes(plan: MergePlan, budget: int) -> list[str]:
    weights = sum(_weight_bytes(view) for view in plan.models)
    moments = sum(_stored(expert.moments) for expert in plan.experts if expert.moments and not is_compressed(expert.moments))
    method, rank = plan.recipe.setting("compression"), plan.recipe.setting("rank")
    factors = _compressed(plan, method, rank) if method in IN_MEMORY else 0
    output = sum(job.elements * job.dtype.itemsize for job in plan.jobs)
    working = plan.stream.threads * plan.stream.block_elements * bytes_per_element(len(plan.experts))
    # Mapped pages are given back when so much was read; small inputs never reach that.
    mapped = min(plan.stream.mapped_bytes, weights + moments)
    loaded = KERNELS + (TORCH if plan.needs_torch() else 0)
    peak = peak_memory_gib() + (max(working, _regressions(plan), _wholes(plan)) + factors + mapped + loaded) / GIB
    return [
        f"parameters: {sum(job.elements for job in plan.jobs):,} in {counted(len(plan.jobs), 'tensor')}",
        f"inputs: {binary_size(weights)} of weights, {binary_size(moments)} of second moments; read in all passes: {binary_size(bytes_read(plan))}",
        f"output: {binary_size(output)} in {counted(len(plan_files(plan)), 'file')}",
        f"peak memory: about {peak:.2f} GiB (budget {budget / GIB:.2f} GiB for blocks and mapped pages)",
        *_whole_lines(plan),
        *_row_spaces(plan),
        *_choices(plan),
    ]


def _regressions(plan: MergePlan) -> int:
    """Memory of the regressions that are worked on at once."""
    if not plan.recipe.refined:
        return 0
    found = all_matrices(plan)
    return at_once(plan, found) * max(map(bytes_of, found), default=0)


def _wholes(plan: MergePlan) -> int:
    """Memory of the tensors that are worked on whole at once."""
    whole = [columns_bytes(job) for job in plan.merged_jobs() if is_whole(plan.recipe, job)]
    at_once = max(1, min(plan.stream.threads, plan.stream.memory // max(whole, default=1)))
    return at_once * max(whole, default=0)


def _whole_lines(plan: MergePlan) -> list[str]:
    """The largest tensor that is worked on whole."""
    whole = [job for job in plan.merged_jobs() if is_whole(plan.recipe, job)]
    if not whole:
        return []
    largest = max(whole, key=columns_bytes)
    return [
        f"{counted(len(whole), 'tensor')} worked on whole; the largest, {largest.name}, takes {binary_size(columns_bytes(largest))}"
    ]


def _row_spaces(plan: MergePlan) -> list[str]:
    """What the row-space regression takes: its matrices, the largest of them, and how long two kinds of machines need for all."""
    if not plan.recipe.refined:
        return []
    found = all_matrices(plan)
    if not found:
        return ["row-space regression: no tensor holds a matrix"]
    largest, work = max(found, key=bytes_of), sum(operations(one, len(plan.experts)) for one in found)
    return [
        f"row-space regression of {sum(one.count for one in found):,} weight matrices, {work:.1e} operations: "
        f"about {_duration(work / CORE / at_once(plan, found))} on this CPU, {_duration(work / GPU)} on a GPU",
        f"  the largest, {largest.job.name} ({largest.outputs} x {largest.inputs}), takes {binary_size(bytes_of(largest))} while it is worked on",
    ]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1, round(seconds))} s"


def _choices(plan: MergePlan) -> list[str]:
    """What the second moments of all experts take by each compression."""
    elements = _compressed(plan, "none", None) // 4
    if not elements:
        return []
    chosen = plan.recipe.setting("compression")
    lines = ["second moments by compression:"]
    for method in METHODS:
        rank = plan.recipe.setting("rank") or (DEFAULT_RANK if method == "rank_k" else None)
        size = _compressed(plan, method, rank)
        note = " (chosen)" if method == chosen else ""
        label = compression_label(method, rank)
        lines.append(f"  {label}: {binary_size(size)}, {size / elements:.4f} bytes per parameter{note}")
    to_write = [e for e in plan.experts if e.moments is not None and not is_compressed(e.moments)]
    if chosen == "log8" and to_write:
        lines.append("  a merge in one process keeps the log8 form in the output's folder while it runs")
    return lines


def _compressed(plan: MergePlan, method: str, rank: int | None) -> int:
    """Bytes of all experts' second moments, which the merge may not need at all."""
    if not plan.recipe.needs_moments:
        return 0
    held = [expert.moments for expert in plan.experts if expert.moments is not None]
    return sum(compressed_bytes(tuple(shape), method, rank) for moments in held for shape in moments.shapes().values())


def bytes_read(plan: MergePlan) -> int:
    """Bytes of tensors that the merge reads, every pass counted.

    Exact thresholds take two passes, which all experts share. Of a model large enough the first one only samples; it counts as a
    pass all the same: from S3, what lies between the samples is fetched with them.
    """
    recipe = plan.recipe
    # Every model once for the merge itself, but the base of a plain average, and as often again as tensors are looked at beforehand.
    merged = plan.experts if recipe.merge_method in WITHOUT_BASE else plan.models
    total = sum(_weight_bytes(view) for view in merged) * (1 + surveys(recipe))
    base = _weight_bytes(plan.base) if plan.base else 0
    ranked = [expert for expert in plan.experts if _is_ranked(recipe, expert.index)]
    total += RANKING * (base + sum(_weight_bytes(expert) for expert in ranked)) if ranked else 0
    for expert in plan.experts:
        total += (_norms(recipe, expert.index) + _full_masks(plan, expert)) * (base + _weight_bytes(expert))
        total += _moments_read(plan, expert)
    if recipe.auto:  # the sketch and the edits; of large matrices a part of the rows the second time, which counts as a pass
        total += 2 * (base + sum(_weight_bytes(expert) for expert in plan.experts))
    return total


RANKING = 2
"""Passes for exact thresholds."""


def mask_bytes_read(plan: MergePlan) -> int:
    """The same for the masks of all experts alone: each pair of base and expert once instead of the merge's one pass over all."""
    base = _weight_bytes(plan.base) if plan.base else 0
    pairs = sum(base + _weight_bytes(expert) for expert in plan.experts)
    return bytes_read(plan) - sum(_weight_bytes(view) for view in plan.models) + pairs


def _is_ranked(recipe: MergeRecipe, expert: int) -> bool:
    """Whether a threshold of this expert is a rank among its scores."""
    if recipe.merge_method in FFG:
        return recipe.ffg(expert) and recipe.setting("density", expert) is not None
    if recipe.merge_method in {"breadcrumbs", "breadcrumbs_ties"}:
        return True
    return recipe.merge_method == "ties" and least(recipe.setting("density", expert)) < 1


def _norms(recipe: MergeRecipe, expert: int) -> int:
    """Passes for the norms of ``rescale``."""
    trimmed = recipe.merge_method in {"ties", "breadcrumbs", "breadcrumbs_ties"}
    return 1 if (trimmed or (recipe.merge_method == "ota" and recipe.ffg(expert))) and recipe.setting("rescale") else 0


def _full_masks(plan: MergePlan, expert: ExpertView) -> int:
    """Further looks at an expert in the merge, whose mask goes by other second moments than its weights."""
    recipe = plan.recipe
    full = recipe.merge_method == "ota" and recipe.ffg(expert.index) and recipe.setting("mask_curvature") == "full"
    return 1 if full and recipe.setting("compression") != "none" and expert.masks is None else 0


def _moments_read(plan: MergePlan, expert: ExpertView) -> int:
    """Bytes of an expert's second moments that come out of files: v as it is stored, and the code of ``log8``; factors are in memory."""
    recipe, moments = plan.recipe, expert.moments
    if not recipe.needs_moments or moments is None:
        return 0
    scored = recipe.ffg(expert.index) and recipe.setting("metric") == "curvature"
    scoring = (RANKING if _is_ranked(recipe, expert.index) else 0) + _norms(recipe, expert.index) if scored else 0
    normalising = 1 if recipe.merge_method == "ota" and recipe.setting("normalise") == "global" else 0
    method, rank = recipe.setting("compression"), recipe.setting("rank")
    shapes = [tuple(shape) for shape in moments.shapes().values()]
    apart = _full_masks(plan, expert)
    total = _stored(moments) * (scoring + (1 if scored else 0)) if apart else 0
    if not is_compressed(moments):
        total += sum(passes(tuple(shape), method, rank) * moments.stored_bytes(name) for name, shape in moments.shapes().items())
    if method not in IN_MEMORY:
        held = _stored(moments) if method == "none" else sum(compressed_bytes(shape, method, rank) for shape in shapes)
        total += (1 + normalising + (0 if apart else scoring)) * held
    return total


def _weight_bytes(view: ModelView) -> int:
    infos = [view.checkpoint.info(name) for name in view.checkpoint.names()]
    return sum(prod(info.shape) * info.dtype.itemsize for info in infos)


def _stored(moments: Moments) -> int:
    """Bytes of second moments in their files."""
    return sum(moments.stored_bytes(name) for name in moments.shapes())


def _options(plan: MergePlan) -> list[str]:
    effective = plan.recipe.effective()
    lines = ["parameters of the merge: " + ", ".join(f"{key}={value}" for key, value in effective["parameters"].items())]
    for expert, values in zip(plan.experts, effective["experts"], strict=True):
        shown = {key: value for key, value in values.items() if value is not None}
        if shown:
            lines.append(f"  {expert.name}: " + ", ".join(f"{key}={value}" for key, value in shown.items()))
    return lines
