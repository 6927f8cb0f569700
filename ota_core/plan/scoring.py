"""The task vector of a block, and the scores by which its elements are ranked: √v̂·|Δ| or |Δ|, of any experts of a plan."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ota_core.files.rows import Rows
from ota_core.fused.counts import Candidate
from ota_core.fused.sources import BY_CURVATURE, BY_MAGNITUDE
from ota_core.plan.plan import MergePlan
from ota_core.plan.views import Block, ExpertView, TensorJob, parts

if TYPE_CHECKING:
    import torch


def delta(
    plan: MergePlan, expert: ExpertView, job: TensorJob, start: int, stop: int, *, base: "torch.Tensor | None" = None
) -> "torch.Tensor":
    """Task vector of a block, float64 (r, C); 0 in rows that the expert or the base lacks. base: its θ₀ where it was read already."""
    assert plan.base is not None
    difference = expert.theta(job.name, start, stop) - (plan.base.theta(job.name, start, stop) if base is None else base)
    for view in (expert, plan.base):
        present = view.present(job.name, start, stop)
        if present is not None:
            difference = difference.where(present, 0.0)
    return difference


@dataclass(frozen=True)
class Scoring:
    """The scores that FFG, TIES and breadcrumbs rank by."""

    plan: MergePlan
    curvature: bool
    """√v̂·|Δ| over the tensors that carry curvature; else |Δ|, over those or, with ``everywhere``, over all."""
    full: bool = False
    """From the uncompressed second moments."""
    everywhere: bool = False

    def compiled(self, experts: Sequence[int], job: TensorJob) -> bool:
        """Whether ``candidates`` serves this tensor."""
        return self.plan.can_fuse([self.plan.expert(i) for i in experts], job)

    def covers(self, expert: int, job: TensorJob) -> bool:
        """Whether this expert's scores of the tensor count."""
        return self.everywhere or self.plan.expert(expert).has_curvature(job.canonical)

    def candidates(self, experts: Sequence[int], block: Block) -> tuple[Rows, list[Candidate]]:
        """The base's rows as stored, and one candidate an expert, in the order of ``experts``, which is what their rows count."""
        assert self.plan.base is not None
        found = []
        for row, expert in enumerate(self.plan.expert(i) for i in experts):
            theta = expert.stored(block[0].name, *block[1:])
            v = expert.v_source(*block, full=self.full) if self.curvature else None
            found.append(Candidate(theta=theta, v=v, metric=BY_CURVATURE if self.curvature else BY_MAGNITUDE, row=row))
        return self.plan.base.stored(block[0].name, *block[1:]), found

    def scores(self, experts: Sequence[int], block: Block) -> "Iterator[tuple[int, torch.Tensor]]":
        """Expert and scores of a block, float32 ≥ 0, in parts, for what the compiled pass does not serve."""
        assert self.plan.base is not None
        for part in parts(block, self.plan.tensor_elements):
            base = self.plan.base.theta(part[0].name, *part[1:])
            for index in experts:
                view = self.plan.expert(index)
                yield index, self.of(view, part, delta(self.plan, view, *part, base=base))

    def of(
        self, expert: ExpertView, block: Block, difference: "torch.Tensor", v_hat: "torch.Tensor | None" = None
    ) -> "torch.Tensor":
        """Scores of a block, float32 (r, C). difference: its task vector, float64 (r, C); v_hat: the merge's v̂ where it was read already."""
        from ota_core.methods.saliency import curvature_scores, magnitude_scores

        if not self.curvature:
            return magnitude_scores(difference)
        if self.full or v_hat is None:
            v_hat = expert.v_hat(block[0].canonical, *block[1:], full=self.full)
        return curvature_scores(v_hat, difference)

    def prefetch(self, experts: Sequence[int], block: Block) -> None:
        """A hint that this block is next."""
        assert self.plan.base is not None
        self.plan.base.prefetch(*block)
        for expert in (self.plan.expert(i) for i in experts):
            expert.prefetch(*block)
            if self.curvature:
                expert.prefetch_curvature(*block, full=self.full)

    def refuse(self, expert: int, block: Block) -> None:
        """Raise the error that names the entry of the expert's v in this block that is negative, NaN or infinite."""
        self.plan.expert(expert).refuse(*block)


def ffg_scoring(plan: MergePlan) -> Scoring:
    """How the recipe's FFG ranks."""
    setting = plan.recipe.setting
    return Scoring(plan, setting("metric") == "curvature", full=setting("mask_curvature") == "full")
