"""What ``ota plan`` and ``ota inspect`` say. Nothing here reads weights."""

from collections import Counter
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from ota_core.artifact import RECORD, read_record
from ota_core.byte_source import SourceOf
from ota_core.checkpoint import Checkpoint, weight_files
from ota_core.compression import (
    DEFAULT_RANK,
    IN_MEMORY,
    METHODS,
    compressed_bytes,
    compression_label,
    compression_of,
    is_compressed,
    label_of,
    passes,
)
from ota_core.engine import peak_memory_gib
from ota_core.errors import CheckpointError, OtaError
from ota_core.masks import MaskFile
from ota_core.moments import Moments, find_moments, moments_files, open_moments
from ota_core.output import plan_files
from ota_core.plan import MergePlan, bytes_per_element, open_plan
from ota_core.recipe import NEEDS_MOMENTS, MergeRecipe
from ota_core.safetensors_io import FORMAT_KEY, SafetensorsFile
from ota_core.stream import parse_memory
from ota_core.views import ExpertView, ModelView
from tasks.architecture import parameter_layout
from tasks.inputs import assemble, fetch_all
from tasks.settings import places
from tasks.storage import fetch, is_s3
from tasks.streaming import Streams

GIB = 2**30
# What may be read of models in S3 to describe them: headers, steps, compressed second moments.
LITTLE = 256 * 2**20
# What the compiled loops and torch's own buffers take when a merge first uses them, in bytes.
KERNELS = 100 * 2**20


def describe_plan(recipe: MergeRecipe, recipe_dir: Path, memory: str, home: Path | None) -> list[str]:
    """Lines that say what the merge would do. Raises OtaError that lists every problem found."""
    budget, cache = parse_memory(memory), places(home).cache
    with Streams(cache=cache, memory=LITTLE, may_download=False) as streams:
        fetched = fetch_all(recipe, cache=cache, recipe_dir=recipe_dir, streams=streams, digests=False)
        inputs = assemble(recipe, fetched, cache=cache, recipe_dir=recipe_dir, streams=streams, digests=False)
        notes = list(streams.notes)
        pending = bool(streams.unread)
        if pending:
            notes.append("the second moments are not counted in the figures above")
        with open_plan(recipe, inputs, memory=budget, with_moments=not pending) as plan:
            lines = [
                f"{recipe.merge_method} of {', '.join(expert.name for expert in plan.experts)}"
                + (f" over {recipe.base_model}" if recipe.base_model else "")
            ]
            lines += [
                f"  {view.name}: {model.source if is_s3(model.source) else view.checkpoint.path}"
                for view, model in zip(plan.models, fetched, strict=True)
            ]
            notes = [*plan.notes, *([] if pending else _without_moments(plan)), *notes]
            return [
                *lines, *_bytes(plan, budget), *_options(plan), *(f"note: {note}" for note in notes), "no problems found"
            ]  # fmt: skip


def _without_moments(plan: MergePlan) -> list[str]:
    """Tensors of which an expert has no second moments: fine where training left them alone, which only the weights tell."""
    if plan.recipe.merge_method not in NEEDS_MOMENTS or plan.recipe.setting("missing_curvature") == "mean":
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
    moments = sum(4 * _moments_elements(expert) for expert in plan.experts)
    method, rank = plan.recipe.setting("compression"), plan.recipe.setting("rank")
    factors = _compressed(plan, method, rank) if method in IN_MEMORY else 0
    output = sum(job.elements * job.dtype.itemsize for job in plan.jobs)
    working = plan.stream.threads * plan.stream.block_elements * bytes_per_element(len(plan.experts))
    # Mapped pages are given back when so much was read; small inputs never reach that.
    mapped = min(plan.stream.mapped_bytes, weights + moments)
    peak = peak_memory_gib() + (working + factors + mapped + KERNELS) / GIB
    return [
        f"parameters: {sum(job.elements for job in plan.jobs):,} in {counted(len(plan.jobs), 'tensor')}",
        f"inputs: {_size(weights)} of weights, {_size(moments)} of second moments as float32; read in all passes: {_size(bytes_read(plan))}",
        f"output: {_size(output)} in {counted(len(plan_files(plan)), 'file')}",
        f"peak memory: about {peak:.2f} GiB (budget {budget / GIB:.2f} GiB for blocks and mapped pages)",
        *_choices(plan),
    ]


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
        lines.append(f"  {label}: {_size(size)}, {size / elements:.4f} bytes per parameter{note}")
    to_write = [e for e in plan.experts if e.moments is not None and not is_compressed(e.moments)]
    if chosen == "log8" and to_write:
        lines.append("  a merge in one process keeps the log8 form in the output's folder while it runs")
    return lines


