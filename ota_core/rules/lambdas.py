"""λ from the row spaces of the task vectors: ``lambda: auto`` and ``auto_per_tensor`` (docs/methods.md section 8).

λ_n of a matrix is the scale at which its merged edit, λ·D, does best what each expert's own edit does to the inputs that this expert saw:
the least-squares solution of Σ_k ‖(λD − δ_k) δ_kᵀ‖² / ‖δ_k‖². λ of a merge is the plain mean over its matrices.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from ota_core.errors import RecipeError
from ota_core.methods.numbers import significant
from ota_core.plan.matrices import Matrices, all_matrices
from ota_core.plan.plan import MergePlan
from ota_core.plan.scoring import delta
from ota_core.plan.views import Block, ExpertView, TensorJob, parts

if TYPE_CHECKING:
    import torch

EXACT = 256
"""Matrices with at most this many outputs are computed exactly, larger ones with probes."""
PROBES = 64
ROWS, GROUP = 256, 1 << 15
"""About so many rows of a larger matrix are compared, in groups of neighbours of about so many elements, at even distances."""
SKETCHED = 1024
"""About so many rows, chosen likewise, go into the products with the probes."""
PART = 1 << 18
"""Elements that are worked on at once. Fixed, and small: no budget of memory changes the cut, and so not a bit."""
DIGITS = 6
"""Significant digits of λ: sums of products may end differently in the last bits on other processors, what is written does not."""

Edit = Callable[[Block], "torch.Tensor"]
"""The merged edit D of a block at λ = 1, float64 (r, C)."""
Edits = Callable[[Block], "tuple[torch.Tensor, list[torch.Tensor]]"]
"""The base of a block and every expert's part of the merged edit, float64 (r, C)."""


@dataclass(frozen=True)
class Scales:
    """λ of a merge."""

    all: float
    """The plain mean over the matrices."""
    tensors: Mapping[str, float]
    """Tensor → the mean of λ over its matrices; those that hold none, or that nobody moved, are absent."""

    def of(self, job: TensorJob, per_tensor: bool) -> float:
        """λ of a tensor. A tied one has that of its parameter."""
        return self.tensors.get(job.canonical, self.all) if per_tensor else self.all


def matrix_scales(plan: MergePlan, edit: Edit) -> dict[str, list[float]]:
    """Tensor → λ of each of its matrices that somebody moved, of the tensors that are worked on here."""
    import torch  # noqa: F401 - here rather than in the first block, whose thread would compute with threads of torch's own

    found = all_matrices(plan)
    single = [(matrices, index) for matrices in found for index in range(matrices.count)]
    # The largest first: one that comes last would keep one thread busy while the others wait.
    single.sort(key=lambda one: -one[0].rows * one[0].columns)

    def work(one: tuple[Matrices, int]) -> float | None:
        return _scale(plan, edit, *one)

    scales = plan.stream.map(work, single, what="scales", size=lambda one: one[0].rows * one[0].columns)
    by_place = {(matrices.job.name, index): scale for (matrices, index), scale in zip(single, scales, strict=True)}
    return {
        matrices.job.name: values
        for matrices in found
        if (values := [s for i in range(matrices.count) if (s := by_place[matrices.job.name, i]) is not None])
    }


def scales_of(matrices: Mapping[str, list[float]]) -> Scales:
    """λ from that of all matrices of a merge. Raises RecipeError where no expert moved a matrix."""
    if not matrices:
        raise RecipeError(
            "parameters.lambda: auto reads λ from the matrices that the experts moved, and none of them moved any; give a number"
        )
    tensors = {name: fmean(values) for name, values in matrices.items()}
    mean = math.fsum(value for values in matrices.values() for value in values) / sum(map(len, matrices.values()))
    return Scales(significant(mean, DIGITS), {name: significant(value, DIGITS) for name, value in tensors.items()})


def _scale(plan: MergePlan, edit: Edit, matrices: Matrices, index: int) -> float | None:
    """λ of one matrix; None where nobody moved it, or what is merged of it is nothing."""
    exact = matrices.outputs <= EXACT
    sums = _whole(plan, edit, matrices, index, exact) if exact or matrices.input_first else _sampled(plan, edit, matrices, index)
    numerator, denominator = map(math.fsum, zip(*sums, strict=True)) if sums else (0.0, 0.0)
    return numerator / denominator if denominator > 0 else None


