"""Where masks keep elements: density by layer × role, sparsity of rows and columns; FFG beside magnitude (docs/methods.md section 6).

Rows and columns are those of the stored matrix: for a Linear layer a row is an output and a column an input, for an embedding a row is a
token. GPT-2 stores its projections the other way round. Vectors have neither. Of a stack of matrices each counts by itself.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from ota_core.analysis.kernels import count_mask
from ota_core.analysis.pieces import groups_of
from ota_core.analysis.subject import Subject
from ota_core.analysis.table import BINS, Row, row
from ota_core.methods.numbers import kept_count
from ota_core.moments.compression.cuts import matrices
from ota_core.plan.plan import MergePlan
from ota_core.plan.prepare import block_mask
from ota_core.plan.roles import WHOLE, Place, moe_expert, totals
from ota_core.plan.scoring import Scoring
from ota_core.plan.tally import thresholds_of
from ota_core.plan.views import Block, ExpertView, TensorJob, block_elements

MaskOf = Callable[[ExpertView, Block], NDArray[np.bool_]]
"""The mask of a block: bool, r·C elements."""
Key = tuple[int, str]
"""Expert, tensor."""


@dataclass(kw_only=True)
class Shape:
    """What a mask looks like in one tensor or in several together."""

    kept: int = 0
    elements: int = 0
    rows: int = 0
    empty_rows: int = 0
    row_bins: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    columns: int = 0
    empty_columns: int = 0
    column_bins: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))

    matrices: tuple[int, ...] = ()
    """Of one tensor that stacks matrices: elements kept of each. Sums over tensors leave it out."""

    def __iadd__(self, other: "Shape") -> "Shape":
        for name in self.__dataclass_fields__.keys() - {"matrices"}:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


class _Counting:
    """Rows and columns of one tensor's mask, as blocks bring them."""

    def __init__(self, job: TensorJob) -> None:
        self.shape = Shape(elements=job.elements)
        self._stack, self._height, self._width = matrices(job.shape) if len(job.shape) > 1 else (0, 0, 0)
        self._columns = np.zeros((self._stack, self._width), np.int32)
        self.matrices = np.zeros(self._stack, np.int64)
        """Elements kept of each matrix of the stack."""
        self._lock = Lock()

    def add(self, first: int, mask: NDArray[np.bool_]) -> None:
        """Rows from ``first`` on. mask: bool, r·C elements."""
        if self._stack == 0 or self._width == 0:
            with self._lock:
                self.shape.kept += int(mask.sum())
            return
        bins, empty, columns = np.zeros(BINS, np.int64), np.zeros(1, np.int64), np.zeros_like(self._columns)
        kept = mask.reshape(-1, self._width)
        total = count_mask(kept, first, self._height, bins, empty, columns)
        matrices = np.bincount((first + np.arange(len(kept))) // self._height, kept.sum(1), minlength=self._stack).astype(
            np.int64
        )
        with self._lock:
            self.shape.kept += int(total)
            self.shape.rows += len(kept)
            self.shape.empty_rows += int(empty[0])
            self.shape.row_bins += bins
            self._columns += columns
            self.matrices += matrices

    def done(self) -> Shape:
        """The counts of all rows; those of the columns are let go."""
        if self._columns.size:
            counts = self._columns.reshape(-1).astype(np.int64)
            self.shape.columns, self.shape.empty_columns = counts.size, int((counts == 0).sum())
            self.shape.column_bins = np.bincount(np.minimum(BINS - 1, BINS * counts // self._height), minlength=BINS)
        self._columns = np.zeros((0, 0), np.int32)
        self.shape.matrices = tuple(self.matrices.tolist()) if self._stack > 1 else ()
        return self.shape


def localisation(subject: Subject) -> Iterator[Row]:
    """Rows of ``localisation`` and ``sparsity``, variants ``curvature`` and ``magnitude``, for every expert."""
    plan = subject.plan
    if plan.base is None:
        return
    own = plan.recipe.setting("metric")
    found: dict[str, dict[Key, Shape]] = {own: _shapes(subject, _jobs_of(subject), _merge_mask(subject), f"masks {own}")}
    subject.realised |= _realised(found[own])
    other = "magnitude" if own == "curvature" else "curvature"
    kept = {key: shape.kept for key, shape in found[own].items()}
    scoring = Scoring(plan, other == "curvature", full=plan.recipe.setting("mask_curvature") == "full")
    found[other] = _shapes(subject, _jobs_of(subject), _by_rank(plan, scoring, kept, other), f"masks {other}")
    found["magnitude"] |= _without_curvature(subject)
    for variant in ("curvature", "magnitude"):
        yield from _rows(subject, variant, found[variant])


def _realised(shapes: Mapping[Key, Shape]) -> dict[int, float]:
    """Expert → the share that its mask keeps of all elements that carry curvature."""
    whole: dict[int, Shape] = defaultdict(Shape)
    for (expert, _), shape in shapes.items():
        whole[expert].kept += shape.kept
        whole[expert].elements += shape.elements
    return {expert: shape.kept / max(1, shape.elements) for expert, shape in whole.items()}


def _jobs_of(subject: Subject) -> dict[int, list[TensorJob]]:
    """Expert → the tensors that a merge masks: those that carry curvature."""
    return {expert.index: subject.plan.curved(expert) for expert in subject.curved}


def _merge_mask(subject: Subject) -> MaskOf:
    """The mask that the merge uses: of an earlier stage where there is one."""

    def mask(expert: ExpertView, block: Block) -> NDArray[np.bool_]:
        if expert.masks is not None:
            return expert.masks.read(block[0].canonical, *block[1:])
        return block_mask(subject.plan, subject.facts, expert, block)[0]

    return mask


def _by_rank(plan: MergePlan, scoring: Scoring, kept: Mapping[Key, int], what: str) -> MaskOf:
    """Masks by other scores that keep as many elements of each expert, or with the recipe's scope of each tensor.

    As in every FFG mask, all elements that equal the last one kept are kept, too.
    """
    experts = sorted({expert for expert, _ in kept})
    jobs = [job for job in plan.canonical_jobs() if any((expert, job.name) in kept for expert in experts)]
    single = plan.recipe.setting("scope") == "global"
    members = [
        (together, {e: sum(kept.get((e, job.name), 0) for job in together) for e in experts})
        for together in ([jobs] if single else [[job] for job in jobs])
    ]
    return _by_scores(scoring, thresholds_of(scoring, members, what=f"thresholds {what}"))


def _by_scores(scoring: Scoring, taus: Mapping[Key, float]) -> MaskOf:
    return lambda expert, block: scoring.keep(expert, block, taus[expert.index, block[0].name])[0]


def _without_curvature(subject: Subject) -> dict[Key, Shape]:
    """Masks by magnitude of the experts without second moments, over all of their tensors, each at its own density."""
    plan, bare = subject.plan, [e for e in subject.plan.experts if e.moments is None]
    if not bare:
        return {}
    total = sum(job.elements for job in subject.jobs)
    counts = {e.index: kept_count(subject.density_of(e), total) for e in bare}
    scoring = Scoring(plan, curvature=False, everywhere=True)
    taus = thresholds_of(scoring, [(subject.jobs, counts)], what="thresholds magnitude")
    return _shapes(subject, {e.index: subject.jobs for e in bare}, _by_scores(scoring, taus), "masks magnitude")


def _shapes(subject: Subject, jobs_of: Mapping[int, Sequence[TensorJob]], mask_of: MaskOf, what: str) -> dict[Key, Shape]:
    """Each expert's mask in each of its tensors, counted; the base's rows are read once for all experts."""
    plan, names = subject.plan, {(expert, job.name) for expert, jobs in jobs_of.items() for job in jobs}
    found: dict[Key, Shape] = {}

    def columns_bytes(job: TensorJob) -> int:
        return 4 * len(jobs_of) * math.prod(job.shape) // max(1, job.shape[-2]) if len(job.shape) > 1 else 0

    for jobs in groups_of(subject.jobs, columns_bytes, plan.stream.memory // 8):
        counting = {(e, job.name): _Counting(job) for job in jobs for e in jobs_of if (e, job.name) in names}

        def work(block: Block, counting: Mapping[Key, _Counting] = counting) -> None:
            for index in jobs_of:
                if (index, block[0].name) in counting:
                    counting[index, block[0].name].add(block[1], mask_of(plan.expert(index), block))

        plan.stream.map(
            work, plan.blocks(jobs), what=what, size=block_elements, ahead=lambda b: plan.prefetch(b, curvature=False)
        )
        found |= {key: one.done() for key, one in counting.items()}
    return found


def _rows(subject: Subject, variant: str, shapes: Mapping[Key, Shape]) -> Iterator[Row]:
    for expert in subject.plan.experts:
        places: dict[Place, Shape] = defaultdict(Shape)
        for job in subject.jobs:
            if (shape := shapes.get((expert.index, job.name))) is not None:
                for place in totals(subject.places[job.name]):
                    places[place] += shape
        for place, shape in places.items():
            yield row(
                "localisation",
                expert.name,
                place,
                "density",
                shape.kept / max(1, shape.elements),
                shape.elements,
                variant=variant,
            )
        yield from _mixture(subject, expert, variant, shapes)
        for place, shape in places.items():
            if shape.rows and (place == WHOLE or place in subject.places.values()):
                yield from _sparsity(expert.name, variant, place, shape)


def _mixture(subject: Subject, expert: ExpertView, variant: str, shapes: Mapping[Key, Shape]) -> Iterator[Row]:
    """What the mask keeps of each expert of a mixture of experts, whether a tensor holds one of them or all."""
    kept: dict[tuple[Place, int], int] = defaultdict(int)
    elements: dict[tuple[Place, int], int] = defaultdict(int)
    for job in subject.jobs:
        number, shape = moe_expert(job.name), shapes.get((expert.index, job.name))
        if number is None or shape is None:
            continue
        stack = shape.matrices if number < 0 else (shape.kept,)
        for i, count in enumerate(stack):
            for place in totals(subject.places[job.name]):
                kept[place, max(number, 0) + i] += count
                elements[place, max(number, 0) + i] += shape.elements // len(stack)
    for (place, number), total in elements.items():
        yield row("moe", expert.name, place, "density", kept[place, number] / max(1, total), total, variant=variant, at=number)


def _sparsity(expert: str, variant: str, place: Place, shape: Shape) -> Iterator[Row]:
    for measure, bins, empty, count in (
        ("rows", shape.row_bins, shape.empty_rows, shape.rows),
        ("columns", shape.column_bins, shape.empty_columns, shape.columns),
    ):
        for i, number in enumerate(bins.tolist()):
            yield row("sparsity", expert, place, measure, number, count, variant=variant, at=i / BINS)
        yield row("sparsity", expert, place, f"empty_{measure}", empty / max(1, count), count, variant=variant)