def _compressed(plan: MergePlan, method: str, rank: int | None) -> int:
    """Bytes of all experts' second moments, which the merge may not need at all."""
    if plan.recipe.merge_method not in NEEDS_MOMENTS:
        return 0
    held = [expert.moments for expert in plan.experts if expert.moments is not None]
    return sum(compressed_bytes(tuple(shape), method, rank) for moments in held for shape in moments.shapes().values())


def bytes_read(plan: MergePlan) -> int:
    """Bytes of tensors that the merge reads, every pass counted, second moments as float32.

    Exact thresholds take two passes, which all experts share. Of a model large enough the first one only samples; it counts as a
    pass all the same: from S3, what lies between the samples is fetched with them.
    """
    recipe = plan.recipe
    # Every model once for the merge itself, but the base of a plain average; slerp once more for the angles.
    merged = plan.experts if recipe.merge_method == "linear" else plan.models
    total = sum(_weight_bytes(view) for view in merged) * (2 if recipe.merge_method == "slerp" else 1)
    base = _weight_bytes(plan.base) if plan.base else 0
    ranked = [expert for expert in plan.experts if _is_ranked(recipe, expert.index)]
    total += RANKING * (base + sum(_weight_bytes(expert) for expert in ranked)) if ranked else 0
    for expert in plan.experts:
        total += (_norms(recipe, expert.index) + _full_masks(plan, expert)) * (base + _weight_bytes(expert))
        total += _moments_read(plan, expert)
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
    if recipe.merge_method == "ota":
        return recipe.ffg(expert) and recipe.setting("density", expert) is not None
    if recipe.merge_method in {"breadcrumbs", "breadcrumbs_ties"}:
        return True
    return recipe.merge_method == "ties" and recipe.setting("density", expert) < 1


def _norms(recipe: MergeRecipe, expert: int) -> int:
    """Passes for the norms of ``rescale``."""
    return 1 if recipe.merge_method == "ota" and recipe.ffg(expert) and recipe.setting("rescale") else 0


def _full_masks(plan: MergePlan, expert: ExpertView) -> int:
    """Further looks at an expert in the merge, whose mask goes by other second moments than its weights."""
    recipe = plan.recipe
    full = recipe.merge_method == "ota" and recipe.ffg(expert.index) and recipe.setting("mask_curvature") == "full"
    return 1 if full and recipe.setting("compression") != "none" and expert.masks is None else 0


def _moments_read(plan: MergePlan, expert: ExpertView) -> int:
    """Bytes of an expert's second moments that come out of files: v as float32, and the code of ``log8``; factors are in memory."""
    recipe, moments = plan.recipe, expert.moments
    if recipe.merge_method not in NEEDS_MOMENTS or moments is None:
        return 0
    scored = recipe.ffg(expert.index) and recipe.setting("metric") == "curvature"
    scoring = (RANKING if _is_ranked(recipe, expert.index) else 0) + _norms(recipe, expert.index) if scored else 0
    normalising = 1 if recipe.merge_method == "ota" and recipe.setting("normalise") == "global" else 0
    method, rank = recipe.setting("compression"), recipe.setting("rank")
    shapes = [tuple(shape) for shape in moments.shapes().values()]
    apart = _full_masks(plan, expert)
    total = 4 * sum(prod(shape) for shape in shapes) * (scoring + (1 if scored else 0)) if apart else 0
    if not is_compressed(moments):
        total += sum(passes(shape, method, rank) * 4 * prod(shape) for shape in shapes)
    if method not in IN_MEMORY:
        total += (1 + normalising + (0 if apart else scoring)) * sum(compressed_bytes(shape, method, rank) for shape in shapes)
    return total


def _weight_bytes(view: ModelView) -> int:
    infos = [view.checkpoint.info(name) for name in view.checkpoint.names()]
    return sum(prod(info.shape) * info.dtype.itemsize for info in infos)


def _moments_elements(expert: ExpertView) -> int:
    """Elements of second moments that are not compressed yet."""
    if expert.moments is None or is_compressed(expert.moments):
        return 0
    return sum(prod(shape) for shape in expert.moments.shapes().values())


def _options(plan: MergePlan) -> list[str]:
    effective = plan.recipe.effective()
    lines = ["parameters of the merge: " + ", ".join(f"{key}={value}" for key, value in effective["parameters"].items())]
    for expert, values in zip(plan.experts, effective["experts"], strict=True):
        shown = {key: value for key, value in values.items() if value is not None}
        if shown:
            lines.append(f"  {expert.name}: " + ", ".join(f"{key}={value}" for key, value in shown.items()))
    return lines


