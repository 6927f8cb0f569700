"""della and della_linear, bound to a plan: task vectors of which each row keeps its larger edits with a higher chance."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ota_core.files.rows import Rows
from ota_core.fused.della import DellaPart, della_block, ranks_of_row
from ota_core.methods.numbers import NOTHING
from ota_core.plan.plan import MergePlan
from ota_core.plan.prepare import WholeFacts
from ota_core.plan.views import Block, ExpertView, TensorJob
from ota_core.plan.whole import is_vector
from ota_core.rules.task_vectors import TaskVectorRule

if TYPE_CHECKING:
    import torch


class DellaRule(TaskVectorRule):
    """TIES, or with della_linear task arithmetic, of what is kept of the task vectors."""

    def __init__(self, plan: MergePlan, whole: WholeFacts | None = None) -> None:
        super().__init__(plan, whole)
        self._elects = self._method == "della"
        self._vectors: dict[str, NDArray[np.int32]] = {}

    def _prepare(self) -> None:
        """The ranks of all edits of every vector: it is one row, and may be cut into blocks."""
        jobs = [job for job in self._plan.merged_jobs() if is_vector(job)]
        found = self._plan.stream.map(self._ranks_of, jobs, what="ranks")
        self._vectors = {job.name: ranks for job, ranks in zip(jobs, found, strict=True)}

    def _ranks_of(self, job: TensorJob) -> NDArray[np.int32]:
        """int32 (M, n)"""
        if self._can_fuse(job):
            assert self._plan.base is not None
            base = self._plan.base.stored(job.name, 0, job.rows)
            return np.stack([ranks_of_row(base, expert.stored(job.name, 0, job.rows)) for expert in self._plan.experts])
        from ota_core.plan.scoring import delta

        sizes = [delta(self._plan, expert, job, 0, job.rows).float().abs().cpu().numpy() for expert in self._plan.experts]
        ranks = np.empty((len(sizes), job.elements), np.int32)
        for row, size in zip(ranks, sizes, strict=True):
            row[size.reshape(-1).argsort(kind="stable")] = np.arange(job.elements)
        return ranks

    def _merge_fused(self, block: Block, out: Rows) -> None:
        assert self._plan.base is not None
        job, start, _ = block
        setting = self._plan.recipe.setting
        first = start * (job.elements // job.rows)
        shares = [
            DellaPart(
                theta=expert.stored(job.name, *block[1:]),
                weight=self._weights[expert.index],
                random=(setting("seed"), expert.index, job.canonical, first),
                density=setting("density", expert.index),
                epsilon=setting("epsilon", expert.index),
            )
            for expert in self._plan.experts
        ]
        della_block(
            self._plan.base.stored(job.name, *block[1:]),
            shares,
            out,
            columns=out.held.shape[1],
            ranks=self._vectors.get(job.name),
            elect=self._elects,
            normalize=setting("normalize"),
            rescale=setting("rescale"),
            lam=self.scale_of(job),
            nothing=NOTHING,
        )

    def _left(self, expert: ExpertView, block: Block, difference: "torch.Tensor") -> "torch.Tensor":
        import torch

        from ota_core.methods.dare import uniform
        from ota_core.methods.della import chances, keep_by_chance

        setting, (job, start, stop) = self._plan.recipe.setting, block
        density, epsilon = setting("density", expert.index), setting("epsilon", expert.index)
        if density >= 1:
            return difference
        rows, cols = difference.shape
        random = uniform(setting("seed"), expert.index, job.canonical, start * cols, rows * cols, self._plan.device).view(
            rows, cols
        )
        if job.name in self._vectors and job.elements > 1:
            ranks = torch.from_numpy(self._vectors[job.name][self._plan.experts.index(expert)][start:stop].astype(np.float64))
            chance = (density - epsilon) + ranks.to(difference.device)[:, None] * (2.0 * epsilon / (job.elements - 1))
        else:
            chance = chances(difference, density=density, epsilon=epsilon)
        return keep_by_chance(difference, random, chance, rescale=setting("rescale"))
