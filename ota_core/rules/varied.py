"""The rule of a recipe whose tensors differ in what is merged of them, or how: a rule of its own for each group that shares every value."""

import math
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Self

from ota_core.files.rows import Rows
from ota_core.plan.found import Found
from ota_core.plan.groups import Part, Ranked, parts_of, ranked_groups
from ota_core.plan.plan import MergePlan
from ota_core.plan.prepare import WholeFacts, compress_experts, mean_of, weight_sums
from ota_core.plan.scoring import ffg_scoring
from ota_core.plan.tally import kth_largest, taus_of
from ota_core.plan.views import Block, TensorJob, block_elements
from ota_core.recipe.methods import FFG
from ota_core.recipe.recipe import MergeRecipe
from ota_core.rules.base import Rule
from ota_core.rules.lambdas import Scales, scales_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


class VariedRule(Rule):
    """Slices, gradients and filters, of any method: blocks go to the rule of their tensor's group."""

    def __init__(self, plan: MergePlan, whole: WholeFacts | None, make: "Callable[[MergePlan, WholeFacts], Rule]") -> None:
        """make: the rule of a plan with single values."""
        self._plan, self._whole, self._make = plan, whole, make
        self._parts = parts_of(plan)
        self._rules: list[tuple[Part, Rule]] = []
        self._by_name: dict[str, Rule] = {}
        self._plans = {job.name: part.plan for part in self._parts for job in part.plan.jobs}
        self._lambdas = Scales(whole.scale, whole.scales) if whole and whole.scale is not None else None
        self._reports: dict[str, Any] = {}
        if plan.recipe.merge_method not in FFG:
            self._make_rules(whole or WholeFacts())

    def prepare(self) -> None:
        plan = self._plan
        if plan.recipe.needs_moments:
            self._reports = compress_experts(plan)
            share_moments(self._parts, plan)
        if plan.recipe.merge_method in FFG:
            self._make_rules(self._whole or WholeFacts(groups=self._taus(), means=self._means()))
        for _, rule in self._rules:
            rule.prepare()
        if self._lambdas is None and any(rule._plan.recipe.auto for _, rule in self._rules) and self._whole is None:
            self._lambdas = scales_of(self.matrix_scales())
            for _, rule in self._rules:
                rule._lambdas = self._lambdas

    def _make_rules(self, whole: WholeFacts) -> None:
        ranked = ranked_groups(self._parts)
        self._rules = [
            (part, self._make(group, facts_of(part, group, ranked, whole))) for part in self._parts for group in part.groups
        ]
        names = [names for part in self._parts for names in part.members]
        self._by_name = {name: rule for (_, rule), own in zip(self._rules, names, strict=True) for name in own}

    def _taus(self) -> list[dict[int, float]]:
        """τ of everything that is ranked together."""
        ranked, found = ranked_groups(self._parts), []
        for part in self._parts:
            groups = [one.group for one in ranked if one.part is part]
            found += (
                [taus_of(scores) for scores in kth_largest(ffg_scoring(part.plan), groups, what="thresholds")] if groups else []
            )
        return found

    def _means(self) -> dict[int, float]:
        """Mean of v̂^power of each expert of each part, with ``normalise: global``."""
        if self._plan.recipe.setting("normalise") != "global":
            return {}
        return means_of(self._parts, sums_of(self._parts))

    def matrix_scales(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {}
        for _, rule in self._rules:
            if rule._plan.recipe.auto:
                found |= rule.matrix_scales()
        return found

    def _of(self, job: TensorJob) -> Rule:
        return self._by_name[job.name]

    def plan_of(self, job: TensorJob) -> MergePlan:
        return self._plans[job.name]

    def scale_of(self, job: TensorJob) -> float:
        return self._of(job).scale_of(job)

    def edit(self, block: Block) -> "torch.Tensor":
        return self._of(block[0]).edit(block)

    def edits(self, block: Block) -> "tuple[torch.Tensor, list[torch.Tensor]]":
        return self._of(block[0]).edits(block)

    def is_whole(self, job: TensorJob) -> bool:
        return self._of(job).is_whole(job)

    def reweighted(self, recipe: MergeRecipe) -> Self:
        other, rules = copy(self), []
        for part, rule in self._rules:
            group = rule._plan.recipe
            models = zip(group.models, recipe.models, strict=True)
            weighted = [
                old.model_copy(update={"parameters": old.parameters.model_copy(update={"weight": recipe.setting("weight", i)})})
                for i, (old, _) in enumerate(models)
            ]
            rules.append((part, rule.reweighted(group.model_copy(update={"models": tuple(weighted)}))))
        other._rules = rules
        names = [names for part in self._parts for names in part.members]
        other._by_name = {name: rule for (_, rule), own in zip(rules, names, strict=True) for name in own}
        return other

    def blocks(self, jobs: Sequence[TensorJob]) -> tuple[list[Block], list[Block]]:
        whole: list[Block] = []
        plain: list[Block] = []
        for _, rule in self._rules:
            own = rule.blocks([job for job in jobs if self._by_name[job.name] is rule])
            whole += own[0]
            plain += own[1]
        whole.sort(key=lambda block: -block_elements(block))
        return whole, plain

    @property
    def whole_at_once(self) -> int:
        return min(rule.whole_at_once for _, rule in self._rules)

    def prefetch(self, block: Block) -> None:
        self._of(block[0]).prefetch(block)

    def merge(self, block: Block, out: Rows) -> None:
        self._of(block[0]).merge(block, out)

    def found(self) -> Found:
        """Experts by their number among those of all parts."""
        return Found.sum([_numbered(part, rule.found()) for part, rule in self._rules]).model_copy(
            update={
                "compression": {name: one.model_dump(exclude={"sqrt_error_per_tensor"}) for name, one in self._reports.items()}
            }
            | ({"scale": self._lambdas.all, "scales": dict(self._lambdas.tensors)} if self._lambdas else {})
        )

    def results(self, found: Found) -> dict[str, Any]:
        recipe = self._plan.recipe
        results: dict[str, Any] = {}
        if recipe.merge_method in FFG:
            everything = {
                "densities": self._densities(found),
                "compression": found.compression,
                "averaged_without_curvature": found.averaged,
            }
            results = {key: value for key, value in everything.items() if value}
        elif self._rules:
            results = {key: value for key, value in self._rules[0][1].results(Found(compression=found.compression)).items()}
        return results | Rule.results(self, found)

    def _densities(self, found: Found) -> dict[str, Any]:
        """As of a recipe of single values; a tensor in which an expert has no FFG is kept whole."""
        reports: dict[str, Any] = {}
        for expert in self._plan.experts:
            kept: dict[str, int] = {}
            taus: dict[str, Any] = {}
            sizes: dict[str, int] = {}
            masked = False
            for part in self._parts:
                for view, position in zip(part.plan.experts, part.experts, strict=True):
                    if position != expert.index:
                        continue
                    number = part.offset + view.index
                    curved = part.plan.curved(view)
                    for group, names in zip(part.groups, part.members, strict=True):
                        own = [job for job in curved if job.name in names]
                        ffg = group.recipe.ffg(view.index)
                        masked |= ffg
                        counts = found.kept.get(number, {})
                        kept |= {job.name: counts.get(job.name, 0) if ffg else job.elements for job in own}
                        sizes |= {job.name: job.elements for job in own}
                        if ffg:
                            taus |= {job.name: _json(found.thresholds[number][job.name]) for job in own}
            if masked:
                total, count = sum(sizes.values()), sum(kept.values())
                same = len(set(taus.values())) <= 1
                reports[expert.name] = {
                    "threshold": next(iter(taus.values()), None) if same else taus,
                    "density": count / max(total, 1),
                    "kept": count,
                    "total": total,
                    "per_tensor": {name: kept[name] / max(size, 1) for name, size in sizes.items()},
                }
        return reports


def facts_of(part: Part, group: MergePlan, ranked: Sequence[Ranked], whole: WholeFacts) -> WholeFacts:
    """What a group must know, its experts by their position in its part."""
    thresholds: dict[int, float] = {}
    for one, taus in zip(ranked, whole.groups, strict=False):
        for expert, density in one.densities.items() if one.part is part else ():
            if group.recipe.ffg(expert) and group.recipe.setting("density", expert) == density:
                thresholds[expert] = taus[expert]
    means = {view.index: whole.means[part.offset + view.index] for view in part.plan.experts} if whole.means else {}
    # An expert of whose tensors here none carries curvature is ranked nowhere.
    experts = {view.index: math.inf for view in part.plan.experts if group.recipe.ffg(view.index)}
    return WholeFacts(thresholds=experts | thresholds, means=means, scale=whole.scale, scales=whole.scales)


def share_moments(parts: Sequence[Part], plan: MergePlan) -> None:
    """Give the experts of every part the second moments of the whole plan's."""
    for part in parts:
        for view, position in zip(part.plan.experts, part.experts, strict=True):
            view.moments, view.full_moments = plan.expert(position).moments, plan.expert(position).full_moments


def sums_of(parts: Sequence[Part]) -> dict[int, dict[str, float]]:
    """Expert's number among those of all parts → tensor → Σ v̂^power, of the tensors that are worked on here."""
    found: dict[int, dict[str, float]] = {}
    for part in parts:
        for group in part.groups:
            for view in part.plan.experts:
                found.setdefault(part.offset + view.index, {}).update(weight_sums(group, view))
    return found


def means_of(parts: Sequence[Part], sums: dict[int, dict[str, float]]) -> dict[int, float]:
    """The same experts → mean of v̂^power over all their tensors of the part."""
    return {
        part.offset + view.index: mean_of(part.plan, view, sums[part.offset + view.index])
        for part in parts
        for view in part.plan.experts
    }


def _numbered(part: Part, found: Found) -> Found:
    kept = {part.offset + expert: counts for expert, counts in found.kept.items()}
    thresholds = {part.offset + expert: taus for expert, taus in found.thresholds.items()}
    return found.model_copy(update={"kept": kept, "thresholds": thresholds})


def _json(tau: float) -> float | str:
    return tau if math.isfinite(tau) else "inf"
