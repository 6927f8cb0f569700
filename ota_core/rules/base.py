"""What all merge rules have in common: a block goes through the compiled pass where that covers it, else through tensors, in parts."""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ota_core.files.rows import F32, F64, Rows
from ota_core.fused.sources import rounded
from ota_core.plan.estimated import estimates_of
from ota_core.plan.found import Found
from ota_core.plan.plan import MergePlan
from ota_core.plan.prepare import WholeFacts
from ota_core.plan.views import Block, TensorJob, block_elements
from ota_core.recipe.recipe import MergeRecipe
from ota_core.rules.lambdas import Scales, matrix_scales, scales_of
from ota_core.rules.refine import Refine

if TYPE_CHECKING:
    import torch


class Rule:
    """One merge rule, bound to a plan: it prepares what it must know of each tensor, then merges blocks.

    The arithmetic itself is in ``ota_core.methods`` and ``ota_core.fused``; here the recipe's options become its arguments.
    """

    _curvature = False
    """Whether the rule reads second moments."""
    _weights: list[float]
    """Of the experts, for the methods that have a ``weight``."""

    def __init__(self, plan: MergePlan, whole: WholeFacts | None = None) -> None:
        """``whole``: what is known of the whole merge already, for a part of it."""
        self._plan, self._whole = plan, whole
        self._refine = Refine(plan) if plan.recipe.refined else None
        self._lambdas = Scales(whole.scale, whole.scales) if whole and whole.scale is not None else None
        self._lambda = plan.recipe.setting("lambda")

    def prepare(self) -> None:
        """Read what must be known before the first block: of a part of a merge, but for what ``whole`` says."""
        if self._refine:
            self._refine.check_memory()
        self._prepare()
        if self._plan.recipe.auto and self._whole is None:
            self._lambdas = scales_of(self.matrix_scales())

    def _prepare(self) -> None:
        """What the method itself must know."""

    def matrix_scales(self) -> dict[str, list[float]]:
        """Tensor → λ of each of its matrices, of the tensors that are worked on here. The rule is prepared but for that."""
        found = matrix_scales(self._plan, self.edit)
        self._forget()
        return found

    def _forget(self) -> None:
        """Forget what was counted."""

    def scale_of(self, job: TensorJob) -> float:
        """λ of a tensor; 1 while λ is still being found."""
        if not self._plan.recipe.auto:
            return float(self._lambda)
        return self._lambdas.of(job, self._lambda == "auto_per_tensor") if self._lambdas else 1.0

    def edit(self, block: Block) -> "torch.Tensor":
        """What is merged less the base, before any row-space regression: float64 (r, C), on the device."""
        from ota_core.rules.rows import base_rows

        base = base_rows(self._plan, block)
        assert base is not None
        if not self._can_fuse(block[0]):
            return self._merge_tensors(block) - base
        dtype = F64 if self._exact_edit(block[0]) else F32
        out = Rows(dtype, np.empty(tuple(base.shape), dtype.held))
        self._merge_fused(block, out)
        return out.tensor().double() - base

    def _exact_edit(self, job: TensorJob) -> bool:
        """Whether λ is found from the edit in float64, or through float32, as the result would be rounded: both have been so from the start."""
        return self._plan.matched_rows(job)

    def reweighted(self, recipe: MergeRecipe) -> Self:
        """This rule, prepared as it is, for a recipe that differs in the weights of its experts alone."""
        other = copy(self)
        other._plan = replace(self._plan, recipe=recipe)
        other._weights = [recipe.setting("weight", i) for i in range(len(self._plan.experts))]
        return other

    def blocks(self, jobs: Sequence[TensorJob]) -> tuple[list[Block], list[Block]]:
        """(whole matrices that are worked on as such, the blocks of all other tensors)."""
        whole = [block for job in jobs for block in (self._refine.blocks(job) if self._refine else [])]
        whole.sort(key=lambda block: -block_elements(block))
        names = {block[0].name for block in whole}
        return whole, self._plan.blocks([job for job in jobs if job.name not in names])

    @property
    def whole_at_once(self) -> int:
        """How many whole matrices are worked on at once within the budget."""
        return self._refine.at_once if self._refine else self._plan.stream.threads

    def prefetch(self, block: Block) -> None:
        """A hint that this block is merged next."""
        self._plan.prefetch(block, curvature=self._curvature)

    def merge(self, block: Block, out: Rows) -> None:
        """Write the merged rows into ``out``: (R, C) in the output's type, on the CPU. Called from several threads."""
        if self._plan.scales is not None:
            from ota_core.rules.rows import merge_in_parts

            merge_in_parts(self._plan, self._merge_scaled, block, out, whole=self.is_whole(block[0]))
        elif self._refine and self._refine.matrices(block[0]):
            self._refine.merge(block, self.edit, out)
        elif self._can_fuse(block[0]):
            with rounded(out) as target:
                self._merge_fused(block, target)
        else:
            from ota_core.rules.rows import merge_in_parts

            merge_in_parts(self._plan, self._merge_tensors, block, out)

    def _can_fuse(self, job: TensorJob) -> bool:
        """Whether the compiled pass covers what the recipe asks of this tensor; it gives the same bits as the tensors' way."""
        return self._plan.can_fuse(self._plan.experts, job)

    def _merge_fused(self, block: Block, out: Rows) -> None:
        """The compiled pass, rounded into ``out``: float32 or bfloat16, (R, C)."""
        raise NotImplementedError

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        """The merged rows of a block, float64 (r, C)."""
        raise NotImplementedError

    def is_whole(self, job: TensorJob) -> bool:
        """Whether a tensor's matrices are worked on whole: they are refined."""
        return self._refine is not None and self._refine.matrices(job) is not None

    def edits(self, block: Block) -> "tuple[torch.Tensor, list[torch.Tensor]]":
        """(θ₀, λ·A_m of every expert) of a block, each float64 (r, C): a whole matrix where ``is_whole``, else ``plan.tensor_elements`` at most.

        A_m is expert m's part of the merged edit at λ = 1. θ₀ + Σ_m λ·A_m is the merged block: to float64's rounding, and where it is
        refined to that of the regression.
        """
        if self._refine is None or not self.is_whole(block[0]):
            return self._edits(block)
        return self._refine.edits(block, self._edits)

    def _edits(self, block: Block) -> "tuple[torch.Tensor, list[torch.Tensor]]":
        """The same before any row-space regression."""
        raise NotImplementedError

    def _merge_scaled(self, block: Block) -> "torch.Tensor":
        """θ₀ + Σ_m s_m·λ·A_m with the tensor's coefficients in the file of scales: float64 (r, C)."""
        assert self._plan.scales is not None
        merged, edits = self.edits(block)
        for scale, edit in zip(self._plan.scales.values[block[0].canonical].tolist(), edits, strict=True):
            merged = merged + scale * edit
        return merged

    def found(self) -> Found:
        """What the blocks merged so far told; parts of a merge add up."""
        return Found(**self._common())

    def _common(self) -> dict[str, Any]:
        """What every method's parts found."""
        scales = {"scale": self._lambdas.all, "scales": dict(self._lambdas.tensors)} if self._lambdas else {}
        return scales | ({"residuals": dict(self._refine.residuals)} if self._refine else {})

    def results(self, found: Found) -> dict[str, Any]:
        """What the record says of this merge, from what all its parts found."""
        results: dict[str, Any] = {}
        if estimated := estimates_of(self._plan.experts):
            results["estimated"] = estimated
        if found.scale is not None:
            results["lambda"] = {"value": found.scale, "per_tensor": dict(sorted(found.scales.items()))}
        if found.residuals:
            worst = max(found.residuals, key=lambda name: (found.residuals[name], name))
            results["rowspace"] = {"tensors": len(found.residuals), "largest_residual": found.residuals[worst], "of": worst}
        return results
