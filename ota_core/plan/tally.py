"""The k-th largest scores of whole experts or of single tensors, exactly.

Non-negative floats order as their bit patterns. A histogram of the upper 16 bits tells in which of 65,536 bins the k-th largest score
lies; counting what lies above that bin, and every bit pattern inside it, tells the score. Of many scores, a sample tells a bracket of
bins beforehand, so that one pass over all is enough; where the sample was wrong, the two passes follow. Counts are integers: their sums
depend on no order, no cut into blocks and no layout of threads or machines.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute import loops
from ota_core.fused import counts as fused
from ota_core.fused.sources import TILE
from ota_core.methods.numbers import BINS, locate, score_of
from ota_core.plan.scoring import Scoring
from ota_core.plan.views import Block, TensorJob, block_elements

if TYPE_CHECKING:
    import torch

Counts = NDArray[np.int64]
SAMPLE_PIECE, SAMPLE_PIECES, SAMPLE_STRIDE = 256, 20_000, 32_768
"""Elements sampled in a row (neighbours have much in common), about how many such pieces are wanted, and their least distance."""
MARGIN = 0.02
"""Share of the ranks on either side of the sampled one whose bins are opened: 0.4 % is the standard error of 20,000 pieces that
have nothing in common, and pieces at even distances do better."""
MAX_BINS = 32
WORTH_SAMPLING = 1 << 26
BIN = 1 << 16
"""Bit patterns of a bin."""


@dataclass
class Brackets:
    """What lies above and inside brackets of scores, one for each expert and rank. M experts, R ranks, W bit patterns."""

    bins: NDArray[np.int64]
    """First bin of each bracket, int64 (M, R); −1 for none."""
    above: Counts
    """int64 (M, R)"""
    inside: Counts
    """int64 (M, R, W)"""

    @classmethod
    def empty(cls, bins: NDArray[np.int64], width: int = 1) -> "Brackets":
        """Brackets of ``width`` bins."""
        return cls(bins, np.zeros(bins.shape, np.int64), np.zeros((*bins.shape, width * BIN), np.int64))

    def __iadd__(self, other: "Brackets") -> "Brackets":
        self.above += other.above
        self.inside += other.inside
        return self

    def find(self, row: int, rank: int, k: int) -> float | None:
        """The k-th largest score of an expert, or None where it lies outside its bracket."""
        above = int(self.above[row, rank])
        if self.bins[row, rank] < 0 or not above < k <= above + int(self.inside[row, rank].sum()):
            return None
        place, _ = locate(self.inside[row, rank], k - above)
        return score_of(int(self.bins[row, rank]) * BIN + place)


@dataclass(kw_only=True)
class Group:
    """Tensors whose scores are ranked together, and the ranks that are asked for."""

    jobs: Sequence[TensorJob]
    experts: Sequence[int]
    ranks: Mapping[int, Sequence[int]]
    """Expert → ranks k ≥ 1 by falling score."""
    share: float | None = None
    """In place of ranks: the part of the scores above 0 that lies at or above the one that is asked for, of each expert."""

    @property
    def depth(self) -> int:
        """The largest number of ranks of an expert."""
        return max((len(ranks) for ranks in self.ranks.values()), default=0)

    def settle(self, high: "Counts") -> None:
        """Turn a share into ranks, by the histogram of all upper bits: the first bin holds 0 and what is no normal number."""
        if self.share is not None:
            counts = {expert: int(self.share * int(high[row, 1:].sum())) for row, expert in enumerate(self.experts)}
            self.ranks = {expert: (k,) if k else () for expert, k in counts.items()}


def kth_largest(scoring: Scoring, groups: Sequence[Group], *, what: str) -> list[dict[int, list[float]]]:
    """For each group: expert → the scores of the ranks asked for, exactly, as float32 values."""
    found: dict[int, Scores] = {}
    worth = [i for i, group in enumerate(groups) if _worth_sampling(scoring, group)]
    sampled = _pass(scoring, [_sample(scoring, groups[i]) for i in worth], what, whole=False)
    bracketed = _pass(scoring, [_bracket(groups[i], brackets) for i, brackets in zip(worth, sampled, strict=True)], what)
    found |= {i: scores for i, scores in zip(worth, bracketed, strict=True) if scores is not None}
    left = [i for i in range(len(groups)) if i not in found]
    bins = _pass(scoring, [_high(groups[i], partial(bins_of, groups[i])) for i in left], what)
    settled = _pass(scoring, [_bracket(groups[i], Brackets.empty(one)) for i, one in zip(left, bins, strict=True)], what)
    found |= dict(zip(left, settled, strict=True))
    return [found[i] for i in range(len(groups))]


def thresholds_of(
    scoring: Scoring, members: Sequence[tuple[Sequence[TensorJob], Mapping[int, int]]], *, what: str
) -> dict[tuple[int, str], float]:
    """(Expert, tensor) → the threshold that keeps so many of the scores of all tensors of a member; infinite where it keeps none.

    members: tensors that are ranked together, and expert → how many are kept of them.
    """
    groups = [
        Group(jobs=jobs, experts=[*counts], ranks={expert: (k,) if k else () for expert, k in counts.items()})
        for jobs, counts in members
    ]
    found: dict[tuple[int, str], float] = {}
    for group, scores in zip(groups, kth_largest(scoring, groups, what=what), strict=True):
        taus = taus_of(scores)
        found |= {(expert, job.name): taus[expert] for expert in scores for job in group.jobs}
    return found


def taus_of(scores: "Mapping[int, Sequence[float]]") -> dict[int, float]:
    """Expert → τ, from the scores of at most one rank; without a rank nothing is kept."""
    return {expert: values[0] if values else math.inf for expert, values in scores.items()}


def count_high(scoring: Scoring, group: Group, *, what: str) -> Counts:
    """The histogram of a group's upper bits, int64 (M, 65536): machines that each hold a part of the tensors add theirs up."""
    found: Counts = _pass(scoring, [_high(group, lambda high: high)], what)[0]
    return found


