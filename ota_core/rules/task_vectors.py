"""Task arithmetic, TIES, DARE and breadcrumbs, bound to a plan."""

import math
from typing import TYPE_CHECKING, Any

from ota_core.files.rows import Rows
from ota_core.fused.memory import start_of
from ota_core.fused.sums import magnitudes_of
from ota_core.fused.task_vectors import Part, combine_block
from ota_core.methods.numbers import NOTHING, breadcrumbs_ranks, ties_ranks
from ota_core.plan.found import Found
from ota_core.plan.plan import MergePlan
from ota_core.plan.prepare import WholeFacts
from ota_core.plan.scoring import Scoring
from ota_core.plan.tally import Group, kth_largest
from ota_core.plan.views import Block, ExpertView, TensorJob, block_elements, parts
from ota_core.rules.base import Rule

if TYPE_CHECKING:
    import torch


LITTLE = 1e-7
"""A sum of magnitudes below this is not scaled, nor scaled to: the rounding would be blown up. mergekit's."""


class TaskVectorRule(Rule):
    """task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties, and the prior of rowspace: what is left of each task vector, added up."""

    def __init__(self, plan: MergePlan, whole: WholeFacts | None = None) -> None:
        super().__init__(plan, whole)
        self._method = plan.recipe.merge_method
        self._weights = [plan.recipe.setting("weight", i) for i in range(len(plan.experts))]
        self._elects = self._method.endswith("ties")
        """Whether signs are elected, or task vectors just added up."""
        self._limits: dict[tuple[int, str], tuple[float, float]] = {}
        self._factors: dict[tuple[int, str], float] = {}
        """By what that is multiplied which the limits leave, with ``rescale``."""

    def _prepare(self) -> None:
        """The limits of |Δ| for the methods that trim, per expert and tensor."""
        if self._method not in {"ties", "breadcrumbs", "breadcrumbs_ties"}:
            return
        plan, groups = self._plan, []
        for job in plan.merged_jobs():
            wanted = {expert.index: [r for r in self._ranks(expert, job) if r] for expert in plan.experts}
            groups.append(Group(jobs=[job], experts=[i for i, ranks in wanted.items() if ranks], ranks=wanted))
        asked = [group for group in groups if group.experts]
        scoring = Scoring(plan, curvature=False, everywhere=True)
        found = dict(zip((g.jobs[0].name for g in asked), kth_largest(scoring, asked, what="trim"), strict=True))
        for job in plan.merged_jobs():
            for expert in plan.experts:
                self._limits[expert.index, job.name] = self._limit(expert, job, found.get(job.name, {}).get(expert.index, []))
        if plan.recipe.setting("rescale"):
            self._find_factors()

    def _find_factors(self) -> None:
        """Σ |Δ| of every expert and tensor, divided by that of what is left; 1 where next to nothing is (as mergekit rescales)."""
        plan = self._plan
        blocks = plan.blocks(plan.merged_jobs())
        found = plan.stream.map(self._magnitudes, blocks, what="rescale", size=block_elements, ahead=self.prefetch)
        sums: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
        for (job, _, _), of_experts in zip(blocks, found, strict=True):
            for expert, rows in zip(plan.experts, of_experts, strict=True):
                for total, part in zip(sums.setdefault((expert.index, job.name), ([], [])), rows, strict=True):
                    total += part
        for key, (whole, kept) in sums.items():
            every, left = math.fsum(whole), math.fsum(kept)
            self._factors[key] = every / left if min(every, left) >= LITTLE else 1.0

    def _magnitudes(self, block: Block) -> list[tuple[list[float], list[float]]]:
        """Σ |Δ| of every row of a block, and of what the limits leave, of every expert."""
        job = block[0]
        limits = [self._limits[expert.index, job.name] for expert in self._plan.experts]
        if self._can_fuse(job):
            assert self._plan.base is not None
            thetas = [expert.stored(job.name, *block[1:]) for expert in self._plan.experts]
            base = start_of(self._plan.base.stored(job.name, *block[1:]), thetas)
            assert base is not None
            return [magnitudes_of(base, theta, *own) for theta, own in zip(thetas, limits, strict=True)]
        from ota_core.compute.kernels import row_sums
        from ota_core.methods.task_vectors import trim
        from ota_core.rules.rows import base_rows, expert_rows

        found: list[tuple[list[float], list[float]]] = [([], []) for _ in limits]
        for part in parts(block, self._plan.tensor_elements):
            rows = base_rows(self._plan, part)
            assert rows is not None
            for (whole, kept), theta, own in zip(found, expert_rows(self._plan, part, rows), limits, strict=True):
                delta = theta - rows
                whole += row_sums(delta.abs()).tolist()
                kept += row_sums(trim(delta, *own).abs()).tolist()
        return found

    def _ranks(self, expert: ExpertView, job: TensorJob) -> tuple[int, int]:
        """Ranks, by falling |Δ|, of the last kept entry and of the first kept one; 0 where there is no such limit."""
        dropped, last = self._kept(expert, job)
        if last == dropped:
            return 0, 0
        return last if last < job.elements else 0, dropped + 1 if dropped else 0

    def _kept(self, expert: ExpertView, job: TensorJob) -> tuple[int, int]:
        density = self._plan.recipe.setting("density", expert.index)
        if self._method == "ties":
            return ties_ranks(density, job.elements)
        return breadcrumbs_ranks(density, self._plan.recipe.setting("gamma", expert.index), job.elements)

    def _limit(self, expert: ExpertView, job: TensorJob, values: list[float]) -> tuple[float, float]:
        """The smallest and the largest |Δ| that are kept. values: of the ranks that are limits."""
        dropped, last = self._kept(expert, job)
        if last == dropped:
            return math.inf, -math.inf
        by_rank = dict(zip([rank for rank in self._ranks(expert, job) if rank], values, strict=True))
        return by_rank.get(last if last < job.elements else 0, 0.0), by_rank.get(dropped + 1 if dropped else 0, math.inf)

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        from ota_core.methods.task_vectors import add_up, elect_and_add

        base, deltas = self._deltas(block)
        combine = elect_and_add if self._elects else add_up
        merged = combine(deltas, self._weights, normalize=self._plan.recipe.setting("normalize"))
        return base + self.scale_of(block[0]) * merged

    def _edits(self, block: Block) -> "tuple[torch.Tensor, list[torch.Tensor]]":
        from ota_core.methods.task_vectors import add_up_parts, elect_and_add_parts

        base, deltas = self._deltas(block)
        combine = elect_and_add_parts if self._elects else add_up_parts
        found = combine(deltas, self._weights, normalize=self._plan.recipe.setting("normalize"))
        return base, [self.scale_of(block[0]) * edit for edit in found]

    def _deltas(self, block: Block) -> "tuple[torch.Tensor, list[torch.Tensor]]":
        """θ₀ and what the method leaves of every expert's task vector."""
        from ota_core.rules.rows import base_rows, expert_rows

        base = base_rows(self._plan, block)
        assert base is not None
        thetas = expert_rows(self._plan, block, base)
        pairs = zip(self._plan.experts, thetas, strict=True)
        return base, [self._left(expert, block, theta - base) for expert, theta in pairs]

    def _merge_fused(self, block: Block, out: Rows) -> None:
        assert self._plan.base is not None
        combine_block(
            self._plan.base.stored(block[0].name, *block[1:]),
            [self._part(expert, block) for expert in self._plan.experts],
            out,
            elect=self._elects,
            normalize=self._plan.recipe.setting("normalize"),
            lam=self.scale_of(block[0]),
            nothing=NOTHING,
        )

    def _part(self, expert: ExpertView, block: Block) -> Part:
        job, start, _ = block
        theta, weight = expert.stored(job.name, *block[1:]), self._weights[expert.index]
        if (expert.index, job.name) in self._limits:
            lowest, highest = self._limits[expert.index, job.name]
            factor = self._factors.get((expert.index, job.name), 1.0)
            return Part(theta=theta, weight=weight, lowest=lowest, highest=highest, factor=factor)
        setting = self._plan.recipe.setting
        density = setting("density", expert.index)
        if not self._method.startswith("dare") or density >= 1:
            return Part(theta=theta, weight=weight)
        first = start * (job.elements // job.rows)
        random = (setting("seed"), expert.index, job.canonical, first)
        return Part(theta=theta, weight=weight, random=random, density=density, rescale=setting("rescale"))

    def _left(self, expert: ExpertView, block: Block, difference: "torch.Tensor") -> "torch.Tensor":
        from ota_core.methods.dare import drop, uniform
        from ota_core.methods.task_vectors import trim

        job, start, _ = block
        if (expert.index, job.name) in self._limits:
            factor = self._factors.get((expert.index, job.name), 1.0)
            return trim(difference, *self._limits[expert.index, job.name]) * factor
        density = self._plan.recipe.setting("density", expert.index)
        if not self._method.startswith("dare") or density >= 1:
            return difference
        rows, cols = difference.shape
        seed = self._plan.recipe.setting("seed")
        random = uniform(seed, expert.index, job.canonical, start * cols, rows * cols, self._plan.device).view(rows, cols)
        return drop(difference, random, density=density, rescale=self._plan.recipe.setting("rescale"))

    def results(self, found: Found) -> dict[str, Any]:
        seed = {"seed": self._plan.recipe.setting("seed")} if self._method.startswith(("dare", "della")) else {}
        return seed | super().results(found)
