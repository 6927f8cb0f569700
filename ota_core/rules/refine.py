"""Row-space regression as a step after any method: each matrix of what was merged is fitted to the experts' row spaces.

A matrix is worked on whole: its regression needs the Gram of its inputs. What holds no matrix (vectors, embeddings) keeps what was merged.
"""

from collections.abc import Iterator
from threading import Lock
from typing import TYPE_CHECKING

from ota_core.errors import OtaError
from ota_core.files.rows import Rows
from ota_core.methods.numbers import significant
from ota_core.plan.matrices import Matrices, all_matrices, at_once, bytes_of
from ota_core.plan.plan import MergePlan
from ota_core.plan.views import Block, ExpertView, TensorJob, parts
from ota_core.rules.lambdas import Edit, Edits, task_vector

if TYPE_CHECKING:
    import torch


class Refine:
    """The regression of a plan's recipe."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan, self._lock = plan, Lock()
        self._matrices = {one.job.name: one for one in all_matrices(plan)}
        self._ridge: float = plan.recipe.setting("ridge")
        self._curvature: float = plan.recipe.setting("input_curvature") or 0.0
        self.residuals: dict[str, float] = {}
        """Tensor → the largest relative residual of its matrices."""

    def matrices(self, job: TensorJob) -> Matrices | None:
        """The matrices of a tensor that is refined."""
        return self._matrices.get(job.name)

    def blocks(self, job: TensorJob) -> list[Block]:
        """Every matrix of a tensor as a block; none where it is not refined."""
        found = self.matrices(job)
        return found.blocks() if found else []

    @property
    def at_once(self) -> int:
        """How many matrices fit the budget of memory at once."""
        return at_once(self._plan, list(self._matrices.values()))

    def check_memory(self) -> None:
        """Raises OtaError where one matrix alone does not fit the budget."""
        if self._plan.device != "cpu" or not self._matrices:
            return
        largest = max(self._matrices.values(), key=bytes_of)
        needed, given = bytes_of(largest), self._plan.stream.memory
        if needed > given:
            raise OtaError(
                f"refine: rowspace holds one matrix whole, and '{largest.job.name}' ({largest.outputs} x {largest.inputs}) takes {needed / 2**30:.1f} GiB; "
                f"memory is {given / 2**30:.1f} GiB. Give --memory {needed // 2**30 + 1}GiB, or merge on a GPU"
            )

    def merge(self, block: Block, edit: Edit, out: Rows) -> None:
        """Write one refined matrix. edit: what the method merged, less the base; out: (R, C) in the output's type."""
        import torch

        from ota_core.methods.row_space import regress
        from ota_core.rules.rows import base_rows

        matrices = self._matrices[block[0].name]

        def turned(rows: "torch.Tensor") -> "torch.Tensor":
            return rows.T if matrices.input_first else rows

        def deltas() -> "Iterator[tuple[torch.Tensor, float, torch.Tensor | None]]":
            for expert in self._plan.experts:
                diagonal = self._diagonal(expert, block, matrices.input_first) if self._curvature else None
                yield turned(self._held(block, task_vector(self._plan, expert))), self._weight(expert), diagonal

        found = regress(deltas(), turned(self._held(block, edit)), ridge=self._ridge)
        merged, target = turned(found.edit), out.tensor()
        for part in self._parts(block):
            rows = slice(part[1] - block[1], part[2] - block[1])
            base = base_rows(self._plan, part)
            assert base is not None
            target[rows].copy_((base + merged[rows]).to(target.dtype), non_blocking=merged.is_cuda)
        if not torch.isfinite(found.edit).all():
            raise OtaError(
                f"{block[0].name}: the row-space regression is not finite; is there a NaN in a model? `ota inspect` tells"
            )
        with self._lock:
            self.residuals[block[0].name] = max(self.residuals.get(block[0].name, 0.0), significant(found.residual, 2))

    def edits(self, block: Block, edits: Edits) -> "tuple[torch.Tensor, list[torch.Tensor]]":
        """(θ₀, each expert's part of the refined edit) of one matrix, float64 (R, C). edits: the same of a part, of what the method merged."""
        import torch

        from ota_core.methods.row_space import regress_parts

        matrices, found = self._matrices[block[0].name], [edits(part) for part in parts(block, self._plan.tensor_elements)]
        base = torch.cat([rows for rows, _ in found])
        priors = [torch.cat(of_one).float() for of_one in zip(*(rows for _, rows in found), strict=True)]
        del found

        def turned(rows: "torch.Tensor") -> "torch.Tensor":
            return rows.T if matrices.input_first else rows

        deltas = []
        for expert in self._plan.experts:
            diagonal = self._diagonal(expert, block, matrices.input_first) if self._curvature else None
            deltas.append((turned(self._held(block, task_vector(self._plan, expert))), self._weight(expert), diagonal))
        solved = regress_parts(deltas, [turned(prior) for prior in priors], ridge=self._ridge)
        return base, [turned(one).double() for one in solved]

    def _weight(self, expert: ExpertView) -> float:
        method = self._plan.recipe.merge_method
        return float(self._plan.recipe.setting("weight", expert.index)) if method == "rowspace" else 1.0

    def _parts(self, block: Block) -> Iterator[Block]:
        return parts(block, self._plan.stream.block_elements)

    def _held(self, block: Block, read: Edit) -> "torch.Tensor":
        """A matrix as it is stored, float32 (R, C)."""
        import torch

        return torch.cat([read(part).float() for part in self._parts(block)])

    def _diagonal(self, expert: ExpertView, block: Block, input_first: bool) -> "torch.Tensor | None":
        """α·Σ_rows v / Σ v, float32 (in,): the second moments of the inputs, up to their scale. None without curvature."""
        job = block[0]
        if not expert.has_curvature(job.canonical):
            return None
        sums = [expert.v_hat(job.canonical, *part[1:]).double() for part in self._parts(block)]
        import torch

        v_hat = torch.cat(sums)
        columns = v_hat.sum(1 if input_first else 0)
        total = float(columns.sum())
        return (self._curvature / total * columns).float() if total > 0 else None
