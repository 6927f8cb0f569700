"""How alike the curvature of two experts is, by layer × role: cosine of √v, rank correlation, overlap of their largest v (docs/methods.md section 6)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray

from ota_core.analysis.agreement import kth_scores, midranks, rank_rows
from ota_core.analysis.kernels import count_common
from ota_core.analysis.pieces import by_place, groups_of, named_pairs, pieces, stacked
from ota_core.analysis.subject import Subject
from ota_core.analysis.table import Row, row
from ota_core.compute.exact import PairDots
from ota_core.compute.kernels import count_high, count_low, sqrt
from ota_core.methods.numbers import BINS, kept_count, locate
from ota_core.methods.saliency import keep
from ota_core.plan.roles import WHOLE, Place
from ota_core.plan.views import Block, ExpertView, TensorJob, block_elements


@dataclass
class _Whole:
    """What is known of v over all tensors together: of each expert the counts by the upper 16 bits, int64 (M, 65536)."""

    high: NDArray[np.int64]
    roots: PairDots
    """Of √v̂."""
    ranks: PairDots


def curvature_overlap(subject: Subject) -> Iterator[Row]:
    """Rows of ``curvature_overlap`` for every pair of experts, by cell and over all.

    v is the uncompressed v̂ where that is at hand. Ranks (Spearman's ρ) are told apart by the upper 16 bits of the float32, 1/128 of an
    octave, ties at their mean rank. ``jaccard``: of the ρ·N largest positive v of each expert, exactly, ranked over the whole model, with
    ρ the subject's ``common_density``, which the rows tell. Only tensors of which all experts have second moments are compared.
    """
    experts = subject.curved
    if len(experts) < 2:
        return
    jobs = [job for job in subject.jobs if all(expert.has_curvature(job.canonical) for expert in experts)]
    missing = sum(job.elements for job in subject.jobs) - sum(job.elements for job in jobs)
    if missing:
        subject.left_out.append(f"curvature overlap: {missing:,} elements of tensors of which some expert has no second moments")
    if not jobs:
        return
    density = subject.common_density
    if len({subject.density_of(expert) for expert in experts}) > 1:
        own = ", ".join(f"{expert.name} {subject.density_of(expert):.4g}" for expert in experts)
        subject.notes.append(f"the overlap of the largest v is that at density {density:.4g}, the mean of the experts' ({own})")
    cells = by_place(subject, jobs)
    whole = _Whole(np.zeros((len(experts), BINS), np.int64), PairDots(len(experts)), PairDots(len(experts)))
    names = [expert.name for expert in experts]
    size = 8 * BINS * len(experts)
    for group in groups_of(list(cells), lambda _: size, subject.plan.stream.memory // 8):
        yield from _by_cell(subject, experts, {place: cells[place] for place in group}, names, whole)
    k = kept_count(density, sum(job.elements for job in jobs))
    taus = _largest_and_ranks(subject, experts, jobs, whole, k)
    yield from _measures(names, WHOLE, whole.roots, whole.ranks, sum(job.elements for job in jobs))
    common = _common(subject, experts, jobs, taus)
    for place, counts in {**common, WHOLE: np.sum(list(common.values()), axis=0)}.items():
        elements = sum(job.elements for job in (jobs if place == WHOLE else cells[place]))
        for a, b, one, other in named_pairs(names):
            either = int(counts[a, a] + counts[b, b] - counts[a, b])
            jaccard = counts[a, b] / either if either else math.nan
            yield row("curvature_overlap", one, place, "jaccard", jaccard, elements, other=other, at=density)


def _v(subject: Subject, expert: ExpertView, block: Block) -> torch.Tensor:
    """v̂ of a block, float32 (r, C). Never −0, whose bits order wrongly."""
    return expert.v_hat(block[0].canonical, *block[1:], full=subject.full(expert)).abs()


def _map(subject: Subject, experts: Sequence[ExpertView], work: Callable[[Block], None], jobs: Sequence[TensorJob]) -> None:
    def ahead(block: Block) -> None:
        for expert in experts:
            expert.prefetch_curvature(*block, full=subject.full(expert))

    subject.plan.stream.map(work, subject.plan.blocks(jobs), what="curvature overlap", size=block_elements, ahead=ahead)


def _by_cell(
    subject: Subject, experts: Sequence[ExpertView], cells: dict[Place, list[TensorJob]], names: Sequence[str], whole: _Whole
) -> Iterator[Row]:
    """Cosine and rank correlation in each of these cells, in two passes over them; the counts of all add to the whole's."""
    high = {place: np.zeros((len(experts), BINS), np.int64) for place in cells}
    jobs, lock = [job for members in cells.values() for job in members], Lock()

    def count(block: Block) -> None:
        local = np.zeros((len(experts), BINS), np.int64)
        for piece in pieces(subject, block):
            for i, expert in enumerate(experts):
                count_high(_v(subject, expert, piece), local[i])
        with lock:
            high[subject.places[block[0].name]] += local

    _map(subject, experts, count, jobs)
    ranks_of = {place: [midranks(one) for one in counts] for place, counts in high.items()}
    roots, ranks = ({place: PairDots(len(experts)) for place in cells} for _ in range(2))

    def add(block: Block) -> None:
        place = subject.places[block[0].name]
        of_roots, of_ranks = PairDots(len(experts)), PairDots(len(experts))
        for piece in pieces(subject, block):
            v = [_v(subject, expert, piece) for expert in experts]
            of_roots.add_rows(stacked([sqrt(one.double()) for one in v]))
            of_ranks.add_rows(np.stack([rank_rows(rank, one) for rank, one in zip(ranks_of[place], v, strict=True)]))
        roots[place].add(of_roots)
        ranks[place].add(of_ranks)

    _map(subject, experts, add, jobs)
    for place, members in cells.items():
        whole.high += high[place]
        whole.roots.add(roots[place])
        yield from _measures(names, place, roots[place], ranks[place], sum(job.elements for job in members))


def _measures(names: Sequence[str], place: Place, roots: PairDots, ranks: PairDots, elements: int) -> Iterator[Row]:
    for a, b, one, other in named_pairs(names):
        yield row("curvature_overlap", one, place, "cosine_sqrt_v", roots.cosine(a, b), elements, other=other)
        # Centred ranks: their cosine is the rank correlation.
        yield row("curvature_overlap", one, place, "spearman", ranks.cosine(a, b), elements, other=other)


def _largest_and_ranks(
    subject: Subject, experts: Sequence[ExpertView], jobs: Sequence[TensorJob], whole: _Whole, k: int
) -> list[float]:
    """One pass over all: the products of ranks over the whole model, and the k-th largest v of each expert."""
    found = [locate(counts, k) if k else (0, 0) for counts in whole.high]
    ranks_of = [midranks(counts) for counts in whole.high]
    low, lock = np.zeros_like(whole.high), Lock()

    def work(block: Block) -> None:
        local, of_ranks = np.zeros_like(low), PairDots(len(experts))
        for piece in pieces(subject, block):
            v = [_v(subject, expert, piece) for expert in experts]
            of_ranks.add_rows(np.stack([rank_rows(rank, one) for rank, one in zip(ranks_of, v, strict=True)]))
            for i, one in enumerate(v):
                count_low(one, found[i][0], local[i])
        whole.ranks.add(of_ranks)
        with lock:
            np.add(low, local, out=low)

    _map(subject, experts, work, jobs)
    return kth_scores(found, low, k)


def _common(
    subject: Subject, experts: Sequence[ExpertView], jobs: Sequence[TensorJob], taus: Sequence[float]
) -> dict[Place, np.ndarray]:
    """Cell → elements that two experts' masks of v keep both, int64 (M, M), on the diagonal those that one keeps."""
    common = {subject.places[job.name]: np.zeros((len(experts), len(experts)), np.int64) for job in jobs}
    lock = Lock()

    def work(block: Block) -> None:
        local = np.zeros((len(experts), len(experts)), np.int64)
        for piece in pieces(subject, block):
            kept = [keep(_v(subject, expert, piece), tau).reshape(-1) for expert, tau in zip(experts, taus, strict=True)]
            count_common(torch.stack(kept).numpy(), local)
        with lock:
            common[subject.places[block[0].name]] += local

    _map(subject, experts, work, jobs)
    return common
