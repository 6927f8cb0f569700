"""The experts' parts of a merged edit as a stream over a model's tensors: what scales multiply, and what their gradient is made of.

Legend: M experts; a tensor is seen as the matrix (R, C) of ``blocks.matrix_shape``; E_m = λ·A_m, float32, expert m's part.
"""

from collections.abc import Iterable, Mapping, Sequence
from threading import Lock

import torch

from ota_core.compute.blocks import matrix_shape
from ota_core.plan.plan import MergePlan
from ota_core.plan.views import Block, TensorJob, block_elements, parts
from ota_core.rules.base import Rule
from ota_core.rules.rows import base_rows

BYTES = 4
"""Of an element of a part. They are rounded to float32 whether they are kept or computed again, so that memory changes no result."""


class Edits:
    """The parts of a plan's merged edit. ``rule`` is prepared. What fits ``memory`` (bytes) is kept; the rest is computed again each time."""

    def __init__(self, plan: MergePlan, rule: Rule, memory: int) -> None:
        self.experts = [expert.name for expert in plan.experts]
        self.jobs = {job.name: job for job in plan.canonical_jobs()}
        """The merged tensors, each parameter once."""
        self._plan, self._rule, self._room, self._lock = plan, rule, memory, Lock()
        self._kept: dict[tuple[str, int], torch.Tensor] = {}

    @property
    def kept_bytes(self) -> int:
        """Memory that kept parts take."""
        return sum(one.numel() * BYTES for one in self._kept.values())

    @property
    def bytes(self) -> int:
        """Memory that all parts would take."""
        return sum(job.elements for job in self.jobs.values()) * len(self.experts) * BYTES

    def write(self, scales: Mapping[str, Sequence[float]], targets: Mapping[str, torch.Tensor]) -> None:
        """Write θ₀ + Σ_m s_m·E_m into the targets, in their own types and on their devices.

        scales: tensor to s, M numbers. targets: tensor to what holds its merged weights, by the names and shapes of ``jobs``.
        """

        def work(block: Block) -> None:
            job, start, stop = block
            merged = self._base(block)
            for scale, part in zip(scales[job.name], self._parts(block), strict=True):
                merged.add_(part.to(merged.device), alpha=scale)
            with torch.no_grad():
                targets[job.name].view(matrix_shape(job.shape))[start:stop].copy_(merged)

        self._plan.stream.map(
            work, self._blocks(self.jobs.values()), what="scales", size=block_elements, ahead=self._rule.prefetch
        )

    def products(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """⟨∂L/∂θ, E_m⟩ of one tensor for every expert, float64 (M,). gradient: any floating type, the tensor's shape, any device."""
        job = self.jobs[name]
        rows, sums = gradient.view(matrix_shape(job.shape)), torch.zeros(len(self.experts), dtype=torch.float64)
        for block in self._blocks([job]):
            stacked = self._parts(block)
            part = rows[block[1] : block[2]].to(device=stacked.device, dtype=torch.float32).reshape(-1)
            sums += torch.mv(stacked.reshape(len(self.experts), -1), part).double().cpu()
        return sums

    def _blocks(self, jobs: Iterable[TensorJob]) -> list[Block]:
        whole, others = self._rule.blocks(list(jobs))
        return whole + others

    def _pieces(self, block: Block) -> list[Block]:
        """The block in parts that a rule works on at once."""
        return [block] if self._rule.is_whole(block[0]) else list(parts(block, self._plan.tensor_elements))

    def _base(self, block: Block) -> torch.Tensor:
        """θ₀, float32 (R, C), on the plan's device."""
        found = []
        for piece in self._pieces(block):
            base = base_rows(self._plan, piece)
            assert base is not None
            found.append(base.float())
        return torch.cat(found)

    def _parts(self, block: Block) -> torch.Tensor:
        """E of a block, float32 (M, R, C): on the CPU where it is kept, else on the plan's device."""
        key = (block[0].name, block[1])
        if key in self._kept:
            return self._kept[key]
        found = torch.cat([torch.stack([one.float() for one in self._rule.edits(piece)[1]]) for piece in self._pieces(block)], 1)
        with self._lock:
            if keep := self._room >= found.numel() * BYTES and key not in self._kept:
                self._room -= found.numel() * BYTES
        if keep:
            found = self._kept[key] = found.cpu()
        return found
