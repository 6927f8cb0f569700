"""Binds a recipe to its merge rule: a ``Rule`` prepares what it must know of each tensor, then merges blocks.

The arithmetic itself is in ``ota_core.methods``; here the recipe's options become its arguments. OTA and the task-vector methods have files of their own.
"""

import math
from typing import TYPE_CHECKING, Any, Protocol

from ota_core.errors import RecipeError
from ota_core.files.rows import Rows
from ota_core.fused.ota import Vote, ota_block
from ota_core.fused.sources import rounded
from ota_core.fused.task_vectors import linear_block
from ota_core.plan.found import Found
from ota_core.plan.plan import MergePlan
from ota_core.plan.prepare import Curvature, WholeFacts, prepare_curvature
from ota_core.plan.views import Block, ModelView, TensorJob, parts
from ota_core.rules.ota import OtaRule
from ota_core.rules.task_vectors import TaskVectorRule

if TYPE_CHECKING:
    import torch


class Rule(Protocol):
    """One merge rule, bound to a plan."""

    def prepare(self) -> None:
        """Read what must be known before the first block."""
        ...

    def prefetch(self, block: Block) -> None:
        """A hint that this block is merged next."""
        ...

    def merge(self, block: Block, out: Rows) -> None:
        """Write the merged rows into ``out``: (R, C) in the output's type, on the CPU. Called from several threads."""
        ...

    def found(self) -> Found:
        """What the blocks merged so far told; parts of a merge add up."""
        ...

    def results(self, found: Found) -> dict[str, Any]:
        """What the record says of this merge, from what all its parts found."""
        ...


def rule_of(plan: MergePlan, whole: WholeFacts | None = None) -> Rule:
    """The rule of the plan's recipe. ``whole``: what is known of whole experts already, for a part of a merge."""
    method = plan.recipe.merge_method
    if method == "ota":
        return OtaRule(plan, whole)
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

    def prefetch(self, block: Block) -> None:
        self._plan.prefetch(block, curvature=True)

    def merge(self, block: Block, out: Rows) -> None:
        fuses = self._plan.can_fuse(self._plan.experts, block[0], base=self._plan.base is not None)
        if fuses and block[0].name not in self._facts.averaged:
            self._merge_fused(block, out)
        else:
            from ota_core.rules.rows import merge_in_parts

            merge_in_parts(self._plan, self._merge_tensors, block, out)

    def _merge_fused(self, block: Block, out: Rows) -> None:
        """Fisher averaging is OTA with power 1 and no mask: the same sums in the same order, hence the same bits."""
        plan, job = self._plan, block[0]
        active = [expert for expert in plan.experts if expert.has_curvature(job.canonical)]
        votes = [
            Vote(
                theta=expert.stored(job.name, *block[1:]),
                v=expert.v_source(*block),
                scale=plan.recipe.setting("weight", expert.index),
            )
            for expert in active
        ]
        with rounded(out) as target:
            base = plan.base.stored(job.name, *block[1:]) if plan.base else None
            _, bad = ota_block(base, votes, target, power=1.0, epsilon=0.0, lam=1.0, denominator="kept")
        if bad is not None:
            active[bad].refuse(*block)

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        import torch

        from ota_core.methods.averages import fisher
        from ota_core.methods.ota import mean
        from ota_core.rules.rows import base_rows, expert_rows

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

    def found(self) -> Found:
        reports = {name: report.model_dump(exclude={"sqrt_error_per_tensor"}) for name, report in self._facts.reports.items()}
        return Found(compression=reports)

    def results(self, found: Found) -> dict[str, Any]:
        return {"compression": found.compression} if found.compression else {}


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

    def prefetch(self, block: Block) -> None:
        for expert in self._plan.experts:
            expert.prefetch(*block)

    def merge(self, block: Block, out: Rows) -> None:
        if not self._plan.can_fuse(self._plan.experts, block[0], base=False):
            from ota_core.rules.rows import merge_in_parts

            merge_in_parts(self._plan, self._merge_tensors, block, out)
            return
        thetas = [expert.stored(block[0].name, *block[1:]) for expert in self._plan.experts]
        with rounded(out) as target:
            linear_block(thetas, self._weights, target, normalize=self._normalize)

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        from ota_core.methods.averages import linear
        from ota_core.rules.rows import base_rows, expert_rows

        return linear(expert_rows(self._plan, block, base_rows(self._plan, block)), self._weights, normalize=self._normalize)

    def found(self) -> Found:
        return Found()

    def results(self, found: Found) -> dict[str, Any]:
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

    def merge(self, block: Block, out: Rows) -> None:
        from ota_core.rules.rows import merge_in_parts

        merge_in_parts(self._plan, self._merge_tensors, block, out)

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        from ota_core.methods.averages import slerp

        a, b = (view.theta(block[0].name, *block[1:]) for view in self._ends)
        return slerp(a, b, self._factors[block[0].name])

    def found(self) -> Found:
        return Found()

    def results(self, found: Found) -> dict[str, Any]:
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
