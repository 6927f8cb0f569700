"""The rule of every method. OTA with Fisher averaging and the task-vector methods have files of their own; the rules that average are here."""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ota_core.errors import RecipeError
from ota_core.files.rows import Rows
from ota_core.fused.sums import products_of
from ota_core.fused.task_vectors import linear_block, slerp_block
from ota_core.methods.numbers import slerp_factors
from ota_core.plan.plan import MergePlan
from ota_core.plan.prepare import WholeFacts
from ota_core.plan.views import Block, ModelView, TensorJob, block_elements, parts
from ota_core.rules.base import Rule
from ota_core.rules.della import DellaRule
from ota_core.rules.edits import FusionRule, NearswapRule, RamRule, SceRule
from ota_core.rules.ota import FisherRule, OtaRule
from ota_core.rules.passthrough import PassthroughRule
from ota_core.rules.spans import SpanRule
from ota_core.rules.task_vectors import TaskVectorRule

if TYPE_CHECKING:
    import torch


_RULES: dict[str, type[Rule]] = {
    "ota": OtaRule,
    "fisher": FisherRule,
    "passthrough": PassthroughRule,
    "nearswap": NearswapRule,
    "arcee_fusion": FusionRule,
    "ram": RamRule,
    "ramplus_tl": RamRule,
    "sce": SceRule,
    "della": DellaRule,
    "della_linear": DellaRule,
    "multislerp": SpanRule,
    "nuslerp": SpanRule,
    "karcher": SpanRule,
    "model_stock": SpanRule,
}
"""Method to its rule, but for those below and for the methods that add up task vectors."""


def rule_of(plan: MergePlan, whole: WholeFacts | None = None) -> Rule:
    """The rule of the plan's recipe. ``whole``: what is known of whole experts already, for a part of a merge."""
    if plan.recipe.scales is not None and plan.scales is None:
        raise RecipeError(
            f"scales: the recipe names {plan.recipe.scales}, which was not looked up when its inputs were assembled"
        )
    rules: dict[str, type[Rule]] = {**_RULES, "linear": LinearRule, "slerp": SlerpRule}
    return rules.get(plan.recipe.merge_method, TaskVectorRule)(plan, whole)


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
        lacking = self._plan.base is not None and any(theta.present is not None for theta in thetas)
        base = self._plan.base.stored(block[0].name, *block[1:]) if self._plan.base and lacking else None
        linear_block(thetas, self._weights, out, normalize=self._normalize, base=base)

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
        blocks = self._plan.blocks(jobs)
        found = self._plan.stream.map(self._products, blocks, what="angles", size=block_elements, ahead=self.prefetch)
        sums: dict[str, list[NDArray[np.float64]]] = {job.name: [] for job in jobs}
        for block, products in zip(blocks, found, strict=True):
            sums[block[0].name].append(products)
        for name, parts_of_tensor in sums.items():
            squares0, squares1, dot = (math.fsum(row) for row in np.concatenate(parts_of_tensor or [np.zeros((3, 0))], axis=1))
            self._factors[name] = slerp_factors(math.sqrt(squares0), math.sqrt(squares1), dot, self._t)

    def _products(self, block: Block) -> "NDArray[np.float64]":
        """Σ a², Σ b² and Σ a·b of every row, float64 (3, r)."""
        if self._can_fuse(block[0]):
            return products_of(self._stored(block))
        from ota_core.compute.kernels import row_sums
        from ota_core.rules.rows import end_rows

        found = []
        for part in parts(block, self._plan.tensor_elements):
            a, b = end_rows(self._ends, part)
            found.append(np.stack([row_sums(product).numpy() for product in (a * a, b * b, a * b)]))
        return np.concatenate(found, axis=1)

    def _stored(self, block: Block) -> tuple[Rows, Rows]:
        first, second = (view.stored(block[0].name, *block[1:]) for view in self._ends)
        return first, second

    def prefetch(self, block: Block) -> None:
        for view in self._ends:
            view.prefetch(*block)

    def _can_fuse(self, job: TensorJob) -> bool:
        return self._plan.can_fuse(self._plan.experts, job, base=self._plan.base is not None)

    def _merge_fused(self, block: Block, out: Rows) -> None:
        slerp_block(self._stored(block), self._factors[block[0].name], out)

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        from ota_core.methods.averages import slerp
        from ota_core.rules.rows import end_rows

        return slerp(*end_rows(self._ends, block), self._factors[block[0].name])


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