def _whole(plan: MergePlan, edit: Edit, matrices: Matrices, index: int, exact: bool) -> list[tuple[float, float]]:
    """Numerators and denominators by expert, of a matrix that is held whole."""
    import torch

    from ota_core.methods.row_space import scale_sums

    def read(rows_of: Edit) -> "torch.Tensor":
        rows = torch.cat([rows_of(part) for part in parts(matrices.block(index), PART)])
        return rows.T if matrices.input_first else rows

    merged, found = read(edit), []
    for expert in plan.experts:
        own = read(task_vector(plan, expert))
        size = float(own.pow(2).sum())
        if size > 0:
            directions = own.T if exact else own.T @ _probes(0, own.shape[0], own)
            numerator, denominator = scale_sums(merged, own, directions)
            found.append((numerator / size, denominator / size))
    return found


def task_vector(plan: MergePlan, expert: ExpertView) -> Edit:
    """An expert's own edit δ, block by block."""
    return lambda block: delta(plan, expert, *block)


def _sampled(plan: MergePlan, edit: Edit, matrices: Matrices, index: int) -> list[tuple[float, float]]:
    """The same by probes and of evenly spaced rows, of a matrix that is read twice and never held."""
    from ota_core.methods.row_space import scale_sums

    block = matrices.block(index)
    sketches = [(expert, *_sketch(plan, expert, block)) for expert in plan.experts]
    moved = [one for one in sketches if one[2] > 0]
    sums: list[tuple[list[float], list[float]]] = [([], []) for _ in moved]
    for part in row_groups(block):
        merged = edit(part)
        for (expert, directions, size), (numerators, denominators) in zip(moved, sums, strict=True):
            numerator, denominator = scale_sums(merged, delta(plan, expert, *part), directions)
            numerators.append(numerator / size)
            denominators.append(denominator / size)
    return [(math.fsum(numerators), math.fsum(denominators)) for numerators, denominators in sums]


def row_groups(block: Block, rows: int = ROWS) -> Iterator[Block]:
    """Groups of neighbouring rows at even distances, about so many rows in all; every row where there are not many more."""
    job, start, stop = block
    size = min(rows // 4, max(4, GROUP * job.rows // job.elements))
    for first in range(start, stop, max(size, (stop - start) * size // rows)):
        yield from parts((job, first, min(first + size, stop)), PART)


def directions_of(plan: MergePlan, expert: ExpertView, matrices: Matrices, index: int) -> "tuple[torch.Tensor, float]":
    """(the directions that an expert's matrix is compared on, float64 (in, P), and ‖δ‖²): δᵀ where it has few outputs, else δᵀ z of the probes."""
    import torch

    block, exact = matrices.block(index), matrices.outputs <= EXACT
    if not exact and not matrices.input_first:
        return _sketch(plan, expert, block)
    rows = torch.cat([delta(plan, expert, *part) for part in parts(block, PART)])
    size = float(rows.pow(2).sum())
    if exact:
        return rows if matrices.input_first else rows.T, size
    return rows @ _probes(0, matrices.outputs, rows), size


def _sketch(plan: MergePlan, expert: ExpertView, block: Block) -> "tuple[torch.Tensor, float]":
    """(δᵀ Z, float64 (in, P), and ‖δ‖²) of one expert's matrix, over an even sample of its rows where it has many.

    The sample is the same for every expert, and its share of the rows cancels in λ.
    """
    import torch

    sample = row_groups(block, SKETCHED)
    if not plan.can_fuse([expert], block[0]):
        products, sizes = zip(*(_sketch_part(delta(plan, expert, *part), part[1] - block[1]) for part in sample), strict=True)
        return torch.stack(products).sum(0), math.fsum(sizes)
    from ota_core.fused.sketch import add_rows

    assert plan.base is not None
    sums, squares = np.zeros((PROBES, block[0].elements // block[0].rows)), np.zeros(1)
    for part in sample:
        base, theta = plan.base.stored(block[0].name, *part[1:]), expert.stored(block[0].name, *part[1:])
        add_rows(base, theta, part[1] - block[1], sums, squares)
    return torch.from_numpy(sums).T, float(squares[0])


def _sketch_part(rows: "torch.Tensor", first: int) -> "tuple[torch.Tensor, float]":
    """What some rows add, on tensors: for a type that no loop loads, a GPU."""
    return rows.T @ _probes(first, rows.shape[0], rows), float(rows.pow(2).sum())


def _probes(first: int, count: int, like: "torch.Tensor") -> "torch.Tensor":
    """Rows first … first + count − 1 of the probes Z that ``fused.sketch`` has, float64 (count, P)."""
    import torch

    from ota_core.fused.sketch import signs

    probes, rows = torch.zeros(count, PROBES, dtype=torch.float64), torch.arange(count)
    probes[rows, (first + rows) % PROBES] = torch.from_numpy(signs(first, count))
    return probes.to(like.device)
