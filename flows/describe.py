"""What ``ota plan`` and ``ota inspect`` say. Nothing here reads weights."""

from collections import Counter
from functools import partial
from math import prod
from pathlib import Path

from ota_core.artifact import RECORD, read_record
from ota_core.checkpoint import Checkpoint
from ota_core.engine import peak_memory_gib
from ota_core.errors import CheckpointError, OtaError
from ota_core.inputs import MergeInputs
from ota_core.masks import MaskFile
from ota_core.moments import Moments, find_moments, open_moments
from ota_core.output import plan_files
from ota_core.plan import MergePlan, bytes_per_element, compression_of, open_plan
from ota_core.recipe import NEEDS_MOMENTS, MergeRecipe
from ota_core.safetensors_io import SafetensorsFile
from ota_core.stream import parse_memory
from tasks.architecture import parameter_layout
from tasks.inputs import assemble
from tasks.settings import places
from tasks.skeleton import skeletons

GIB = 2**30


def describe_plan(recipe: MergeRecipe, recipe_dir: Path, memory: str, home: Path | None) -> list[str]:
    """Lines that say what the merge would do. Raises OtaError that lists every problem found."""
    where = places(home)
    budget = parse_memory(memory)
    models, notes = skeletons(recipe, cache=where.cache, recipe_dir=recipe_dir)
    pending = any(model.pending_moments for model in models)
    inputs = assemble(recipe, [model.fetched for model in models], cache=where.cache, recipe_dir=recipe_dir, moments=not pending)
    with open_plan(recipe, inputs, memory=budget, with_moments=not pending) as plan:
        lines = [f"{recipe.merge_method} of {', '.join(expert.name for expert in plan.experts)}" + (f" over {recipe.base_model}" if recipe.base_model else "")]
        lines += [f"  {view.name}: {view.checkpoint.path if not model.remote else model.fetched.source}" for view, model in zip(plan.models, models, strict=True)]
        return [*lines, *_bytes(plan, inputs, budget), *_options(plan), *(f"note: {note}" for note in (*plan.notes, *notes)), "no problems found"]


