"""The rule of every method. OTA with Fisher averaging and the task-vector methods have files of their own; the rules that average are here."""

import math
from typing import TYPE_CHECKING

from ota_core.errors import RecipeError
from ota_core.files.rows import Rows
from ota_core.fused.task_vectors import linear_block
from ota_core.plan.plan import MergePlan
from ota_core.plan.prepare import WholeFacts
from ota_core.plan.views import Block, ModelView, TensorJob, parts
from ota_core.rules.base import Rule
from ota_core.rules.ota import FisherRule, GraftRule, OtaRule
from ota_core.rules.task_vectors import TaskVectorRule
from ota_core.rules.varied import VariedRule

if TYPE_CHECKING:
    import torch


def rule_of(plan: MergePlan, whole: WholeFacts | None = None) -> Rule:
    """The rule of the plan's recipe. ``whole``: what is known of whole experts already, for a part of a merge."""
    if plan.recipe.scales is not None and plan.scales is None:
        raise RecipeError(
            f"scales: the recipe names {plan.recipe.scales}, which was not looked up when its inputs were assembled"
        )
    method = plan.recipe.merge_method
    if plan.recipe.varies:
        return VariedRule(plan, whole, rule_of)
    if method == "ota":
        return OtaRule(plan, whole)
    if method == "ffg":
        return GraftRule(plan, whole)
    if method == "fisher":
        return FisherRule(plan, whole)
    if method == "linear":
        return LinearRule(plan, whole)
    if method == "slerp":
        return SlerpRule(plan, whole)
    return TaskVectorRule(plan, whole)


class LinearRule(Rule):
    """Weighted average of the experts; a base takes no part."""

    def __init__(self, plan: MergePlan, whole: WholeFacts | None = None) -> None:
        super().__init__(plan, whole)
        self._weights = [plan.recipe.setting("weight", i) for i in range(len(plan.experts))]
        self._normalize = plan.recipe.setting("normalize")
        if self._normalize and sum(self._weights) == 0:
            raise RecipeError(
                f"linear: the weights {self._weights} add up to 0; they cannot be normalised. Set normalize: false or other weights"
            )

    def prefetch(self, block: Block) -> None:
        for expert in self._plan.experts:
            expert.prefetch(*block)

    def _can_fuse(self, job: TensorJob) -> bool:
        return self._plan.can_fuse(self._plan.experts, job, base=False)

    def _merge_fused(self, block: Block, out: Rows) -> None:
        thetas = [expert.stored(block[0].name, *block[1:]) for expert in self._plan.experts]
        linear_block(thetas, self._weights, out, normalize=self._normalize)

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        from ota_core.methods.averages import linear
        from ota_core.rules.rows import base_rows, expert_rows

        return linear(expert_rows(self._plan, block, base_rows(self._plan, block)), self._weights, normalize=self._normalize)


class SlerpRule(Rule):
    """Spherical interpolation from the base (t = 0) to the expert (t = 1), or from the first model to the second."""

    def __init__(self, plan: MergePlan, whole: WholeFacts | None = None) -> None:
        super().__init__(plan, whole)
        self._t = plan.recipe.setting("t")
        self._ends = slerp_ends(plan)
        self._factors: dict[str, tuple[float, float]] = {}

    def _prepare(self) -> None:
        """The angle between the two models in every tensor."""
        jobs = self._plan.merged_jobs()
        found = self._plan.stream.map(self._angle, jobs, what="angles", size=lambda job: job.elements)
        self._factors = {job.name: factors for job, factors in zip(jobs, found, strict=True)}

    def _angle(self, job: TensorJob) -> tuple[float, float]:
        from ota_core.compute.kernels import row_sums
        from ota_core.methods.averages import slerp_factors

        sums: tuple[list[float], list[float], list[float]] = ([], [], [])
        for block in parts((job, 0, job.rows), self._plan.tensor_elements):
            a, b = (view.theta(job.name, *block[1:]) for view in self._ends)
            for part, product in zip(sums, (a * a, b * b, a * b), strict=True):
                part += row_sums(product).tolist()
        return slerp_factors(math.sqrt(math.fsum(sums[0])), math.sqrt(math.fsum(sums[1])), math.fsum(sums[2]), self._t)

    def prefetch(self, block: Block) -> None:
        for view in self._ends:
            view.prefetch(*block)

    def _can_fuse(self, job: TensorJob) -> bool:
        return False

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        from ota_core.methods.averages import slerp

        a, b = (view.theta(block[0].name, *block[1:]) for view in self._ends)
        return slerp(a, b, self._factors[block[0].name])


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
