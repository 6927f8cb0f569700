"""Counts of scores in one compiled pass over a block: a histogram of their upper 16 bits, or what lies above and inside brackets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled
from ota_core.files.rows import Rows
from ota_core.fused.memory import clear_absent, load
from ota_core.fused.ota import load_v_hat, scores
from ota_core.fused.sources import BY_MAGNITUDE, SOURCE, TILE, VSource, source_of

CANDIDATE = np.dtype([("theta", SOURCE), ("v", SOURCE), ("factor", np.float32), ("metric", np.int64), ("row", np.int64)])


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One expert whose scores are counted: n elements."""

    theta: Rows
    """The weights as they are stored: float32, bfloat16 or float16."""
    v: VSource | None
    """The second moments; None where they do not matter (``BY_MAGNITUDE``)."""
    metric: int
    row: int
    """The expert's row of the histograms."""


@compiled
def _tile_scores(
    one: Any, base_source: Any, base: Any, first: int, count: int, theta: Any, v_hat: Any, out: Any, has: Any
) -> bool:
    """Scores of a tile, 0 in rows that the expert or the base lacks; True when its v holds a bad entry. ``has``: a tile, overwritten."""
    load(one.theta, first, count, theta)
    if one.metric != BY_MAGNITUDE and load_v_hat(one.v, one.factor, first, count, v_hat):
        return True
    scores(count, base, theta, v_hat, one.metric, out)
    clear_absent(base_source, first, count, has, out)
    clear_absent(one.theta, first, count, has, out)
    return False


@compiled
def _count_high(base_source: Any, table: Any, n: int, piece: int, stride: int, high: Any) -> int:
    """Counts of pieces of ``piece`` elements that begin ``stride`` apart; returns the first expert with a bad v, or −1."""
    base, theta, v_hat, found = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)  # fmt: skip
    has = np.empty(TILE, np.bool_)
    bits = found.view(np.uint32)
    for first in range(0, n, stride):
        count = min(piece, n - first)
        load(base_source, first, count, base)
        for m in range(table.shape[0]):
            if _tile_scores(table[m], base_source, base, first, count, theta, v_hat, found, has):
                return m
            row = table[m].row
            for i in range(count):
                high[row, bits[i] >> np.uint32(16)] += 1
    return -1


@compiled
def _count_brackets(base_source: Any, table: Any, n: int, lowest: Any, width: int, above: Any, inside: Any) -> int:
    """The same for what lies above and inside brackets of bit patterns, ``width`` from ``lowest`` on."""
    base, theta, v_hat, found = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)  # fmt: skip
    has = np.empty(TILE, np.bool_)
    bits, places = found.view(np.uint32), np.empty(TILE + 1, np.uint32)
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load(base_source, first, count, base)
        for m in range(table.shape[0]):
            if _tile_scores(table[m], base_source, base, first, count, theta, v_hat, found, has):
                return m
            row = table[m].row
            for r in range(lowest.shape[1]):
                if lowest[row, r] < 0:
                    continue
                bottom, size = np.uint32(lowest[row, r]), np.uint32(width)
                top, larger = np.uint32(lowest[row, r] + width), np.int32(0)
                for i in range(count):
                    larger += np.int32(bits[i] >= top)
                above[row, r] += larger
                # Few lie inside: that is the point of a bracket. They are collected without a branch, which would be guessed wrong.
                hit = np.int64(0)
                for i in range(count):
                    place = np.uint32(bits[i] - bottom)
                    places[hit] = place
                    hit += np.int64(place < size)
                for i in range(hit):
                    inside[row, r, places[i]] += 1
    return -1


@compiled
def _keep(base_source: Any, one: Any, n: int, threshold: np.float32, kept: Any) -> int:
    """Whether each of n scores is at least the threshold and above 0; returns how many are, or −1 for a bad v."""
    base, theta, v_hat, found = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)  # fmt: skip
    has = np.empty(TILE, np.bool_)
    total = 0
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        load(base_source, first, count, base)
        if _tile_scores(one, base_source, base, first, count, theta, v_hat, found, has):
            return -1
        for i in range(count):
            keeps = (found[i] >= threshold) & (found[i] > 0)
            kept[first + i] = keeps
            total += keeps
    return total


def keep_block(base: Rows, candidate: Candidate, threshold: float) -> tuple[NDArray[np.bool_], int] | None:
    """The FFG mask of n elements, ``saliency.keep`` of their scores: bool (n,), and how many are kept. None for a bad v."""
    kept = np.empty(base.size, np.bool_)
    count = _keep(source_of(base)[()], _table([candidate])[0], base.size, np.float32(threshold), kept)
    return None if count < 0 else (kept, int(count))


def count_high(
    base: Rows, candidates: Sequence[Candidate], high: NDArray[np.int64], *, piece: int = TILE, stride: int = TILE
) -> int | None:
    """Count the upper 16 bits of the scores of n elements.

    base: n elements as stored. high: int64 (M, 65536), is added to. ``piece`` of every ``stride`` elements are counted, at most a tile.
    Returns the position of the first expert whose v holds a negative, NaN or infinite entry, else None.
    """
    assert piece <= TILE
    bad = _count_high(source_of(base)[()], _table(candidates), base.size, piece, stride, high)
    return None if bad < 0 else bad


def count_brackets(
    base: Rows,
    candidates: Sequence[Candidate],
    *,
    lowest: NDArray[np.int64],
    above: NDArray[np.int64],
    inside: NDArray[np.int64],
) -> int | None:
    """Count the scores of n elements that lie above and inside brackets of bit patterns.

    base: n elements as stored. lowest: int64 (M, R), the first pattern of each bracket, −1 for none. above: int64 (M, R), is added to;
    inside: int64 (M, R, W), too, one count for each of the W patterns from ``lowest`` on. Returns what ``count_high`` returns.
    """
    bad = _count_brackets(source_of(base)[()], _table(candidates), base.size, lowest, inside.shape[2], above, inside)
    return None if bad < 0 else bad


def _table(candidates: Sequence[Candidate]) -> NDArray[Any]:
    table = np.zeros(len(candidates), CANDIDATE)
    for row, one in zip(table, candidates, strict=True):
        row["theta"], row["metric"], row["row"] = source_of(one.theta), one.metric, one.row
        if one.v is not None:
            row["v"], row["factor"] = one.v.source, one.v.factor
    return table