def count_brackets(scoring: Scoring, group: Group, bins: NDArray[np.int64], *, what: str) -> Brackets:
    """The same for what lies above and inside these bins (``bins_of``)."""
    work = _Work(group, lambda: Brackets.empty(bins), _count_into_brackets, lambda total: total)
    found: Brackets = _pass(scoring, [work], what)[0]
    return found


Scores = dict[int, list[float]]
"""Expert → the scores of its ranks."""


def read_off(group: Group, brackets: Brackets) -> Scores | None:
    """The scores of all ranks of the group, or None where one lies outside its bracket."""
    scores: Scores = {}
    for row, expert in enumerate(group.experts):
        values = [brackets.find(row, r, k) for r, k in enumerate(group.ranks.get(expert, ()))]
        scores[expert] = [value for value in values if value is not None]
        if len(scores[expert]) < len(values):
            return None
    return scores


def bins_of(group: Group, high: Counts) -> NDArray[np.int64]:
    """The bin of each rank, int64 (M, R), from the histogram of all upper bits; −1 where an expert has fewer ranks."""
    group.settle(high)
    bins = np.full((len(group.experts), group.depth), -1, np.int64)
    for row, expert in enumerate(group.experts):
        for r, k in enumerate(group.ranks.get(expert, ())):
            bins[row, r] = locate(high[row], k)[0]
    return bins


def _worth_sampling(scoring: Scoring, group: Group) -> bool:
    """Not what is scored through tensors, and nothing small: a second pass over that comes out of the cache."""
    large = group.depth == 1 and sum(job.elements for job in group.jobs) >= WORTH_SAMPLING
    return large and all(scoring.compiled(_rows(scoring, group, job), job) for job in group.jobs)


