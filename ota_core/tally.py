"""The k-th largest scores of whole experts or of single tensors, exactly, mostly from one pass over the blocks.

Non-negative floats order as their bit patterns: a histogram of the upper 16 bits tells which bin holds the k-th largest score, one of
the lower 16 bits within that bin tells the score itself. A sample of the scores tells beforehand which bins to open, so that one pass
fills both; where the sample was wrong, a second pass opens the right bin. Counts are integers: their sums depend on no order, no cut
into blocks and no layout of threads or machines.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Lock, get_ident
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from ota_core.fused.counts import Candidate, count_block
from ota_core.fused.memory import TILE
from ota_core.plan import MergePlan
from ota_core.saliency import BINS
from ota_core.views import Block, TensorJob, block_elements

Counts = NDArray[np.int64]
SAMPLE_PIECE, SAMPLE_STRIDE = 256, 8192
"""Elements sampled in a row, and the distance between such pieces: neighbours have much in common."""
MARGIN = 0.015
"""Share of the ranks on either side of the sampled one whose bins are opened: about four standard errors of a sample of a million."""
MAX_OPEN = 24
WORTH_SAMPLING = 1 << 26


class Scoring(Protocol):
    """What gives the scores of a block."""

    def compiled(self, experts: Sequence[int], job: TensorJob) -> bool:
        """Whether ``candidates`` serves this tensor."""
        ...

    def candidates(self, experts: Sequence[int], block: Block) -> tuple[torch.Tensor, list[Candidate]]:
        """The base's rows as stored, and one candidate an expert, in the order of ``experts``, which is what their rows count."""
        ...

    def scores(self, expert: int, block: Block) -> Iterator[torch.Tensor]:
        """The scores of a block in parts, float32 ≥ 0, for what the compiled pass does not serve."""
        ...

    def covers(self, expert: int, job: TensorJob) -> bool:
        """Whether this expert's scores of the tensor count."""
        ...

    def prefetch(self, experts: Sequence[int], block: Block) -> None:
        """A hint that this block is next."""
        ...

    def refuse(self, expert: int, block: Block) -> None:
        """Raise the error that names the entry of the expert's v in this block that is negative, NaN or infinite."""
        ...


@dataclass
class Histograms:
    """Counts of M experts' scores: ``high`` int64 (M, 65536) by the upper 16 bits; ``low`` int64 (M, S, 65536) by the lower 16 bits of the
    scores whose bin has a row in ``slots``, int8 (M, 65536)."""

    slots: NDArray[np.int8]
    high: Counts
    low: Counts

    @classmethod
    def empty(cls, slots: NDArray[np.int8]) -> "Histograms":
        experts = slots.shape[0]
        opened = int(slots.max(initial=-1)) + 1
        return cls(slots, np.zeros((experts, BINS), np.int64), np.zeros((experts, opened, BINS), np.int64))

    def add(self, other: "Histograms") -> None:
        self.high += other.high
        self.low += other.low


@dataclass(kw_only=True)
class Group:
    """Tensors whose scores are ranked together, and the ranks that are asked for."""

    jobs: Sequence[TensorJob]
    experts: Sequence[int]
    ranks: Mapping[int, Sequence[int]]
    """Expert → ranks k ≥ 1 by falling score."""


@dataclass(kw_only=True)
class _Count:
    """One pass over one group: every thread counts on its own; when the last block is done, what is asked is read off and the counts go."""

    group: Group
    slots: NDArray[np.int8]
    blocks_left: int
    read_off: Callable[[Histograms], Any]
    count_high: bool
    sample: bool
    parts: dict[int, Histograms] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)
    result: Any = None

    def local(self) -> Histograms:
        mine = self.parts.get(get_ident())
        if mine is None:
            mine = Histograms.empty(self.slots)
            with self.lock:
                self.parts[get_ident()] = mine
        return mine

    def finish_block(self) -> None:
        with self.lock:
            self.blocks_left -= 1
            if self.blocks_left:
                return
        total, *others = self.parts.values()
        for part in others:
            total.add(part)
        self.result, self.parts = self.read_off(total), {}


