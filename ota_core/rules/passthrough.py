"""passthrough, bound to a plan: one model's tensors as they are, or times a factor."""

from typing import TYPE_CHECKING

import numpy as np

from ota_core.files.rows import Rows
from ota_core.fused.task_vectors import linear_block
from ota_core.plan.views import Block, TensorJob
from ota_core.rules.base import Rule

if TYPE_CHECKING:
    import torch


class PassthroughRule(Rule):
    """θ, or scale·θ. Without a factor and a change of type the bits are copied."""

    def prefetch(self, block: Block) -> None:
        self._plan.experts[0].prefetch(*block)

    def merge(self, block: Block, out: Rows) -> None:
        if self._scale(block[0]) == 1.0 and self._can_fuse(block[0]):
            rows = self._plan.experts[0].stored(block[0].name, *block[1:])
            if rows.dtype == out.dtype:
                np.copyto(out.held, rows.held)
                return
        super().merge(block, out)

    def _scale(self, job: TensorJob) -> float:
        scale = self._plan.recipe.setting("scale", 0)
        return 1.0 if scale is None else float(scale)

    def _can_fuse(self, job: TensorJob) -> bool:
        return not self._plan.matched_rows(job) and self._plan.can_fuse(self._plan.experts, job, base=False)

    def _merge_fused(self, block: Block, out: Rows) -> None:
        theta = self._plan.experts[0].stored(block[0].name, *block[1:])
        linear_block([theta], [self._scale(block[0])], out, normalize=False)

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        from ota_core.rules.rows import base_rows, expert_rows

        return self._scale(block[0]) * expert_rows(self._plan, block, base_rows(self._plan, block))[0]
