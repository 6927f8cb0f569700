"""The task vector of a block, and the scores by which its elements are ranked: √v̂·|Δ| or |Δ|, of any experts of a plan."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ota_core.files.rows import Rows
from ota_core.fused.counts import Candidate, keep_block
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

    def compiled(self, experts: Iterable[int], job: TensorJob) -> bool:
        """Whether ``candidates`` serves this tensor."""
        return self.plan.can_fuse([self.plan.expert(i) for i in experts], job)

    def covers(self, expert: int, job: TensorJob) -> bool:
        """Whether this expert's scores of the tensor count."""
        return self.everywhere or self.plan.expert(expert).has_curvature(job.canonical)

    def candidates(self, rows: Mapping[int, int], block: Block) -> tuple[Rows, list[Candidate]]:
        """The base's rows as stored, and one candidate an expert. rows: expert → its row of the counts."""
        assert self.plan.base is not None
        found = []
        for index, row in rows.items():
            expert = self.plan.expert(index)
            theta = expert.stored(block[0].name, *block[1:])
            v = expert.v_source(*block, full=self.full) if self.curvature else None
            found.append(Candidate(theta=theta, v=v, metric=BY_CURVATURE if self.curvature else BY_MAGNITUDE, row=row))
        return self.plan.base.stored(block[0].name, *block[1:]), found

    def scores(self, experts: Iterable[int], block: Block) -> "Iterator[tuple[int, torch.Tensor | NDArray[np.float32]]]":
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

    def keep(self, expert: ExpertView, block: Block, threshold: float) -> tuple[NDArray[np.bool_], int]:
        """What has at least this score, and more than 0: bool, r·C elements on the CPU, and how many. Compiled where that can be."""
        if self.compiled([expert.index], block[0]):
            return self.kept(expert, block, threshold)[2]
        from ota_core.methods.saliency import keep

        pieces = []
        for _, scores in self.scores([expert.index], block):
            assert not isinstance(scores, np.ndarray)
            pieces.append(keep(scores, threshold).cpu().numpy().reshape(-1))
        kept = np.concatenate(pieces)
        return kept, int(kept.sum())

    def kept(self, expert: ExpertView, block: Block, threshold: float) -> tuple[Rows, Rows, tuple[NDArray[np.bool_], int]]:
        """The base's and the expert's rows as stored, each read once, and what ``keep`` says of them; where ``compiled``."""
        base, (candidate,) = self.candidates({expert.index: 0}, block)
        found = keep_block(base, candidate, threshold)
        if found is None:
            expert.refuse(*block)
        return base, candidate.theta, found

    def prefetch(self, experts: Iterable[int], block: Block) -> None:
        """A hint that this block is next."""
        assert self.plan.base is not None
        self.plan.base.prefetch(*block)
        for expert in (self.plan.expert(i) for i in experts):
            expert.prefetch(*block)
            if self.curvature and expert.masks is None:  # a mask from a file is read, no score is computed
                expert.prefetch_curvature(*block, full=self.full)

    def refuse_bad(self, experts: Iterable[int], block: Block, bad: int | None) -> None:
        """Raise the error that names the entry of v that is negative, NaN or infinite. bad: the position of its expert; None for none."""
        if bad is not None:
            self.plan.expert([*experts][bad]).refuse(*block)


@dataclass(frozen=True, kw_only=True)
class BlockScoring(Scoring):
    """Scores that no single expert has, such as a deviation between experts: one score for each element, under the number 0."""

    scores_of: Callable[[Block], NDArray[np.float32]]
    """The scores of a block, float32 ≥ 0, (r·C,)."""
    ahead: Callable[[Block], None]
    """A hint that this block is next."""

    def compiled(self, experts: Iterable[int], job: TensorJob) -> bool:
        return False

    def covers(self, expert: int, job: TensorJob) -> bool:
        return True

    def scores(self, experts: Iterable[int], block: Block) -> "Iterator[tuple[int, NDArray[np.float32]]]":
        yield 0, self.scores_of(block)

    def prefetch(self, experts: Iterable[int], block: Block) -> None:
        self.ahead(block)


def ffg_scoring(plan: MergePlan) -> Scoring:
    """How the recipe's FFG ranks."""
    setting = plan.recipe.setting
    everywhere = not plan.recipe.needs_moments  # a graft that ranks by magnitude
    return Scoring(plan, setting("metric") == "curvature", full=setting("mask_curvature") == "full", everywhere=everywhere)
