"""Binds a recipe to its merge rule: a ``Rule`` prepares what it must know of each tensor, then merges blocks.

The arithmetic itself is in ``ota_core.methods``; here the recipe's options become its arguments. OTA and the task-vector methods have files of their own.
"""

import math
from typing import Any, Protocol

import torch

from ota_core.errors import RecipeError
from ota_core.fused_task_vectors import linear_block
from ota_core.kernels import row_sums
from ota_core.methods.averages import fisher, linear, slerp, slerp_factors
from ota_core.methods.ota import mean
from ota_core.ota_rule import OtaRule
from ota_core.plan import MergePlan
from ota_core.prepare import Block, Curvature, blocks, prepare_curvature
from ota_core.rows import base_rows, expert_rows
from ota_core.task_vector_rule import TaskVectorRule
from ota_core.views import ModelView, TensorJob


class Rule(Protocol):
    """One merge rule, bound to a plan."""

    def prepare(self) -> None:
        """Read what must be known before the first block."""
        ...

    def merge(self, block: Block) -> torch.Tensor:
        """The merged rows, float64 (r, C). Called from several threads."""
        ...

    def results(self) -> dict[str, Any]:
        """What the record says of this merge; complete after the last block."""
        ...


def rule_of(plan: MergePlan) -> Rule:
    """The rule of the plan's recipe."""
    method = plan.recipe.merge_method
    if method == "ota":
        return OtaRule(plan)
    if method == "fisher":
        return FisherRule(plan)
    if method == "linear":
        return LinearRule(plan)
    if method == "slerp":
        return SlerpRule(plan)
    return TaskVectorRule(plan)


class FisherRule:
    """Fisher-weighted averaging with v̂ as the diagonal of the Fisher matrix."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan, self._facts = plan, Curvature()

    def prepare(self) -> None:
        self._facts = prepare_curvature(self._plan)

    def merge(self, block: Block) -> torch.Tensor:
        job = block[0]
        base = base_rows(self._plan, block)
        thetas = expert_rows(self._plan, block, base)
        if job.name in self._facts.averaged:
            return mean(thetas)
        weights = []
        for expert, theta in zip(self._plan.experts, thetas, strict=True):
            if not expert.has_curvature(job.canonical):
                weights.append(torch.zeros_like(theta))
                continue
            weight = expert.v_hat(job.canonical, *block[1:]).double() * self._plan.recipe.setting("weight", expert.index)
            present = expert.present(job.name, *block[1:])
            weights.append(weight if present is None else torch.where(present, weight, 0.0))
        return fisher(thetas, weights, mean(thetas) if base is None else base)

    def results(self) -> dict[str, Any]:
        reports = {name: report.model_dump(exclude={"sqrt_error_per_tensor"}) for name, report in self._facts.reports.items()}
        return {"compression": reports} if reports else {}


class LinearRule:
    """Weighted average of the experts; a base takes no part."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._weights = [plan.recipe.setting("weight", i) for i in range(len(plan.experts))]
        self._normalize = plan.recipe.setting("normalize")
        if self._normalize and sum(self._weights) == 0:
            raise RecipeError(
                f"linear: the weights {self._weights} add up to 0; they cannot be normalised. Set normalize: false or other weights"
            )

    def prepare(self) -> None:
        """Nothing beyond the block is needed."""

    def merge(self, block: Block) -> torch.Tensor:
        if self._plan.can_fuse(self._plan.experts, block[0], base=False):
            thetas = [expert.single(*block) for expert in self._plan.experts]
            return linear_block(thetas, self._weights, normalize=self._normalize).view(block[2] - block[1], -1)
        return linear(expert_rows(self._plan, block, base_rows(self._plan, block)), self._weights, normalize=self._normalize)

    def results(self) -> dict[str, Any]:
        return {}


class SlerpRule:
    """Spherical interpolation from the base (t = 0) to the expert (t = 1), or from the first model to the second."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._t = plan.recipe.setting("t")
        self._ends = slerp_ends(plan)
        self._factors: dict[str, tuple[float, float]] = {}

    def prepare(self) -> None:
        """The angle between the two models in every tensor."""
        jobs = self._plan.merged_jobs()
        found = self._plan.stream.map(self._angle, jobs, what="angles", size=lambda job: job.elements)
        self._factors = {job.name: factors for job, factors in zip(jobs, found, strict=True)}

    def _angle(self, job: TensorJob) -> tuple[float, float]:
        sums: tuple[list[float], list[float], list[float]] = ([], [], [])
        for block in blocks(self._plan, [job]):
            a, b = (view.theta(job.name, *block[1:]) for view in self._ends)
            for part, product in zip(sums, (a * a, b * b, a * b), strict=True):
                part += row_sums(product).tolist()
        return slerp_factors(math.sqrt(math.fsum(sums[0])), math.sqrt(math.fsum(sums[1])), math.fsum(sums[2]), self._t)

    def merge(self, block: Block) -> torch.Tensor:
        a, b = (view.theta(block[0].name, *block[1:]) for view in self._ends)
        return slerp(a, b, self._factors[block[0].name])

    def results(self) -> dict[str, Any]:
        return {}


def slerp_ends(plan: MergePlan) -> tuple[ModelView, ModelView]:
    """The models at t = 0 and t = 1. Raises RecipeError when it is not clear which two are meant."""
    if plan.base is None:
        return plan.experts[0], plan.experts[1]
    others = [e for e in plan.experts if e.checkpoint.path.resolve() != plan.base.checkpoint.path.resolve()]
    if len(others) != 1:
        raise RecipeError(
            f"slerp: base_model and {len(others)} other models are named; expected the base (t = 0) and one other model (t = 1), or two models without a base"
        )
    return plan.base, others[0]
