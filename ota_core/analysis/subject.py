"""What is analysed: a recipe's models as a merge would open them, the masks that it would use, and what must be left out."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Unpack

from pydantic import Field

from ota_core.compute.stream import Limits
from ota_core.errors import CheckpointError, MomentsError, OtaError, raise_all
from ota_core.frozen import Frozen
from ota_core.moments import find_moments, none_found, open_moments
from ota_core.moments.compression import METHODS, Method, is_compressed, label_of
from ota_core.plan.inputs import ExpertInput, MergeInputs
from ota_core.plan.plan import MergePlan, open_plan
from ota_core.plan.prepare import Curvature, prepare_curvature
from ota_core.plan.roles import Place, place_of
from ota_core.plan.views import ExpertView, TensorJob
from ota_core.plan.vocabulary.match import names_in, tensor_names
from ota_core.recipe.recipe import MergeRecipe

DENSITY = 0.4
"""Of masks that neither the recipe nor an option gives a density: the paper's."""


class AnalysisOptions(Frozen):
    """What a recipe does not say of its analysis."""

    density: float | None = Field(None, gt=0, le=1)
    """Of the masks that the recipe does not decide: of experts that it does not mask (None: the recipe's own density where it has one, else
    ``DENSITY``), of the overlap between experts and the comparison of compressions (None: ``Subject.common_density``, ``density_of``)."""
    compressions: tuple[Method, ...] = METHODS
    """What is compared with the full second moments; empty for none."""
    curvature: Literal["auto", "require", "off"] = "auto"
    """``auto``: of every expert whose second moments are at hand, where the merge needs none of those that can be read; ``require``: an
    expert without is an error; ``off``: of none."""


@dataclass(kw_only=True)
class Subject:
    """An opened recipe. ``plan.recipe`` is the one of the masks (``mask_recipe``), not the one of the merge."""

    plan: MergePlan
    facts: Curvature
    density: float
    """Of masks that neither the recipe nor ``asked`` decides."""
    asked: float | None
    """``AnalysisOptions.density``."""
    compressions: tuple[Method, ...]
    realised: dict[int, float] = field(default_factory=dict)
    """Expert → the share of its elements that its mask keeps; ``localisation`` finds it."""
    left_out: list[str] = field(default_factory=list)
    """What is not in the result, and why."""
    notes: list[str] = field(default_factory=list)
    """What one must know to read the result."""

    @cached_property
    def curved(self) -> list[ExpertView]:
        """The experts whose second moments are known."""
        return [expert for expert in self.plan.experts if expert.moments is not None]

    @cached_property
    def jobs(self) -> list[TensorJob]:
        """Every parameter once: a tied tensor is its own twin's."""
        return self.plan.canonical_jobs()

    @cached_property
    def places(self) -> dict[str, Place]:
        """Tensor → its cell of layer × role."""
        return {job.name: place_of(job.name) for job in self.jobs}

    def density_of(self, expert: ExpertView) -> float:
        """At which one expert's curvature is cut into a mask: its mask's density, of a threshold what that keeps; ``asked`` wins."""
        if self.asked is not None:
            return self.asked
        own: float | None = self.plan.recipe.setting("density", expert.index)
        return own if own is not None else self.realised.get(expert.index, self.density)

    @property
    def common_density(self) -> float:
        """At which the curvature of all experts is compared: masks of one size, or the overlap would tell their sizes. The mean of theirs."""
        densities = [self.density_of(expert) for expert in self.curved or self.plan.experts]
        return densities[0] if len(set(densities)) == 1 else fmean(densities)

    def full(self, expert: ExpertView) -> bool:
        """Whether the uncompressed second moments of an expert are at hand."""
        return expert.full_moments is not None


def density_of(recipe: MergeRecipe, options: AnalysisOptions) -> float:
    """The density of masks that the recipe does not decide."""
    if options.density is not None:
        return options.density
    own = recipe.setting("density") if recipe.merge_method == "ota" else None
    return own if own is not None and own < 1 else DENSITY


