"""What all merge rules have in common: a block goes through the compiled pass where that covers it, else through tensors, in parts."""

from typing import TYPE_CHECKING, Any

from ota_core.files.rows import Rows
from ota_core.fused.sources import rounded
from ota_core.plan.found import Found
from ota_core.plan.plan import MergePlan
from ota_core.plan.views import Block, TensorJob

if TYPE_CHECKING:
    import torch


class Rule:
    """One merge rule, bound to a plan: it prepares what it must know of each tensor, then merges blocks.

    The arithmetic itself is in ``ota_core.methods`` and ``ota_core.fused``; here the recipe's options become its arguments.
    """

    _curvature = False
    """Whether the rule reads second moments."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan

    def prepare(self) -> None:
        """Read what must be known before the first block."""

    def prefetch(self, block: Block) -> None:
        """A hint that this block is merged next."""
        self._plan.prefetch(block, curvature=self._curvature)

    def merge(self, block: Block, out: Rows) -> None:
        """Write the merged rows into ``out``: (R, C) in the output's type, on the CPU. Called from several threads."""
        if self._plan.scales is None and self._can_fuse(block[0]):
            with rounded(out) as target:
                self._merge_fused(block, target)
        else:
            from ota_core.rules.rows import merge_in_parts

            merge_in_parts(self._plan, self._scaled if self._plan.scales else self._merge_tensors, block, out)

    def _can_fuse(self, job: TensorJob) -> bool:
        """Whether the compiled pass covers what the recipe asks of this tensor; it gives the same bits as the tensors' way."""
        return self._plan.can_fuse(self._plan.experts, job)

    def _merge_fused(self, block: Block, out: Rows) -> None:
        """The compiled pass, rounded into ``out``: float32 or bfloat16, (R, C)."""
        raise NotImplementedError

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        """The merged rows of a block, float64 (r, C)."""
        raise NotImplementedError

    def edits(self, block: Block) -> "tuple[torch.Tensor, list[torch.Tensor]]":
        """(θ₀, λ·A_m of every expert) of a block of ``plan.tensor_elements`` at most, each float64 (r, C).

        A_m is expert m's part of the merged edit at λ = 1: θ₀ + Σ_m λ·A_m is the merged block, to float64's rounding.
        """
        raise NotImplementedError

    def _scaled(self, block: Block) -> "torch.Tensor":
        """θ₀ + Σ_m s_m·λ·A_m with the tensor's coefficients in the file of scales."""
        assert self._plan.scales is not None
        merged, edits = self.edits(block)
        for scale, edit in zip(self._plan.scales.values[block[0].canonical].tolist(), edits, strict=True):
            merged = merged + scale * edit
        return merged

    def found(self) -> Found:
        """What the blocks merged so far told; parts of a merge add up."""
        return Found()

    def results(self, found: Found) -> dict[str, Any]:
        """What the record says of this merge, from what all its parts found."""
        return {}
