"""Task arithmetic, TIES, DARE and breadcrumbs, bound to a plan."""

import math
from functools import partial
from typing import Any

import torch

from ota_core.fused_task_vectors import Part, combine_block
from ota_core.methods.dare import drop, uniform
from ota_core.methods.task_vectors import NOTHING, add_up, breadcrumbs_ranks, elect_and_add, ties_ranks, trim
from ota_core.plan import MergePlan
from ota_core.prepare import Block, blocks, count_magnitudes
from ota_core.rows import base_rows, expert_rows
from ota_core.saliency import Histogram, kth_largest
from ota_core.views import ExpertView, TensorJob


class TaskVectorRule:
    """task_arithmetic, ties, dare_linear, dare_ties, breadcrumbs, breadcrumbs_ties: what is left of each task vector, added up."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._method = plan.recipe.merge_method
        self._weights = [plan.recipe.setting("weight", i) for i in range(len(plan.experts))]
        self._limits: dict[tuple[int, str], tuple[float, float]] = {}

    def prepare(self) -> None:
        """The limits of |Δ| for the methods that trim, per expert and tensor."""
        if self._method not in {"ties", "breadcrumbs", "breadcrumbs_ties"}:
            return
        for expert in self._plan.experts:
            jobs = self._plan.merged_jobs()
            found = self._plan.stream.map(
                partial(self._limit, expert), jobs, what=f"trim {expert.name}", size=lambda j: j.elements
            )
            self._limits |= {(expert.index, job.name): limits for job, limits in zip(jobs, found, strict=True)}

    def _limit(self, expert: ExpertView, job: TensorJob) -> tuple[float, float]:
        density = self._plan.recipe.setting("density", expert.index)
        if self._method == "ties":
            dropped, last = ties_ranks(density, job.elements)
        else:
            dropped, last = breadcrumbs_ranks(density, self._plan.recipe.setting("gamma", expert.index), job.elements)
        if last == dropped or job.elements == 0:
            return math.inf, -math.inf

        def count(histogram: Histogram, high: int | None) -> None:
            for block in blocks(self._plan, [job]):
                count_magnitudes(self._plan, expert, block, histogram, high)

        lowest = kth_largest(count, last) if last < job.elements else 0.0
        return lowest, kth_largest(count, dropped + 1) if dropped else math.inf

    def merge(self, block: Block) -> torch.Tensor:
        if self._plan.can_fuse(self._plan.experts, block[0]):
            return self._merge_fused(block)
        base = base_rows(self._plan, block)
        assert base is not None
        thetas = expert_rows(self._plan, block, base)
        deltas = [self._left(expert, block, theta - base) for expert, theta in zip(self._plan.experts, thetas, strict=True)]
        combine = elect_and_add if self._method.endswith("ties") else add_up
        merged = combine(deltas, self._weights, normalize=self._plan.recipe.setting("normalize"))
        scale: float = self._plan.recipe.setting("lambda")
        return base + scale * merged

    def _merge_fused(self, block: Block) -> torch.Tensor:
        """The compiled pass; the same bits."""
        assert self._plan.base is not None
        merged = combine_block(
            self._plan.base.single(*block),
            [self._part(expert, block) for expert in self._plan.experts],
            elect=self._method.endswith("ties"),
            normalize=self._plan.recipe.setting("normalize"),
            lam=self._plan.recipe.setting("lambda"),
            nothing=NOTHING,
        )
        return merged.view(block[2] - block[1], -1)

    def _part(self, expert: ExpertView, block: Block) -> Part:
        job, start, _ = block
        theta, weight = expert.single(*block), self._weights[expert.index]
        if (expert.index, job.name) in self._limits:
            lowest, highest = self._limits[expert.index, job.name]
            return Part(theta=theta, weight=weight, lowest=lowest, highest=highest)
        setting = self._plan.recipe.setting
        density = setting("density", expert.index)
        if not self._method.startswith("dare") or density >= 1:
            return Part(theta=theta, weight=weight)
        first = start * (job.elements // job.rows)
        random = (setting("seed"), expert.index, job.canonical, first)
        return Part(theta=theta, weight=weight, random=random, density=density, rescale=setting("rescale"))

    def _left(self, expert: ExpertView, block: Block, difference: torch.Tensor) -> torch.Tensor:
        job, start, _ = block
        if (expert.index, job.name) in self._limits:
            return trim(difference, *self._limits[expert.index, job.name])
        density = self._plan.recipe.setting("density", expert.index)
        if not self._method.startswith("dare") or density >= 1:
            return difference
        rows, cols = difference.shape
        seed = self._plan.recipe.setting("seed")
        random = uniform(seed, expert.index, job.canonical, start * cols, rows * cols, self._plan.device).view(rows, cols)
        return drop(difference, random, density=density, rescale=self._plan.recipe.setting("rescale"))

    def results(self) -> dict[str, Any]:
        return {"seed": self._plan.recipe.setting("seed")} if self._method.startswith("dare") else {}
