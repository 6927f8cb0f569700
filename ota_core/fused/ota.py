"""OTA with Fast Fisher Grafting in one compiled pass: score, mask, weight and sum of all experts, tile by tile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled
from ota_core.files.rows import Rows
from ota_core.fused.memory import load, load_bytes, store
from ota_core.fused.sources import BY_CURVATURE, BY_MAGNITUDE, SOURCE, TILE, WRITTEN, VSource, source_of

ALL, ABOVE, GIVEN = 0, 1, 2  # what an expert keeps: everything, scores from τ on, or a mask made before

VOTE = np.dtype(
    [
        ("theta", SOURCE),
        ("v", SOURCE),
        ("factor", np.float32),
        ("mean", np.float64),
        ("scale", np.float64),
        ("keeps", np.int64),
        ("metric", np.int64),
        ("threshold", np.float32),
        ("mask", np.uint64),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One expert's part in a block of n elements."""

    theta: Rows
    """The weights as they are stored: float32, bfloat16 or float16, n elements."""
    v: VSource
    """The second moments, and the factor that makes them v̂."""
    scale: float = 1.0
    mean: float = 1.0
    threshold: float | None = None
    """τ on the score; None where FFG is off or ``kept`` is given."""
    kept: NDArray[np.bool_] | None = None
    """A mask made before, bool, n elements."""
    metric: int = BY_CURVATURE


@compiled
def score(v_hat: np.float32, theta: np.float32, base: np.float32, metric: int) -> np.float32:
    """√v̂·|Δ|, or |Δ|: what ``saliency.curvature_scores`` and ``magnitude_scores`` compute."""
    # The same bits as a difference in float64 that is rounded to float32: double rounding is harmless where the wider format has more
    # than twice the digits and two more (Figueroa 1995).
    delta = theta - base
    if metric == BY_MAGNITUDE:
        return abs(delta)
    return abs(np.sqrt(v_hat) * delta)


@compiled
def scores(count: int, base: Any, theta: Any, v_hat: Any, metric: int, out: Any) -> None:
    """The scores of a tile, float32; v_hat is not looked at with ``BY_MAGNITUDE``."""
    if metric == BY_MAGNITUDE:
        for i in range(count):
            out[i] = score(np.float32(0), theta[i], base[i], BY_MAGNITUDE)
    else:
        for i in range(count):
            out[i] = score(v_hat[i], theta[i], base[i], BY_CURVATURE)


@compiled
def load_v_hat(source: Any, factor: np.float32, first: int, count: int, out: NDArray[np.float32]) -> bool:
    """v̂ of a tile. True when an entry of v is negative, NaN or infinite: the caller then looks for it, to name it."""
    load(source, first, count, out)
    bits, bad = out.view(np.uint32), np.uint32(0)
    # As bit patterns, non-negative finite numbers end at 0x7F7FFFFF; −0 is allowed. Comparing integers runs in the vector units.
    for i in range(count):
        bad |= np.uint32((bits[i] > np.uint32(0x7F7FFFFF)) & (bits[i] != np.uint32(0x80000000)))
    if factor != np.float32(1.0):
        for i in range(count):
            out[i] = out[i] * factor
    return bool(bad != 0)


@compiled
def _weights(count: int, v_hat: Any, power: float, mean: float, scale: float, epsilon: float, weights: Any) -> None:
    if power == 0.5:
        for i in range(count):
            weights[i] = np.sqrt(np.float64(v_hat[i])) / mean * scale + epsilon
    elif power == 1.0:
        for i in range(count):
            weights[i] = np.float64(v_hat[i]) / mean * scale + epsilon
    elif power == 0.0:
        for i in range(count):
            weights[i] = 1.0 / mean * scale + epsilon
    else:
        for i in range(count):
            weights[i] = np.float64(v_hat[i]) ** power / mean * scale + epsilon


@compiled
def _plain_weights(count: int, v_hat: Any, weights: Any) -> None:
    """The usual case, p = √v̂: one division less for each element, the same bits as dividing by 1."""
    for i in range(count):
        weights[i] = np.sqrt(np.float64(v_hat[i]))


@compiled
def _add(count: int, theta: Any, weights: Any, kept: Any, numerator: Any, total: Any, somebody: Any) -> int:
    found = 0
    for i in range(count):
        weight = weights[i] if kept[i] else 0.0
        numerator[i] += weight * np.float64(theta[i])
        total[i] += weight
        somebody[i] |= kept[i]
        found += kept[i]
    return found


@compiled
def _add_all(count: int, base: Any, theta: Any, weights: Any, kept: Any, numerator: Any, total: Any, somebody: Any) -> int:
    found = 0
    for i in range(count):
        numerator[i] += weights[i] * np.float64(theta[i] if kept[i] else base[i])
        total[i] += weights[i]
        somebody[i] |= kept[i]
        found += kept[i]
    return found