def count(
    plan: MergePlan, scoring: Scoring, group: Group, slots: NDArray[np.int8], *, count_high: bool = True, what: str
) -> Histograms:
    """Histograms of one group: what machines that each hold a part of the tensors add up."""
    found: Histograms = _pass(plan, scoring, [(group, slots, lambda total: total)], what, count_high=count_high)[0]
    return found


def kth_largest(plan: MergePlan, scoring: Scoring, groups: Sequence[Group], *, what: str) -> list[dict[int, list[float]]]:
    """For each group: expert → the scores of the ranks asked for, exactly, as float32 values."""
    sampled = _sample(plan, scoring, groups, what)
    placed = _pass(
        plan, scoring, [(group, slots, partial(place, group)) for group, slots in zip(groups, sampled, strict=True)], what
    )
    unread = [i for i, places in enumerate(placed) if any(one.score is None for one in flat(places))]
    again = [(groups[i], open_bins(bins_of(groups[i], placed[i])), partial(settle, groups[i], placed[i])) for i in unread]
    for i, places in zip(unread, _pass(plan, scoring, again, what, count_high=False), strict=True):
        placed[i] = places
    return [{expert: [one.score for one in found] for expert, found in places.items()} for places in placed]


@dataclass(frozen=True)
class Place:
    """Where the k-th largest score lies: ``rest``-th largest of a bin; the score itself where the bin's lower bits were counted."""

    bin: int
    rest: int
    score: float | None


Places = dict[int, list[Place]]
"""Expert → the place of each of its ranks."""


def flat(places: Places) -> list[Place]:
    return [one for found in places.values() for one in found]


def bins_of(group: Group, places: Places) -> list[list[int]]:
    """The bins that hold the ranks of each expert."""
    return [sorted({one.bin for one in places[expert]}) for expert in group.experts]


def place(group: Group, found: Histograms) -> Places:
    """Where the ranks of the group lie, from histograms of all upper bits; with their scores where the bin is open."""
    places: Places = {}
    for row, expert in enumerate(group.experts):
        places[expert] = []
        for k in group.ranks.get(expert, ()):
            index, above = locate(found.high[row], k)
            places[expert].append(Place(index, k - above, _score(found, row, index, k - above)))
    return places


def settle(group: Group, places: Places, found: Histograms) -> Places:
    """The same places with their scores, from a count of the lower bits of their bins."""
    return {
        expert: [replace(one, score=_score(found, row, one.bin, one.rest)) for one in places[expert]]
        for row, expert in enumerate(group.experts)
    }


def _score(found: Histograms, row: int, index: int, rest: int) -> float | None:
    slot = found.slots[row, index]
    if slot < 0:
        return None
    lower, _ = locate(found.low[row, slot], rest)
    return float(np.array((index << 16) | lower, np.uint32).view(np.float32))


