"""A merge whose tensors differ in what is merged of them, or how: cut into plans that each have one recipe of single values.

    part     a slice, or the whole model where the recipe has no slices: its own experts and base
    group    the tensors of a part that share every value; each is a plan like that of a recipe without gradients

A density of FFG with scope ``global`` is a rank among the tensors of its part that share it: of an expert with density 0.4 in the MLPs and
0.2 elsewhere, 40 % of what all its MLPs hold together are kept, and 20 % of the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ota_core.errors import RecipeError, raise_all
from ota_core.methods.numbers import kept_count
from ota_core.plan.plan import MergePlan
from ota_core.plan.sliced.layers import positions
from ota_core.plan.tally import Group
from ota_core.plan.views import ExpertView, TensorJob
from ota_core.recipe.methods import FFG
from ota_core.recipe.recipe import MergeRecipe


@dataclass(frozen=True)
class Part:
    """A slice, or the whole."""

    plan: MergePlan
    """Its recipe may hold gradients; its experts are those of the slice, in the slice's order."""
    groups: Sequence[MergePlan]
    """Every tensor in one of them, with a recipe of single values."""
    members: Sequence[frozenset[str]]
    """The tensors of each group, here or elsewhere."""
    offset: int
    """Added to the position of an expert here it is the expert's number among those of all parts."""
    experts: Sequence[int]
    """Of each expert here, its position in the whole recipe."""


def parts_of(plan: MergePlan) -> list[Part]:
    """The parts of a plan, of one whose recipe varies or not. Raises RecipeError for what contradicts itself in some tensor."""
    if plan.assembly is None:
        where = positions(job.name for job in plan.jobs)
        return [Part(plan, *_groups(plan, where), 0, [expert.index for expert in plan.experts])]
    parts: list[Part] = []
    offset = 0
    for cut in plan.assembly.cuts:
        named = enumerate(zip(cut.sources, cut.names, strict=True))
        experts = [replace(view, index=i, renames=names, inactive=set()) for i, (view, names) in named]
        base = replace(cut.base, renames=cut.base_names) if cut.base else None
        jobs = [job for job in plan.jobs if job.name in cut.positions]
        own = replace(plan, recipe=cut.recipe, base=base, experts=experts, jobs=jobs, assembly=None)
        parts.append(Part(own, *_groups(own, cut.positions), offset, [view.index for view in cut.sources]))
        offset += len(experts)
    return parts


def _groups(plan: MergePlan, where: Mapping[str, float]) -> tuple[list[MergePlan], list[frozenset[str]]]:
    """The plan in groups of tensors that share every value, and their tensors. where: tensor → its place in its slice, 0 … 1."""
    recipe = plan.recipe
    members: dict[tuple[object, ...], list[TensorJob]] = {}
    levels = [recipe.parameters, *(entry.parameters for entry in recipe.models)]
    for job in plan.jobs:
        name = _judged(job, where)
        key = tuple(value.at(name, where[name]) for level in levels for value in level.varying.values()) if not job.copy else ()
        members.setdefault(key, []).append(job)
    groups, problems = [], []
    for jobs in members.values():
        name = _judged(jobs[0], where)
        single = recipe.at(name, where[name])
        problems += [f"{problem} (in {name})" for problem in single.problems()] if recipe.varies else []
        names = frozenset(job.name for job in jobs)
        groups.append(replace(plan, recipe=single, part=names if plan.part is None else names & plan.part))
    raise_all(list(dict.fromkeys(problems)), RecipeError)
    return groups, [frozenset(job.name for job in jobs) for jobs in members.values()]


def _judged(job: TensorJob, where: Mapping[str, float]) -> str:
    """The name that filters see: tied tensors are one parameter."""
    return job.canonical if job.canonical in where else job.name


@dataclass(frozen=True)
class Ranked:
    """Tensors that are ranked together in some experts."""

    part: Part
    group: Group
    """Of the tensors that are worked on here."""
    densities: Mapping[int, float]
    """Expert → its density of these tensors."""

    @property
    def rows(self) -> list[int]:
        """The experts' numbers among those of all parts."""
        return [self.part.offset + expert for expert in self.group.experts]


def ranked_groups(parts: Sequence[Part]) -> list[Ranked]:
    """What FFG with scope ``global`` ranks together: for each expert the tensors that share its density, experts with the same ones at once."""
    found = []
    for part in parts:
        by_names: dict[frozenset[str], dict[int, tuple[float, int]]] = {}
        for expert in part.plan.experts:
            for density, jobs in _by_density(part, expert).items():
                count = kept_count(density, sum(job.elements for job in jobs))
                by_names.setdefault(frozenset(job.name for job in jobs), {})[expert.index] = density, count
        for names, experts in by_names.items():
            jobs = [job for job in part.plan.merged_jobs() if job.name in names]
            ranks = {expert: (count,) if count else () for expert, (_, count) in experts.items()}
            group = Group(jobs=jobs, experts=tuple(experts), ranks=ranks)
            found.append(Ranked(part, group, {expert: density for expert, (density, _) in experts.items()}))
    return found


def is_ranked(recipe: MergeRecipe, expert: ExpertView) -> bool:
    """Whether the threshold of an expert is a rank among the scores of many tensors. recipe: of single values."""
    if recipe.merge_method not in FFG or recipe.setting("scope") != "global" or expert.masks is not None:
        return False
    return recipe.ffg(expert.index) and recipe.setting("density", expert.index) is not None


def _by_density(part: Part, expert: ExpertView) -> dict[float, list[TensorJob]]:
    """Density → the tensors with curvature that have it, here or elsewhere."""
    curved = part.plan.curved(expert)
    found: dict[float, list[TensorJob]] = {}
    for group, names in zip(part.groups, part.members, strict=True):
        if is_ranked(group.recipe, expert):
            jobs = [job for job in curved if job.name in names]
            found.setdefault(group.recipe.setting("density", expert.index), []).extend(jobs)
    return {density: jobs for density, jobs in found.items() if jobs}