def mask_recipe(recipe: MergeRecipe, options: AnalysisOptions) -> MergeRecipe:
    """The recipe whose FFG masks are analysed: the merge's own masks, and masks at a density for experts that it does not mask.

    Nothing in it depends on how masked task vectors are combined (λ, power, fallback, …), so that merges that differ only there share
    an analysis. Without a base there are no edits to mask.
    """
    ota = recipe.merge_method == "ota"
    keys = ["scope", "metric", "mask_curvature"] if ota else []
    parameters: dict[str, Any] = {}
    if recipe.needs_moments:
        keys += ["compression", "rank", "bias_correction", "missing_curvature"]
    elif recipe.base_model is not None:
        # The merge needs no curvature: a tensor that moved without is no reason to refuse the analysis.
        parameters["missing_curvature"] = "mean"
    parameters |= {key: value for key in keys if (value := recipe.setting(key)) is not None}
    models = []
    for i, entry in enumerate(recipe.models):
        own: dict[str, Any] = {}
        if recipe.ffg(i):
            own = {key: recipe.setting(key, i) for key in ("density", "precond_threshold")}
        elif recipe.base_model is not None:
            own = {"density": density_of(recipe, options)}
        named = {"preconditioner_path": entry.parameters.preconditioner_path}
        models.append({"model": entry.model, "name": entry.name, "capability": entry.capability, "parameters": own | named})
    tokenizer = recipe.tokenizer.model_dump(mode="json", exclude_none=True) if recipe.tokenizer is not None else None
    return MergeRecipe.model_validate(
        {
            "merge_method": "ota", "tokenizer": tokenizer, "base_model": recipe.base_model, "models": models, "parameters": parameters,
            "tokenizer_source": recipe.tokenizer_source, "ignore_config_differences": recipe.ignore_config_differences,
        }
    )  # fmt: skip


def with_second_moments(inputs: MergeInputs, options: AnalysisOptions) -> tuple[MergeInputs, dict[str, str]]:
    """The inputs with the second moments that lie beside experts of a merge that needs none; with ``off``, without any.

    And, of ``auto``, expert → why nobody can tell which of the files beside it are its second moments: it counts as one without. Raises
    MomentsError that lists every expert without, where the options require them.
    """
    if options.curvature == "off":
        bare = (replace(expert, moments=None, full_moments=None, masks=None) for expert in inputs.experts)
        return replace(inputs, experts=tuple(bare)), {}
    experts: list[ExpertInput] = []
    unusable: dict[str, str] = {}
    for expert in inputs.experts:
        found = expert.moments
        if found is None:
            try:
                found = find_moments(expert.path)
            except MomentsError as error:
                if options.curvature == "require":
                    raise
                unusable[expert.name] = str(error)
        experts.append(replace(expert, moments=found))
    if options.curvature == "require":
        raise_all(
            [
                f"expert '{e.name}': {none_found(e.path)}. Keep them there, or let the analysis do without (curvature: auto)"
                for e in experts
                if e.moments is None
            ],
            MomentsError,
        )
    return replace(inputs, experts=tuple(experts)), unusable


def _readable(inputs: MergeInputs) -> tuple[MergeInputs, dict[str, str]]:
    """The inputs without the second moments that cannot be opened, and expert → why: the optimizer was another one, the file is damaged."""
    experts: list[ExpertInput] = []
    unusable: dict[str, str] = {}
    for expert in inputs.experts:
        if expert.moments is not None:
            try:
                names = names_in(expert.path, expert.source_of)
                with closing(open_moments(expert.moments, layout=expert.layout, source_of=expert.source_of, tensors=names)):
                    pass
            except (
                MomentsError,
                CheckpointError,
            ) as error:  # not StorageError: a server that is away says nothing of what lies there
                unusable[expert.name] = str(error)
                expert = replace(expert, moments=None)
        experts.append(expert)
    return replace(inputs, experts=tuple(experts)), unusable


