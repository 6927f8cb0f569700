"""Weights of a block as the rules see them: the base's and every expert's rows, whole where a vocabulary lacks some; and back, rounded.

With the tensors come torch and ``ota_core.methods``: a merge whose blocks all go through compiled passes never imports this file.
"""

from collections.abc import Callable

import torch

from ota_core.files.rows import Rows
from ota_core.plan.plan import MergePlan
from ota_core.plan.views import Block, ModelView, parts


def merge_in_parts(
    plan: MergePlan, rule: Callable[[Block], torch.Tensor], block: Block, out: Rows, *, whole: bool = False
) -> None:
    """A rule on tensors, over parts that stay in the cache, or ``whole``. rule: float64 (r, C) of a part; out: (R, C) in the output's type."""
    target = out.tensor()
    for part in [block] if whole else parts(block, plan.tensor_elements):
        first = part[1] - block[1]
        merged = rule(part)
        # From a GPU into pinned memory; who gave the block to this thread waits for its stream.
        target[first : first + merged.shape[0]].copy_(merged.to(target.dtype), non_blocking=merged.is_cuda)


def base_rows(plan: MergePlan, block: Block) -> torch.Tensor | None:
    """θ₀ of a block, float64 (r, C). A row that the base's vocabulary lacks is the mean of the experts that have it."""
    if plan.base is None:
        return None
    base = plan.base.theta(block[0].name, *block[1:])
    present = plan.base.present(block[0].name, *block[1:])
    if present is None:
        return base
    total, count = torch.zeros_like(base), torch.zeros_like(base)
    for expert in plan.experts:
        has = expert.present(block[0].name, *block[1:])
        theta = expert.theta(block[0].name, *block[1:])
        total += theta if has is None else torch.where(has, theta, 0.0)
        count += 1.0 if has is None else has.double()
    return torch.where(present, base, total / count.clamp(min=1.0))


def expert_rows(plan: MergePlan, block: Block, base: torch.Tensor | None) -> list[torch.Tensor]:
    """θ_m of every expert; a row that an expert's vocabulary lacks is the base's, without a base the mean of the experts that have it."""
    thetas = [expert.theta(block[0].name, *block[1:]) for expert in plan.experts]
    presents = [expert.present(block[0].name, *block[1:]) for expert in plan.experts]
    if base is None and any(present is not None for present in presents):
        total, count = torch.zeros_like(thetas[0]), torch.zeros_like(thetas[0])
        for theta, present in zip(thetas, presents, strict=True):
            total += theta  # zeros where it is not present
            count += 1.0 if present is None else present.double()
        base = total / count.clamp(min=1.0)
    return [
        theta if present is None or base is None else torch.where(present, theta, base)
        for theta, present in zip(thetas, presents, strict=True)
    ]


def end_rows(ends: tuple[ModelView, ModelView], block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """A block of two models, each float64 (r, C); a row that one of them lacks is the other's."""
    first, second = (view.theta(block[0].name, *block[1:]) for view in ends)
    in_first, in_second = (view.present(block[0].name, *block[1:]) for view in ends)
    if in_first is not None:
        first = torch.where(in_first, first, second)
    return first, second if in_second is None else torch.where(in_second, second, first)