def _bytes(plan: MergePlan, inputs: MergeInputs, budget: int) -> list[str]:
    weights = sum(sum(item.path.stat().st_size for item in view.checkpoint.files) for view in plan.models)
    parameters = sum(job.elements for job in plan.jobs)
    output = sum(job.elements * job.dtype.itemsize for job in plan.jobs)
    raw = [prod(shape) * 4 for e in plan.experts if e.moments and compression_of(e.moments) in {None, "none"} for shape in e.moments.shapes().values()]
    moments = sum(raw)
    factors = 0
    if plan.recipe.setting("compression") == "rank1" and plan.recipe.merge_method in NEEDS_MOMENTS:
        factors = sum(_rank1_bytes(shape) for e in plan.experts if e.moments for shape in e.moments.shapes().values())
    masked = [e for e in plan.experts if plan.recipe.ffg(e.index)]
    base_bytes = sum(item.path.stat().st_size for item in plan.base.checkpoint.files) if plan.base else 0
    expert_bytes = sum(sum(item.path.stat().st_size for item in e.checkpoint.files) for e in masked)
    read = weights + moments * (2 if factors else 1)
    if any(plan.recipe.setting("density", e.index) for e in masked):
        # Two passes of the histogram over base and expert, and over v where it is not compressed.
        read += 2 * (expert_bytes + len(masked) * base_bytes) + (0 if factors else 2 * moments)
    working = plan.stream.threads * plan.stream.block_elements * bytes_per_element(len(plan.experts))
    peak = peak_memory_gib() + (working + factors + budget // 4) / GIB
    lines = [
        f"parameters: {parameters:,} in {len(plan.jobs)} tensors",
        f"inputs: {_size(weights)} of weights, {_size(moments)} of second moments; read in all passes: {_size(read)}",
        f"output: {_size(output)} in {len(plan_files(plan))} files",
        f"peak memory: about {peak:.2f} GiB (budget {budget / GIB:.2f} GiB for blocks and mapped pages)",
    ]
    if factors:
        total = sum(prod(shape) for e in plan.experts if e.moments for shape in e.moments.shapes().values())
        lines.append(f"rank1 second moments: {_size(factors)}, {factors / max(total, 1):.4f} bytes per parameter instead of 4")
    return lines


def _rank1_bytes(shape: tuple[int, ...]) -> int:
    return 4 * (prod(shape) if len(shape) < 2 else prod(shape[:-2]) * (shape[-2] + shape[-1]))


def _options(plan: MergePlan) -> list[str]:
    effective = plan.recipe.effective()
    lines = ["parameters of the merge: " + ", ".join(f"{key}={value}" for key, value in effective["parameters"].items())]
    for expert, values in zip(plan.experts, effective["experts"], strict=True):
        shown = {key: value for key, value in values.items() if value is not None}
        if shown:
            lines.append(f"  {expert.name}: " + ", ".join(f"{key}={value}" for key, value in shown.items()))
    return lines


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError


def describe_path(path: Path) -> list[str]:
    """What a checkpoint, a file of second moments or masks, or an artifact holds. Raises OtaError when it is none of these."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint folder, a file of second moments or masks, or an artifact")
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
        return file.metadata.get("ota_format", "")


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _describe_record(folder: Path) -> list[str]:
    record = read_record(folder)
    lines = [f"artifact: {record.kind} {record.fingerprint}, complete", f"  config: {record.config}"]
    lines += [f"  input {name}: {digest}" for name, digest in record.inputs.items()]
    for name, report in record.results.get("densities", {}).items():
        lines.append(f"  density {name}: {report['density']:.6f} ({report['kept']:,} of {report['total']:,})")
    return lines


def _describe_checkpoint(folder: Path) -> list[str]:
    checkpoint = Checkpoint(folder)
    infos = [checkpoint.info(name) for name in checkpoint.names()]
    dtypes = Counter(str(info.dtype).removeprefix("torch.") for info in infos)
    size = sum(prod(info.shape) * info.dtype.itemsize for info in infos)
    lines = [
        f"checkpoint: {checkpoint.config.get('model_type', 'unknown model type')}, {sum(prod(info.shape) for info in infos):,} parameters "
        f"in {len(infos)} tensors and {len(checkpoint.files)} files, {_size(size)}",
        "  data types: " + ", ".join(f"{dtype} ({count} tensors)" for dtype, count in dtypes.items()),
    ]
    if "tie_word_embeddings" in checkpoint.config:
        lines.append(f"  tied embeddings: {'yes' if checkpoint.config['tie_word_embeddings'] else 'no'}")
    checkpoint.close()
    found = find_moments(folder)
    return lines if found is None else lines + [f"  {line}" for line in _describe_moments(found, folder)]


def _describe_file(path: Path) -> list[str]:
    if path.suffix == ".safetensors" and _format(path).startswith("masks/"):
        masks = MaskFile(path)
        total = sum(prod(shape) for shape in masks.shapes.values())
        kept = sum(masks.density(name) * prod(shape) for name, shape in masks.shapes.items())
        share = kept / max(total, 1)
        return [f"{path.name}: FFG mask of {masks.header['expert']}: keeps {kept:,.0f} of {total:,} elements (density {share:.6f})"]
    return _describe_moments(path, path.parent)


def _describe_moments(path: Path, folder: Path) -> list[str]:
    layout = partial(parameter_layout, folder) if (folder / "config.json").exists() else None
    try:
        moments: Moments = open_moments(path, layout=layout)
    except OtaError as error:
        raise type(error)(f"{path} is neither a mask file nor second moments that can be read: {error}") from None
    shapes = moments.shapes()
    steps = sorted({step for name in shapes if (step := moments.step(name)) is not None})
    total = sum(prod(shape) for shape in shapes.values())
    how = compression_of(moments) or "as the trainer left them"
    size = path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())
    known = f"β₂ {moments.beta2 if moments.beta2 is not None else 'unknown'}, step {'–'.join(map(str, steps)) or 'unknown'}"
    line = f"{path.name}: second moments of {total:,} parameters in {len(shapes)} tensors, {how}, {_size(size)}, {known}"
    moments.close()
    return [line]
