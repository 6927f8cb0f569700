"""Histograms of scores in one compiled pass over a block: the upper 16 bits of all, the lower 16 bits of those in chosen bins."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ota_core.fused.memory import SOURCE, TILE, VSource, compiled, load, source_of
from ota_core.fused.ota import BY_MAGNITUDE, load_v_hat, scores

CANDIDATE = np.dtype([("theta", SOURCE), ("v", SOURCE), ("factor", np.float32), ("metric", np.int64), ("row", np.int64)])


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One expert whose scores are counted: n elements."""

    theta: torch.Tensor
    """The weights as they are stored: float32, bfloat16 or float16."""
    v: VSource | None
    """The second moments; None where they do not matter (``BY_MAGNITUDE``)."""
    metric: int
    row: int
    """The expert's row of the histograms."""


@compiled
def _count(
    base_source: Any, table: Any, n: int, piece: int, stride: int, slots: Any, high: Any, low: Any, count_high: bool
) -> int:
    """Counts of pieces of ``piece`` elements that begin ``stride`` apart; returns the first expert with a bad v, or −1."""
    base, theta, v_hat, score_tile = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)  # fmt: skip
    bits = score_tile.view(np.uint32)
    for first in range(0, n, stride):
        count = min(piece, n - first)
        load(base_source, first, count, base)
        for m in range(table.shape[0]):
            one = table[m]
            load(one.theta, first, count, theta)
            if one.metric != BY_MAGNITUDE and load_v_hat(one.v, one.factor, first, count, v_hat):
                return m
            scores(count, base, theta, v_hat, one.metric, score_tile)
            row = one.row
            if count_high:
                for i in range(count):
                    high[row, bits[i] >> np.uint32(16)] += 1
            if low.shape[1] > 0:
                for i in range(count):
                    slot = slots[row, bits[i] >> np.uint32(16)]
                    if slot >= 0:
                        low[row, slot, bits[i] & np.uint32(0xFFFF)] += 1
    return -1


def count_block(
    base: torch.Tensor,
    candidates: Sequence[Candidate],
    *,
    high: NDArray[np.int64],
    slots: NDArray[np.int8],
    low: NDArray[np.int64],
    count_high: bool = True,
    piece: int = TILE,
    stride: int = TILE,
) -> int | None:
    """Add the scores of n elements to the experts' histograms.

    base: n elements as stored. high: int64 (M, 65536), counts by the upper 16 bits. slots: int8 (M, 65536), which row of ``low`` counts
    the lower bits of that bin, −1 for none. low: int64 (M, S, 65536). ``piece`` of every ``stride`` elements are counted, at most a tile.
    Returns the position of the first expert whose v holds a negative, NaN or infinite entry, else None.
    """
    table = np.zeros(len(candidates), CANDIDATE)
    for row, one in zip(table, candidates, strict=True):
        row["theta"], row["metric"], row["row"] = source_of(one.theta), one.metric, one.row
        if one.v is not None:
            row["v"], row["factor"] = one.v.source, one.v.factor
    assert piece <= TILE and (low.shape[1] > 0 or (slots < 0).all())
    bad = _count(source_of(base)[()], table, base.numel(), piece, stride, slots, high, low, count_high)
    return None if bad < 0 else bad