def locate(high: Counts, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest score, and how many scores lie in the bins above it. high: int64 (65536,)."""
    from_top = np.cumsum(high[::-1])
    index = int(np.searchsorted(from_top, k))
    return BINS - 1 - index, int(from_top[index] - high[BINS - 1 - index])


def open_bins(bins: Sequence[Sequence[int]]) -> NDArray[np.int8]:
    """Slots for these bins of each expert."""
    slots = np.full((len(bins), BINS), -1, np.int8)
    for row, chosen in enumerate(bins):
        slots[row, list(chosen)] = np.arange(len(chosen), dtype=np.int8)
    return slots


def _sample(plan: MergePlan, scoring: Scoring, groups: Sequence[Group], what: str) -> list[NDArray[np.int8]]:
    """For each group the bins around its ranks, by a sample. None for what is scored through tensors, or small: a second pass over that
    comes out of the cache."""
    todo: list[tuple[Group, NDArray[np.int8], Callable[[Histograms], Any]]] = []
    where: dict[int, int] = {}
    nothing = [open_bins([()] * len(group.experts)) for group in groups]
    for i, group in enumerate(groups):
        compiled = all(scoring.compiled(_covering(scoring, group, job), job) for job in group.jobs)
        if compiled and sum(job.elements for job in group.jobs) >= WORTH_SAMPLING:
            where[i] = len(todo)
            todo.append((group, nothing[i], partial(_around, scoring, group)))
    found = _pass(plan, scoring, todo, what, sample=True)
    return [found[where[i]] if i in where else nothing[i] for i in range(len(groups))]


def _around(scoring: Scoring, group: Group, sample: Histograms) -> NDArray[np.int8]:
    """The bins within ``MARGIN`` of the ranks, for each expert at most ``MAX_OPEN``."""
    chosen = []
    for row, expert in enumerate(group.experts):
        high = sample.high[row]
        seen, total = int(high.sum()), sum(job.elements for job in group.jobs if scoring.covers(expert, job))
        bins: set[int] = set()
        for k in group.ranks.get(expert, ()) if seen else ():
            at, margin = k * seen / max(total, 1), max(64.0, MARGIN * seen)
            last, first = (locate(high, min(seen, max(1, round(at + side))))[0] for side in (margin, -margin))
            middle = locate(high, min(seen, max(1, round(at))))[0]
            near = sorted(range(last, first + 1), key=lambda index: abs(index - middle))
            bins.update(near[: MAX_OPEN // len(group.ranks[expert])])
        chosen.append(sorted(bins))
    return open_bins(chosen)


def _covering(scoring: Scoring, group: Group, job: TensorJob) -> list[int]:
    return [expert for expert in group.experts if scoring.covers(expert, job)]


def _pass(
    plan: MergePlan,
    scoring: Scoring,
    todo: Sequence[tuple[Group, NDArray[np.int8], Callable[[Histograms], Any]]],
    what: str,
    *,
    count_high: bool = True,
    sample: bool = False,
) -> list[Any]:
    """Count each group with its slots; what each group's function reads off its histograms."""
    items: list[tuple[_Count, Block]] = []
    counts = []
    for group, slots, read_off in todo:
        blocks = plan.blocks(group.jobs)
        one = _Count(group=group, slots=slots, blocks_left=len(blocks), read_off=read_off, count_high=count_high, sample=sample)
        if not blocks:
            one.result = read_off(Histograms.empty(slots))
        counts.append(one)
        items += [(one, block) for block in blocks]

    def work(item: tuple[_Count, Block]) -> None:
        _count_block(scoring, *item)
        item[0].finish_block()

    plan.stream.map(
        work,
        items,
        what=what,
        size=lambda item: block_elements(item[1]),
        ahead=lambda item: scoring.prefetch(item[0].group.experts, item[1]),
    )
    return [one.result for one in counts]


def _count_block(scoring: Scoring, count: _Count, block: Block) -> None:
    group, mine = count.group, count.local()
    experts = _covering(scoring, group, block[0])
    rows = {expert: row for row, expert in enumerate(group.experts)}
    if experts and scoring.compiled(experts, block[0]):
        base, candidates = scoring.candidates(experts, block)
        piece, stride = (SAMPLE_PIECE, SAMPLE_STRIDE) if count.sample else (TILE, TILE)
        bad = count_block(
            base,
            [replace(one, row=rows[expert]) for one, expert in zip(candidates, experts, strict=True)],
            high=mine.high,
            slots=mine.slots,
            low=mine.low,
            count_high=count.count_high,
            piece=piece,
            stride=stride,
        )
        if bad is not None:
            scoring.refuse(experts[bad], block)
        return
    for expert in experts:
        for scores in scoring.scores(expert, block):
            _count_scores(scores, mine, rows[expert], count.count_high)


def _count_scores(scores: torch.Tensor, into: Histograms, row: int, count_high: bool) -> None:
    """The same from a tensor of scores, on any device."""
    bits = scores.reshape(-1).view(torch.int32)
    if count_high:
        into.high[row] += torch.bincount(bits >> 16, minlength=BINS).cpu().numpy()
    for index in np.flatnonzero(into.slots[row] >= 0):
        inside = bits[(bits >> 16) == int(index)] & 0xFFFF
        into.low[row, into.slots[row, index]] += torch.bincount(inside, minlength=BINS).cpu().numpy()
