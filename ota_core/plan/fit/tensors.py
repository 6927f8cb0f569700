"""The tensors of a merge without slices, and how those of its models differ in form."""

from ota_core.files.rows import NAMED
from ota_core.plan.fit.names import only_prefix
from ota_core.plan.sliced.assembly import natural
from ota_core.plan.views import ExpertView, ModelView, TensorJob
from ota_core.plan.vocabulary.match import Vocabulary, is_vocabulary_tensor
from ota_core.recipe.recipe import MergeRecipe

SHOWN = 8
"""Tensors that one problem names; with the wrong base, hundreds would differ in every expert."""


def tensor_jobs(
    recipe: MergeRecipe,
    views: list[ModelView],
    first: ModelView,
    vocabulary: Vocabulary | None,
    alone: frozenset[str],
    problems: list[str],
) -> list[TensorJob]:
    """The output's tensors, checked against every model."""
    jobs = []
    differing: dict[str, list[str]] = {view.name: [] for view in views}
    out_dtype = NAMED[recipe.output_dtype] if recipe.output_dtype else None
    for name in sorted(first.checkpoint.names(), key=natural):
        info = first.checkpoint.info(name)
        floating = info.dtype.is_floating_point
        token_rows = vocabulary is not None and is_vocabulary_tensor(name)
        shape = (vocabulary.rows, *info.shape[1:]) if vocabulary is not None and token_rows else info.shape
        if name in alone:
            jobs.append(TensorJob(name, name, info.shape, info.dtype, copy=True, alone=True))
            continue
        for view in views:
            difference = _difference(view, first, name, from_axis=1 if token_rows else 0)
            if difference:
                differing[view.name].append(f"tensor '{name}' {difference}")
        jobs.append(
            TensorJob(
                name,
                first.tied.get(name, name),
                shape,
                (out_dtype or first.checkpoint.kept_dtype(name)) if floating else info.dtype,
                not floating,
            )
        )
    known = {job.name for job in jobs}
    for view in views:
        extra = [name for name in view.checkpoint.names() if name not in known and view.tied.get(name) not in known]
        differing[view.name] += [f"tensor '{name}' is here and not in {first.name}" for name in extra]
    problems += _grouped(views, first, differing)
    return jobs


def _difference(view: ModelView, first: ModelView, name: str, from_axis: int) -> str:
    """How one tensor of a model differs in form from that of the output's model; empty when it does not."""
    stored, info = view.stored_name(name), first.checkpoint.info(name)
    if stored not in view.checkpoint:
        return f"is missing, {first.name} has it"
    seen = view.checkpoint.info(stored)
    if seen.shape[from_axis:] != info.shape[from_axis:]:
        return f"has shape {list(seen.shape)}, {first.name} has {list(info.shape)}"
    if seen.dtype.is_floating_point != info.dtype.is_floating_point:
        return f"is {seen.dtype}, {first.name} has {info.dtype}"
    return ""


def _grouped(views: list[ModelView], first: ModelView, differing: dict[str, list[str]]) -> list[str]:
    """One problem for each model that differs; where all experts differ from the base in the same way, the base alone is suspected."""
    experts = [view.name for view in views if isinstance(view, ExpertView)]
    shown = {view.name: _shown(view, first, differing[view.name]) for view in views}
    alike = len(experts) > 1 and len({tuple(differing[name]) for name in experts}) == 1 and differing[experts[0]]
    if alike and first.name not in experts:
        return [
            f"{first.checkpoint.path} ({first.name}) and all {len(experts)} experts differ in the same way; of the experts: "
            f"{shown[experts[0]]}. Is base_model the one that they were fine-tuned from?"
        ]
    return [
        f"{view.checkpoint.path} ({view.name}): {shown[view.name]}; experts must come from the same base"
        for view in views
        if differing[view.name]
    ]


def _shown(view: ModelView, first: ModelView, differing: list[str]) -> str:
    """What differs, or that only a prefix does."""
    alike = only_prefix(view.checkpoint.names(), first.checkpoint.names()) if differing else None
    return (
        (alike.format(first.name) + "; rename its tensors, or save it again from the class that config.json names")
        if alike
        else _some(differing)
    )


def _some(items: list[str]) -> str:
    more = len(items) - SHOWN
    return "; ".join(items[:SHOWN]) + (f"; and {more} more tensors like these" if more > 0 else "")
