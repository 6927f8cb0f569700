"""The second moments of a merge's experts: opened, and checked against recipe and weights."""

from contextlib import ExitStack
from pathlib import Path

from ota_core.errors import OtaError
from ota_core.moments import Moments, open_moments
from ota_core.moments.compression import compression_label, compression_of, is_compressed, kept_as_trained, label_of, rank_of
from ota_core.moments.relaid import relaid
from ota_core.moments.renamed import renamed
from ota_core.plan.inputs import ExpertInput
from ota_core.plan.masks import MaskFile
from ota_core.plan.views import ExpertView, TensorJob, bias_factor
from ota_core.plan.vocabulary.match import is_vocabulary_tensor
from ota_core.recipe.recipe import MergeRecipe


def moments_problems(recipe: MergeRecipe, item: ExpertInput) -> list[str]:
    """What opening an expert's second moments finds wrong; nothing where none are given or needed."""
    if not recipe.needs_moments or item.moments is None:
        return []
    try:
        open_moments(item.moments, layout=item.layout, source_of=item.source_of).close()
    except OtaError as error:
        return [f"expert '{item.name}': {problem}" for problem in error.problems]
    return []


def open_expert(recipe: MergeRecipe, expert: ExpertView, item: ExpertInput, problems: list[str], stack: ExitStack) -> None:
    """Give an expert its second moments and masks, as far as the recipe needs them; ``stack`` closes them. Problems are added."""
    if not recipe.needs_moments:
        return
    asked, rank = recipe.setting("compression", expert.index), recipe.setting("rank", expert.index)
    try:
        if item.moments is None:
            problems.append(f"expert '{expert.name}': no second moments given; {recipe.merge_method} needs them")
            return
        expert.moments = _open_one(item.moments, expert, item, stack)
        compressed, held = is_compressed(expert.moments), compression_of(expert.moments)
        if compressed and (held, rank_of(expert.moments)) != (asked, rank):
            what = f"holds second moments compressed with {label_of(expert.moments)}"
            if kept_as_trained(expert.moments):
                what = f"holds row and column means, all that Adafactor keeps, which are read with compression: {held}"
            problems.append(f"{item.moments} {what}; the recipe asks for compression: {compression_label(asked, rank)}")
        if recipe.ffg(expert.index) and recipe.setting("mask_curvature") == "full" and item.masks is None:
            if item.full_moments is not None:
                expert.full_moments = _open_one(item.full_moments, expert, item, stack)
            elif not compressed:
                expert.full_moments = expert.moments
            else:
                problems.append(
                    f"expert '{expert.name}': mask_curvature: full needs uncompressed second moments, {item.moments} is compressed with {held}"
                )
        if item.masks is not None:
            expert.masks = MaskFile(item.masks, item.source_of)
            stack.callback(expert.masks.close)
    except OtaError as error:
        problems.append(f"expert '{expert.name}': {error}")


def _open_one(path: Path, expert: ExpertView, item: ExpertInput, stack: ExitStack) -> Moments:
    moments = open_moments(path, layout=item.layout, source_of=item.source_of, tensors=expert.own_tensors)
    stack.callback(moments.close)
    return relaid(renamed(moments, expert.renamed), expert.relaid)


def check_moments(recipe: MergeRecipe, expert: ExpertView, jobs: list[TensorJob], problems: list[str]) -> None:
    """v must have the shapes of the expert's own tensors; bias correction must know its numbers."""
    for moments in {id(m): m for m in (expert.moments, expert.full_moments) if m is not None}.values():
        shapes = moments.shapes()
        for job in jobs:
            stored = expert.stored_name(job.canonical)
            if job.copy or job.canonical not in shapes or stored not in expert.checkpoint:
                continue
            seen, expected = tuple(shapes[job.canonical]), expert.checkpoint.info(stored).shape
            if seen != expected and job.name == job.canonical:
                hint = (
                    "was the vocabulary changed after training?"
                    if is_vocabulary_tensor(job.name)
                    else "do they belong to this checkpoint?"
                )
                problems.append(
                    f"{moments.path}: second moments of '{job.canonical}' have shape {list(seen)}, the expert '{expert.name}' has {list(expected)} there; "
                    f"{hint}"
                )
        if not any(job.canonical in shapes for job in jobs):
            problems.append(
                f"{moments.path} ({expert.name}): none of its names ({', '.join(sorted(shapes)[:3])}, …) is a tensor of the model; expected the model's names"
            )
        if recipe.setting("bias_correction"):
            try:
                for name in sorted(set(shapes) & {job.canonical for job in jobs})[:1]:
                    bias_factor(moments, name)
            except OtaError as error:
                problems.append(str(error))