@contextmanager
def open_subject(
    recipe: MergeRecipe,
    inputs: MergeInputs,
    options: AnalysisOptions,
    *,
    scratch: Path | None = None,
    **limits: Unpack[Limits],
) -> Iterator[Subject]:
    """Open everything and find the thresholds of the masks. Raises OtaError with all that is wrong."""
    recipe.check_uniform("an analysis")
    inputs, unusable = with_second_moments(inputs, options)
    if options.curvature == "auto" and not recipe.needs_moments:
        inputs, unreadable = _readable(inputs)
        unusable |= unreadable
    masks = mask_recipe(recipe, options)
    with ExitStack() as stack, open_plan(masks, inputs, need_moments=False, **limits) as plan:
        plan.scratch = scratch
        for expert, item in zip(plan.experts, inputs.experts, strict=True):
            if item.moments is not None:
                _open_full(plan, expert, item, stack)
        subject = Subject(
            plan=plan,
            facts=_facts(plan),
            density=density_of(recipe, options),
            asked=options.density,
            compressions=options.compressions,
            notes=[*plan.notes],
        )
        _say_what_is_left_out(subject, recipe, unusable)
        yield subject


def _facts(plan: MergePlan) -> Curvature:
    """Thresholds, and compression where the recipe's masks are made from it; without a base there are no masks."""
    if plan.base is None:
        return Curvature()
    everyone = plan.experts
    plan.experts = [expert for expert in everyone if expert.moments is not None]
    try:
        return prepare_curvature(plan)
    finally:
        plan.experts = everyone


def _open_full(plan: MergePlan, expert: ExpertView, item: ExpertInput, stack: ExitStack) -> None:
    """The uncompressed second moments, whatever the masks are made from: experts and compressions are compared by them."""
    assert expert.moments is not None
    if expert.full_moments is not None:
        return
    if not is_compressed(expert.moments):
        expert.full_moments = expert.moments
    elif item.full_moments is not None:
        names = tensor_names(expert.checkpoint)
        expert.full_moments = open_moments(item.full_moments, layout=item.layout, source_of=item.source_of, tensors=names)
        stack.callback(expert.full_moments.close)
        plan.stream.droppable.append(expert.full_moments.drop_pages)


def _say_what_is_left_out(subject: Subject, recipe: MergeRecipe, unusable: Mapping[str, str]) -> None:
    """``unusable``: expert → why the second moments beside it count as absent."""
    plan = subject.plan
    bare = [e.name for e in plan.experts if e.moments is None and e.name not in unusable]
    if plan.base is None:
        if not subject.curved:
            why = "".join(f"; {name}: {reason}" for name, reason in unusable.items())
            raise OtaError(
                "the recipe has no base_model and none of its experts has second moments: nothing can be analysed; name the base that the "
                f"experts were fine-tuned from{why}"
            )
        subject.left_out.append(
            "localisation, sparsity, task vectors and agreement of compressed masks: the recipe has no base_model to tell the experts' edits"
        )
    if bare:
        subject.left_out.append(
            f"everything of the curvature of {', '.join(bare)}: no second moments are given; their masks are by magnitude alone"
        )
    subject.left_out += [
        f"everything of the curvature of {name}, whose masks are by magnitude alone: its second moments cannot be read: {reason}"
        for name, reason in unusable.items()
    ]
    unmasked = [e.name for e in plan.experts if not recipe.ffg(e.index)]
    if unmasked and plan.base is not None:
        subject.notes.append(
            f"the merge masks nothing of {', '.join(unmasked)}: their masks are those of FFG at density {subject.density:g}, for comparison"
        )
    for expert in subject.curved:
        if not subject.full(expert):
            held = expert.moments
            assert held is not None
            subject.notes.append(
                f"{expert.name}: only second moments compressed with {label_of(held)} are at hand; its curvature is theirs"
            )
    if subject.facts.averaged:
        names = sorted(subject.facts.averaged)
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        subject.notes.append(f"moved without second moments in some expert, hence unmasked in a merge: {shown}")