@compiled
def _finish(count: int, base: Any, numerator: Any, total: Any, somebody: Any, lam: float, out: Any) -> None:
    for i in range(count):
        start = np.float64(base[i])
        target = numerator[i] / total[i] if total[i] > 0 else start
        merged = target if lam == 1.0 else start + lam * (target - start)
        out[i] = merged if somebody[i] else start


@compiled
def _add_plain(count: int, theta: Any, first: bool, plain: Any) -> None:
    for i in range(count):
        plain[i] = np.float64(theta[i]) if first else plain[i] + np.float64(theta[i])


@compiled
def _finish_without_base(count: int, plain: Any, experts: int, numerator: Any, total: Any, out: Any) -> None:
    for i in range(count):
        out[i] = numerator[i] / total[i] if total[i] > 0 else plain[i] / experts


@compiled
def _merge(
    has_base: bool, base_source: Any, votes: Any, n: int, power: float, epsilon: float, lam: float, kept_only: bool, kind: int, address: int,
    counts: Any,
) -> int:  # fmt: skip
    """Merge n elements to an address; returns the first expert whose v holds a bad entry, or −1."""
    base, theta, v_hat, score_tile = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)  # fmt: skip
    numerator, total, weights, plain = np.empty(TILE), np.empty(TILE), np.empty(TILE), np.empty(TILE)
    somebody, kept = np.empty(TILE, np.bool_), np.empty(TILE, np.bool_)
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        if has_base:
            load(base_source, first, count, base)
        numerator[:] = 0.0
        total[:] = 0.0
        somebody[:] = False
        for m in range(votes.shape[0]):
            vote = votes[m]
            load(vote.theta, first, count, theta)
            if not has_base:
                _add_plain(count, theta, m == 0, plain)
            if load_v_hat(vote.v, vote.factor, first, count, v_hat):
                return m
            if vote.keeps == ALL:
                kept[:] = True
            elif vote.keeps == GIVEN:
                load_bytes(vote.mask, first, count, kept)
            else:
                scores(count, base, theta, v_hat, vote.metric, score_tile)
                for i in range(count):
                    kept[i] = (score_tile[i] >= vote.threshold) & (score_tile[i] > 0)
            if power == 0.5 and vote.mean == 1.0 and vote.scale == 1.0 and epsilon == 0.0:
                _plain_weights(count, v_hat, weights)
            else:
                _weights(count, v_hat, power, vote.mean, vote.scale, epsilon, weights)
            if kept_only:
                counts[m] += _add(count, theta, weights, kept, numerator, total, somebody)
            else:
                counts[m] += _add_all(count, base, theta, weights, kept, numerator, total, somebody)
        if has_base:
            _finish(count, base, numerator, total, somebody, lam, weights)
        else:
            _finish_without_base(count, plain, votes.shape[0], numerator, total, weights)
        store(weights, count, kind, address, first, theta)
    return -1


def ota_block(
    base: Rows | None,
    votes: Sequence[Vote],
    out: Rows,
    *,
    power: float,
    epsilon: float,
    lam: float,
    denominator: str,
) -> tuple[list[int], int | None]:
    """``methods.ota.ota`` with its masks and weights, rounded into ``out``.

    base: n elements as stored, or None where there is none and every vote keeps everything; out: float32 or bfloat16, n elements,
    contiguous. Returns how many elements each expert kept, and the
    position of the first expert whose v holds a negative, NaN or infinite entry (``out`` is then incomplete), else None.
    """
    table = np.zeros(len(votes), VOTE)
    for row, vote in zip(table, votes, strict=True):
        row["theta"], row["v"], row["factor"] = source_of(vote.theta), vote.v.source, vote.v.factor
        row["mean"], row["scale"], row["metric"] = vote.mean, vote.scale, vote.metric
        if vote.kept is not None:
            assert vote.kept.flags.c_contiguous and vote.kept.dtype == np.bool_
            row["keeps"], row["mask"] = GIVEN, vote.kept.ctypes.data
        elif vote.threshold is not None:
            row["keeps"], row["threshold"] = ABOVE, vote.threshold
    counts = np.zeros(len(votes), np.int64)
    kind = WRITTEN[out.dtype]
    assert base is not None or not (table["keeps"] != ALL).any()
    start = source_of(base if base is not None else votes[0].theta)[()]
    bad = _merge(base is not None, start, table, out.size, power, epsilon, lam, denominator == "kept", kind, out.address, counts)
    return counts.tolist(), None if bad < 0 else bad