def _around(scoring: Scoring, group: Group, high: Counts) -> Brackets:
    """Brackets of the bins within ``MARGIN`` of the ranks, by the histogram of a sample."""
    bins, width = np.full((len(group.experts), 1), -1, np.int64), 1
    for row, expert in enumerate(group.experts):
        seen = int(high[row].sum())
        total = sum(job.elements for job in group.jobs if scoring.covers(expert, job))
        for k in group.ranks.get(expert, ()) if seen else ():
            at, margin = k * seen / max(total, 1), max(64.0, MARGIN * seen)
            first, last = (locate(high[row], min(seen, max(1, round(rank))))[0] for rank in (at + margin, at - margin))
            if last - first >= MAX_BINS:
                middle = locate(high[row], min(seen, max(1, round(at))))[0]
                first, last = max(first, middle - MAX_BINS // 2), min(last, middle + MAX_BINS // 2 - 1)
            bins[row, 0], width = first, max(width, last - first + 1)
    return Brackets.empty(bins, width)


def _rows(scoring: Scoring, group: Group, job: TensorJob) -> dict[int, int]:
    """The experts of the group whose scores of this tensor count → their rows of the counts."""
    return {expert: row for row, expert in enumerate(group.experts) if scoring.covers(expert, job)}


@dataclass
class _Work:
    """One pass over one group: every thread counts on its own; when the last block is done, what is asked is read off and the counts go."""

    group: Group
    empty: Callable[[], Any]
    count: Callable[[Scoring, Group, Block, Any], None]
    read_off: Callable[[Any], Any]
    blocks_left: int = 0
    parts: dict[int, Any] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    result: Any = None

    def local(self) -> Any:
        mine = self.parts.get(get_ident())
        if mine is None:
            mine = self.empty()
            with self.lock:
                self.parts[get_ident()] = mine
        return mine

    def finish_block(self) -> None:
        with self.lock:
            self.blocks_left -= 1
            if self.blocks_left > 0:
                return
        total, *others = self.parts.values() or (self.empty(),)
        for part in others:
            total += part
        self.result, self.parts = self.read_off(total), {}


def _high(group: Group, read_off: Callable[[Counts], Any]) -> _Work:
    return _Work(group, lambda: np.zeros((len(group.experts), BINS), np.int64), _count_into_high, read_off)


def _sample(scoring: Scoring, group: Group) -> _Work:
    # However large the model, the sample stays the same: of a model on a disk few pages are read.
    stride = max(SAMPLE_STRIDE, sum(job.elements for job in group.jobs) // SAMPLE_PIECES)
    return _Work(
        group,
        lambda: np.zeros((len(group.experts), BINS), np.int64),
        partial(_count_into_high, piece=SAMPLE_PIECE, stride=stride),
        partial(_around, scoring, group),
    )


def _bracket(group: Group, brackets: Brackets) -> _Work:
    width = brackets.inside.shape[2] // BIN
    return _Work(group, lambda: Brackets.empty(brackets.bins, width), _count_into_brackets, partial(read_off, group))


def _pass(scoring: Scoring, todo: Sequence[_Work], what: str, *, whole: bool = True) -> list[Any]:
    """Every block of every group, and what each group's counts lead to. ``whole``: blocks are read from end to end."""
    items: list[tuple[_Work, Block]] = []
    for work in todo:
        blocks = scoring.plan.blocks(work.group.jobs)
        work.blocks_left = len(blocks)
        items += [(work, block) for block in blocks]
        if not blocks:
            work.finish_block()

    def step(item: tuple[_Work, Block]) -> None:
        work, block = item
        if _rows(scoring, work.group, block[0]):
            work.count(scoring, work.group, block, work.local())
        work.finish_block()

    scoring.plan.stream.map(
        step,
        items,
        what=what,
        size=lambda item: block_elements(item[1]),
        ahead=(lambda item: scoring.prefetch(item[0].group.experts, item[1])) if whole else None,
    )
    return [work.result for work in todo]


def _count_into_high(
    scoring: Scoring, group: Group, block: Block, high: Counts, *, piece: int = TILE, stride: int = TILE
) -> None:
    rows = _rows(scoring, group, block[0])
    if scoring.compiled(rows, block[0]):
        base, candidates = scoring.candidates(rows, block)
        scoring.refuse_bad(rows, block, fused.count_high(base, candidates, high, piece=piece, stride=stride))
        return
    for expert, scores in scoring.scores(rows, block):
        if isinstance(scores, np.ndarray):
            loops.count_high(scores.view(np.uint32), high[rows[expert]])
            continue
        high[rows[expert]] += (_bits(scores) >> 16).bincount(minlength=BINS).cpu().numpy()


def _count_into_brackets(scoring: Scoring, group: Group, block: Block, found: Brackets) -> None:
    rows = _rows(scoring, group, block[0])
    if scoring.compiled(rows, block[0]):
        base, candidates = scoring.candidates(rows, block)
        lowest = np.where(found.bins < 0, -1, found.bins * BIN)
        bad = fused.count_brackets(base, candidates, lowest=lowest, above=found.above, inside=found.inside)
        scoring.refuse_bad(rows, block, bad)
        return
    width = found.inside.shape[2]
    for expert, scores in scoring.scores(rows, block):
        row = rows[expert]
        for r, bin in enumerate(found.bins[row].tolist()):
            if bin >= 0 and isinstance(scores, np.ndarray):
                found.above[row, r] += loops.count_inside(scores.view(np.uint32), bin * BIN, found.inside[row, r])
            elif bin >= 0 and not isinstance(scores, np.ndarray):
                places = _bits(scores) - bin * BIN
                found.above[row, r] += int((places >= width).sum())
                inside = places[(places >= 0) & (places < width)]
                found.inside[row, r] += inside.bincount(minlength=width).cpu().numpy()


def _bits(scores: "torch.Tensor") -> "torch.Tensor":
    import torch

    return scores.reshape(-1).view(torch.int32)