def counted(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError


def describe_source(source: str, home: Path | None) -> list[str]:
    """What a checkpoint (a folder, ``s3://…`` or a Hugging Face id), a file of second moments or masks, or an artifact holds.

    Of a checkpoint in S3 only the headers are read. Raises OtaError when it is none of these.
    """
    path = Path(source).expanduser()
    if path.exists():
        return describe_path(path)
    if not is_s3(source) and (path.is_absolute() or source.count("/") != 1 or source.startswith(".")):
        raise CheckpointError(
            f"{source} does not exist; expected a checkpoint, a file of second moments or masks, or an artifact"
        )
    cache = places(home).cache
    if not is_s3(source):
        return _describe_checkpoint(fetch(source, cache=cache).path)
    with Streams(cache=cache, memory=LITTLE, may_download=False) as streams:
        return _describe_checkpoint(streams.model(source).path, streams)


def describe_path(path: Path) -> list[str]:
    """The same for what lies on this machine."""
    if path.is_file():
        return _describe_file(path)
    lines = _describe_record(path) if (path / RECORD).exists() else []
    ours = [file for file in sorted(path.glob("*.safetensors")) if _format(file)]
    if ours:
        return lines + [line for file in ours for line in _describe_file(file)]
    return lines if lines and not _has_weights(path) else lines + _describe_checkpoint(path)


def _format(path: Path) -> str:
    """The format that this project gave a safetensors file; empty for others'."""
    with SafetensorsFile(path) as file:
        return file.metadata.get(FORMAT_KEY, "")


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _describe_record(folder: Path) -> list[str]:
    record = read_record(folder)
    lines = [f"artifact: {record.kind} {record.fingerprint}, complete"]
    lines += [f"  {key}: {_plain(value)}" for key, value in record.config.items()]
    lines += [f"  input {name}: {digest}" for name, digest in record.inputs.items()]
    for name, report in record.results.get("densities", {}).items():
        lines.append(f"  density {name}: {report['density']:.6f} ({report['kept']:,} of {report['total']:,})")
    return lines


def _plain(value: Any) -> str:
    """A parameter, or several, without the marks of a programming language; what is not set is left out."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={_plain(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return "; ".join(_plain(item) for item in value)
    return "not set" if value is None else str(value)


def _describe_checkpoint(folder: Path, streams: Streams | None = None) -> list[str]:
    source_of = streams.source_of if streams else None
    checkpoint = Checkpoint(folder, source_of)
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
    size = sum(prod(info.shape) * info.dtype.itemsize for info in infos)
    lines = [
        f"checkpoint: {checkpoint.config.get('model_type', 'unknown model type')}, {sum(prod(info.shape) for info in infos):,} parameters "
        f"in {counted(len(infos), 'tensor')} and {counted(len(checkpoint.files), 'file')}, {_size(size)}",
        "  data types: " + ", ".join(f"{dtype} ({counted(count, 'tensor')})" for dtype, count in dtypes.items()),
    ]
    if "tie_word_embeddings" in checkpoint.config:
        lines.append(f"  tied embeddings: {'yes' if checkpoint.config['tie_word_embeddings'] else 'no'}")
    checkpoint.close()
    found = find_moments(folder)
    if found is None:
        return lines
    if streams is not None:
        streams.settle(moments_files(found))
        if streams.unread:
            return [*lines, *(f"  {note}" for note in streams.notes)]
    return lines + [f"  {line}" for line in _describe_moments(found, folder, source_of)]


def _describe_file(path: Path) -> list[str]:
    if path.suffix == ".safetensors" and _format(path).startswith("masks/"):
        masks = MaskFile(path)
        total = sum(prod(shape) for shape in masks.shapes.values())
        kept = sum(masks.density(name) * prod(shape) for name, shape in masks.shapes.items())
        share = kept / max(total, 1)
        return [
            f"{path.name}: FFG mask of {masks.header['expert']}: keeps {kept:,.0f} of {total:,} elements (density {share:.6f})"
        ]
    ours = path.suffix == ".safetensors" and bool(_format(path))
    if not ours and _is_weights(path):
        return [f"{path.name} holds weights; the checkpoint that it belongs to:", *_describe_checkpoint(path.parent)]
    return _describe_moments(path, path.parent)


def _is_weights(path: Path) -> bool:
    try:
        return path in weight_files(path.parent)
    except OtaError:
        return False


def _describe_moments(path: Path, folder: Path, source_of: SourceOf | None = None) -> list[str]:
    layout = partial(parameter_layout, folder) if (folder / "config.json").exists() else None
    try:
        moments: Moments = open_moments(path, layout=layout, source_of=source_of)
    except OtaError as error:
        raise type(error)(f"{path} is neither a mask file nor second moments that can be read: {error}") from None
    shapes = moments.shapes()
    steps = sorted({step for name in shapes if (step := moments.step(name)) is not None})
    total = sum(prod(shape) for shape in shapes.values())
    how = label_of(moments) if compression_of(moments) else "as the trainer left them"
    size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())
    known = f"β₂ {moments.beta2 if moments.beta2 is not None else 'unknown'}, step {'–'.join(map(str, steps)) or 'unknown'}"
    line = (
        f"{path.name}: second moments of {total:,} parameters in {counted(len(shapes), 'tensor')}, {how}, {_size(size)}, {known}"
    )
    moments.close()
    return [line]
