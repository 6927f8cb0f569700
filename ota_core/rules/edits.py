"""nearswap, Arcee Fusion, RAM and SCE, bound to a plan: what becomes of the experts' edits is decided element by element."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ota_core.errors import RecipeError
from ota_core.files.rows import Rows
from ota_core.fused import edits as fused
from ota_core.plan.plan import MergePlan
from ota_core.plan.prepare import WholeFacts
from ota_core.plan.scoring import BlockScoring
from ota_core.plan.tally import Group, kth_largest
from ota_core.plan.views import Block, ExpertView, TensorJob, block_elements, parts
from ota_core.plan.whole import is_vector
from ota_core.rules.base import Rule

if TYPE_CHECKING:
    import torch

    Parts = tuple[list["torch.Tensor"], "torch.Tensor | None"]

F64 = NDArray[np.float64]


class EditsRule(Rule):
    """θ₀ + λ · Σ parts / divisor, with what a method makes of the edits."""

    def _stored(self, block: Block, experts: Sequence[ExpertView] | None = None) -> tuple[Rows, list[Rows]]:
        """The base's rows and every expert's (or some experts'), as stored."""
        assert self._plan.base is not None
        job, start, stop = block
        used = self._plan.experts if experts is None else experts
        return self._plan.base.stored(job.name, start, stop), [expert.stored(job.name, start, stop) for expert in used]

    def _deltas(self, block: Block) -> "tuple[torch.Tensor, list[torch.Tensor]]":
        """θ₀ and every Δ, float64 (r, C)."""
        from ota_core.rules.rows import base_rows, expert_rows

        base = base_rows(self._plan, block)
        assert base is not None
        return base, [theta - base for theta in expert_rows(self._plan, block, base)]

    def _parts(self, block: Block, deltas: "list[torch.Tensor]") -> "Parts":
        """One part for each expert, and what their sum is divided by."""
        raise NotImplementedError

    def _merge_tensors(self, block: Block) -> "torch.Tensor":
        base, deltas = self._deltas(block)
        found, divisor = self._parts(block, deltas)
        total = found[0]
        for part in found[1:]:
            total = total + part
        return base + self.scale_of(block[0]) * (total if divisor is None else total / divisor)

    def _edits(self, block: Block) -> "tuple[torch.Tensor, list[torch.Tensor]]":
        base, deltas = self._deltas(block)
        found, divisor = self._parts(block, deltas)
        lam = self.scale_of(block[0])
        return base, [lam * (part if divisor is None else part / divisor) for part in found]

    def _by_row(self, jobs: Sequence[TensorJob]) -> list[Block]:
        """Blocks of whole rows; a vector is one row."""
        return [
            block for job in jobs for block in ([(job, 0, job.rows)] if is_vector(job) else self._plan.blocks([job]))
        ]  # fmt: skip


class OtherRule(EditsRule):
    """A method that takes over what one other model changed of the base."""

    def __init__(self, plan: MergePlan, whole: WholeFacts | None = None) -> None:
        super().__init__(plan, whole)
        assert plan.base is not None
        base = plan.base.checkpoint.path.resolve()
        others = [expert for expert in plan.experts if expert.checkpoint.path.resolve() != base]
        if len(others) != 1:
            raise RecipeError(
                f"{plan.recipe.merge_method}: base_model and {len(others)} other models are named; expected the base and one other model"
            )
        self._other = others[0]

    def _pair(self, block: Block) -> tuple[Rows, Rows]:
        base, (theta,) = self._stored(block, [self._other])
        return base, theta

    def _can_fuse(self, job: TensorJob) -> bool:
        return self._plan.can_fuse([self._other], job)

    def _parts(self, block: Block, deltas: "list[torch.Tensor]") -> "Parts":
        pairs = zip(self._plan.experts, deltas, strict=True)
        return [self._taken(block, delta) if expert is self._other else 0.0 * delta for expert, delta in pairs], None

    def _taken(self, block: Block, delta: "torch.Tensor") -> "torch.Tensor":
        """What is taken over of Δ."""
        raise NotImplementedError


class NearswapRule(OtherRule):
    """Edits up to t whole, larger ones cut to t."""

    def _merge_fused(self, block: Block, out: Rows) -> None:
        base, theta = self._pair(block)
        fused.nearswap_block(base, theta, out, t=self._plan.recipe.setting("t"), lam=self.scale_of(block[0]))

    def _taken(self, block: Block, delta: "torch.Tensor") -> "torch.Tensor":
        from ota_core.methods.edits import nearswap

        return nearswap(delta, t=self._plan.recipe.setting("t"))


class FusionRule(OtherRule):
    """Arcee Fusion: the edits whose importance lies far above that of the others in their tensor."""

    def __init__(self, plan: MergePlan, whole: WholeFacts | None = None) -> None:
        super().__init__(plan, whole)
        self._divergences: dict[str, F64] = {}
        self._thresholds: dict[str, float] = {}

    def _prepare(self) -> None:
        """The divergence of every row, then of every tensor the quartiles of its importances and the threshold that they set."""
        plan, jobs = self._plan, self._plan.merged_jobs()
        cut = self._by_row(jobs)
        found = plan.stream.map(self._diverge, cut, what="divergences", size=block_elements, ahead=self.prefetch)
        rows: dict[str, list[F64]] = {}
        for block, one in zip(cut, found, strict=True):
            rows.setdefault(block[0].name, []).append(one)
        self._divergences = {name: np.concatenate(one) for name, one in rows.items()}
        groups = [Group(jobs=[job], experts=[0], ranks={0: _quartiles(job.elements)}) for job in jobs]
        scoring = BlockScoring(plan, False, everywhere=True, scores_of=self._importances, ahead=self.prefetch)
        for job, scores in zip(jobs, kth_largest(scoring, groups, what="importances"), strict=True):
            upper, middle, lower = scores[0]
            self._thresholds[job.name] = middle + 1.5 * (upper - lower)

    def _diverge(self, block: Block) -> F64:
        rows = 1 if is_vector(block[0]) else block[2] - block[1]
        if self._can_fuse(block[0]):
            return fused.divergences(*self._pair(block), rows)
        base, theta = self._rows_of_other(block)
        return fused.divergences_of(base.cpu().numpy().reshape(rows, -1), theta.cpu().numpy().reshape(rows, -1))

    def _rows_of_other(self, block: Block) -> "tuple[torch.Tensor, torch.Tensor]":
        from ota_core.rules.rows import base_rows, expert_rows

        base = base_rows(self._plan, block)
        assert base is not None
        return base, expert_rows(self._plan, block, base)[self._plan.experts.index(self._other)]

    def _of_rows(self, block: Block) -> F64:
        """The divergence of each row of a block; of a vector the one that it has."""
        found = self._divergences[block[0].name]
        return found if is_vector(block[0]) else found[block[1] : block[2]]

    def _importances(self, block: Block) -> NDArray[np.float32]:
        if self._can_fuse(block[0]):
            return fused.importances(*self._pair(block), self._of_rows(block))
        from ota_core.methods.edits import importance

        pieces = []
        for piece in parts(block, self._plan.tensor_elements):
            base, theta = self._rows_of_other(piece)
            pieces.append(importance(theta - base, self._column(piece, base)).cpu().numpy().reshape(-1))
        return np.concatenate(pieces)

    def _column(self, block: Block, like: "torch.Tensor") -> "torch.Tensor":
        import torch

        return torch.from_numpy(self._of_rows(block).copy()).to(like.device)[:, None]

    def _merge_fused(self, block: Block, out: Rows) -> None:
        base, theta = self._pair(block)
        threshold, lam = self._thresholds[block[0].name], self.scale_of(block[0])
        fused.fuse_block(base, theta, out, divergence=self._of_rows(block), threshold=threshold, lam=lam)

    def _taken(self, block: Block, delta: "torch.Tensor") -> "torch.Tensor":
        from ota_core.methods.edits import fuse

        return fuse(delta, self._column(block, delta), threshold=self._thresholds[block[0].name])


def _quartiles(total: int) -> tuple[int, int, int]:
    """Ranks, by falling size, of the values three quarters, half and one quarter of the way up, rounded down."""
    return total - 3 * (total - 1) // 4, total - (total - 1) // 2, total - (total - 1) // 4


class RamRule(EditsRule):
    """Reinforced Agent Merging, and its variant that scales up what one expert alone moved, by what its tensors share."""

    def __init__(self, plan: MergePlan, whole: WholeFacts | None = None) -> None:
        super().__init__(plan, whole)
        self._boosts: dict[str, list[float]] = {}

    def _prepare(self) -> None:
        """RAM+: how many of its edits each expert shares, in every tensor."""
        if self._plan.recipe.merge_method == "ram":
            return
        from ota_core.methods.edits import ram_boost

        setting = self._plan.recipe.setting
        counts: dict[str, NDArray[np.int64]] = {}
        cut = self._plan.blocks(self._plan.merged_jobs())
        found = self._plan.stream.map(self._count, cut, what="overlaps", size=block_elements, ahead=self.prefetch)
        for block, one in zip(cut, found, strict=True):
            counts[block[0].name] = counts.get(block[0].name, np.zeros_like(one)) + one
        for name, total in counts.items():
            self._boosts[name] = [
                ram_boost(int(shared), int(unique), r=setting("r"), alpha=setting("alpha")) for shared, unique in total
            ]

    def _count(self, block: Block) -> NDArray[np.int64]:
        least = self._plan.recipe.setting("epsilon")
        if self._can_fuse(block[0]):
            return fused.count_movers(*self._stored(block), least=least)
        counts = np.zeros((len(self._plan.experts), 2), np.int64)
        for piece in parts(block, self._plan.tensor_elements):
            moved = [delta.abs() > least for delta in self._deltas(piece)[1]]
            movers = sum(one.long() for one in moved)
            counts += [[int((one & (movers > 1)).sum()), int((one & (movers == 1)).sum())] for one in moved]
        return counts

    def _of(self, job: TensorJob) -> list[float]:
        return self._boosts.get(job.name) or [1.0] * len(self._plan.experts)

    def _merge_fused(self, block: Block, out: Rows) -> None:
        base, thetas = self._stored(block)
        least, lam = self._plan.recipe.setting("epsilon"), self.scale_of(block[0])
        fused.ram_block(base, thetas, out, least=least, boosts=self._of(block[0]), lam=lam)

    def _parts(self, block: Block, deltas: "list[torch.Tensor]") -> "Parts":
        from ota_core.methods.edits import ram

        return ram(deltas, least=self._plan.recipe.setting("epsilon"), boosts=self._of(block[0]))


class SceRule(EditsRule):
    """Select, Calculate, Erase: weights from the size of the selected edits, then an election of signs."""

    def __init__(self, plan: MergePlan, whole: WholeFacts | None = None) -> None:
        super().__init__(plan, whole)
        self._thresholds: dict[str, float] = {}
        self._shares: dict[str, list[float]] = {}

    def _prepare(self) -> None:
        """Of every tensor the least deviation that is selected, and the experts' weights."""
        plan, jobs = self._plan, self._plan.merged_jobs()
        share = plan.recipe.setting("density")
        if share < 1:
            groups = [Group(jobs=[job], experts=[0], ranks={}, share=share) for job in jobs]
            scoring = BlockScoring(plan, False, everywhere=True, scores_of=self._deviations, ahead=self.prefetch)
            for job, scores in zip(jobs, kth_largest(scoring, groups, what="deviations"), strict=True):
                self._thresholds[job.name] = scores[0][0] if scores[0] else math.inf
        cut = self._by_row(jobs)
        rows: dict[str, list[F64]] = {}
        found = plan.stream.map(self._squares, cut, what="weights", size=block_elements, ahead=self.prefetch)
        for block, one in zip(cut, found, strict=True):
            rows.setdefault(block[0].name, []).append(one)
        for name, of_rows in rows.items():
            sizes = [math.fsum(of_one) for of_one in np.concatenate(of_rows).T.tolist()]
            self._shares[name] = [size / (math.fsum(sizes) or 1.0) for size in sizes]

    def _deviations(self, block: Block) -> NDArray[np.float32]:
        if self._can_fuse(block[0]):
            return fused.deviations(*self._stored(block))
        from ota_core.methods.edits import deviation

        pieces = parts(block, self._plan.tensor_elements)
        return np.concatenate([deviation(self._deltas(piece)[1]).cpu().numpy().reshape(-1) for piece in pieces])

    def _squares(self, block: Block) -> F64:
        job, threshold = block[0], self._thresholds.get(block[0].name, 0.0)
        rows = 1 if is_vector(job) else block[2] - block[1]
        if self._can_fuse(job):
            return fused.squares(*self._stored(block), rows, threshold=threshold)
        import torch

        from ota_core.fused.products import products_of
        from ota_core.methods.edits import selected

        found = []
        for piece in [block] if is_vector(job) else parts(block, self._plan.tensor_elements):
            for kept in selected(self._deltas(piece)[1], threshold):
                single = kept.reshape(1, 1, -1) if is_vector(job) else kept[None]
                found.append(products_of(torch.Tensor.cpu(single).contiguous().numpy()))
        experts = len(self._plan.experts)
        return np.concatenate([np.concatenate(found[i : i + experts], axis=1) for i in range(0, len(found), experts)])

    def _merge_fused(self, block: Block, out: Rows) -> None:
        base, thetas = self._stored(block)
        name, lam = block[0].name, self.scale_of(block[0])
        fused.sce_block(base, thetas, out, threshold=self._thresholds.get(name, 0.0), weights=self._shares[name], lam=lam)

    def _parts(self, block: Block, deltas: "list[torch.Tensor]") -> "Parts":
        from ota_core.methods.edits import sce

        return sce(deltas, threshold=self._thresholds.get(block[0].name, 0.0), weights=self._shares[block[0].name])
