"""OTA with Fast Fisher Grafting in one compiled pass: score, mask, weight and sum of all experts, tile by tile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled
from ota_core.files.rows import Rows
from ota_core.fused.memory import clear_absent, lacks, load, load_base, load_bytes, start_of, store, tile_of
from ota_core.fused.sources import BY_CURVATURE, BY_MAGNITUDE, SOURCE, TILE, WRITTEN, VSource, source_of

ALL, ABOVE, GIVEN, NOTHING = (
    0,
    1,
    2,
    3,
)  # what an expert keeps: everything, scores from τ on, a mask made before; it takes no part

VOTE = np.dtype(
    [
        ("theta", SOURCE),
        ("has_v", np.bool_),
        ("v", SOURCE),
        ("factor", np.float32),
        ("mean", np.float64),
        ("scale", np.float64),
        ("stretch", np.float64),
        ("keeps", np.int64),
        ("metric", np.int64),
        ("threshold", np.float32),
        ("mask", np.uint64),
    ]
)

HOW = np.dtype(
    [
        ("has_base", np.bool_),
        ("filled", np.bool_),  # without a base: rows that stand in for absent ones are given
        ("power", np.float64),
        ("epsilon", np.float64),
        ("lam", np.float64),
        ("kept_only", np.bool_),
        ("constant", np.bool_),
        ("stretched", np.bool_),
        ("elect", np.bool_),
        ("mean_where_nobody", np.bool_),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One expert's part in a block of n elements."""

    theta: Rows
    """The weights as they are stored: float32, bfloat16 or float16, n elements."""
    v: VSource | None
    """The second moments, and the factor that makes them v̂. None: the weight is ``scale``, and with ``denominator: all`` an
    expert votes for θ₀ in rows that it lacks."""
    takes_part: bool = True
    """Whether it votes; where it does not, it counts in the plain mean alone."""
    scale: float = 1.0
    stretch: float = 1.0
    """By what the task vector is multiplied (``rescale``)."""
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
    # Where the base is float64, its numbers are those of float32 too, but in rows that the base lacks, which are not ranked.
    delta = np.float32(theta - base)
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
def _add_plain(count: int, theta: Any, base: Any, lacking: bool, has: Any, first: bool, plain: Any) -> None:
    if lacking:
        for i in range(count):
            value = np.float64(theta[i]) if has[i] else np.float64(base[i])
            plain[i] = value if first else plain[i] + value
    else:
        for i in range(count):
            plain[i] = np.float64(theta[i]) if first else plain[i] + np.float64(theta[i])


@compiled
def _leave(count: int, base: Any, theta: Any, kept: Any, scale: float, left: Any, elected: Any, somebody: Any) -> int:
    """The masked task vector of an expert, and what it adds to the election of the signs."""
    found = 0
    for i in range(count):
        left[i] = np.float64(theta[i]) - np.float64(base[i]) if kept[i] else 0.0
        elected[i] += scale * left[i]
        somebody[i] |= kept[i]
        found += kept[i]
    return found


@compiled
def _add_elected(count: int, left: Any, scale: float, elected: Any, total: Any, divisor: Any) -> None:
    for i in range(count):
        agrees = ((left[i] > 0) & (elected[i] > 0)) | ((left[i] < 0) & (elected[i] < 0))
        total[i] += scale * left[i] if agrees else 0.0
        divisor[i] += scale if agrees else 0.0


@compiled
def _finish_elected(count: int, base: Any, total: Any, divisor: Any, lam: float, out: Any) -> None:
    for i in range(count):
        edit = total[i] / divisor[i] if divisor[i] > 0 else 0.0
        out[i] = np.float64(base[i]) + lam * edit


@compiled
def _finish_without_base(count: int, plain: Any, experts: int, numerator: Any, total: Any, out: Any) -> None:
    for i in range(count):
        out[i] = numerator[i] / total[i] if total[i] > 0 else plain[i] / experts


@compiled
def _stretch(count: int, base: Any, theta: Any, stretch: float, out: Any) -> None:
    for i in range(count):
        start = np.float64(base[i])
        out[i] = start + stretch * (np.float64(theta[i]) - start)


@compiled
def _keep(
    vote: Any, base_source: Any, base: Any, theta: Any, v_hat: Any, first: int, count: int, found: Any, has: Any, kept: Any
) -> None:
    """What an expert keeps of a tile. ``found`` and ``has``: tiles, overwritten."""
    if vote.keeps == ALL:
        kept[:] = True
    elif vote.keeps == GIVEN:
        load_bytes(vote.mask, first, count, kept)
    else:
        scores(count, base, theta, v_hat, vote.metric, found)
        for i in range(count):
            kept[i] = (found[i] >= vote.threshold) & (found[i] > 0)
        clear_absent(base_source, first, count, has, kept)
    clear_absent(vote.theta, first, count, has, kept)


@compiled
def _merge(how: Any, base_source: Any, base: Any, votes: Any, n: int, kind: int, address: int, counts: Any) -> int:
    theta, v_hat, score_tile = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    numerator, total, weights, plain, stretched = np.empty(TILE), np.empty(TILE), np.empty(TILE), np.empty(TILE), np.empty(TILE)
    somebody, kept, has = np.empty(TILE, np.bool_), np.empty(TILE, np.bool_), np.empty(TILE, np.bool_)
    lefts, elected = np.empty((votes.shape[0] if how.elect else 0, TILE)), np.empty(TILE)
    has_plain = how.mean_where_nobody or not how.has_base
    for first in range(0, n, TILE):
        count = min(TILE, n - first)
        if how.has_base or how.filled:
            load_base(base_source, first, count, base)
        numerator[:] = 0.0
        total[:] = 0.0
        somebody[:] = False
        if how.elect:
            elected[:] = 0.0
            lefts[:] = 0.0
        for m in range(votes.shape[0]):
            vote = votes[m]
            load(vote.theta, first, count, theta)
            if has_plain:
                lacking = lacks(vote.theta, first, count, has)
                _add_plain(count, theta, base, lacking, has, m == 0, plain)
            if vote.keeps == NOTHING:
                continue
            if vote.has_v and load_v_hat(vote.v, vote.factor, first, count, v_hat):
                return m
            _keep(vote, base_source, base, theta, v_hat, first, count, score_tile, has, kept)
            if how.stretched:
                _stretch(count, base, theta, vote.stretch, stretched)
            if how.elect:
                if how.stretched:
                    counts[m] += _leave(count, base, stretched, kept, vote.scale, lefts[m], elected, somebody)
                else:
                    counts[m] += _leave(count, base, theta, kept, vote.scale, lefts[m], elected, somebody)
                continue
            if how.constant or not vote.has_v:
                weights[:] = vote.scale
            elif how.power == 0.5 and vote.mean == 1.0 and vote.scale == 1.0 and how.epsilon == 0.0:
                _plain_weights(count, v_hat, weights)
            else:
                _weights(count, v_hat, how.power, vote.mean, vote.scale, how.epsilon, weights)
            if vote.has_v:
                clear_absent(vote.theta, first, count, has, weights)
            else:
                somebody[:] = True
            if how.kept_only:
                if how.stretched:
                    counts[m] += _add(count, stretched, weights, kept, numerator, total, somebody)
                else:
                    counts[m] += _add(count, theta, weights, kept, numerator, total, somebody)
            elif how.stretched:
                counts[m] += _add_all(count, base, stretched, weights, kept, numerator, total, somebody)
            else:
                counts[m] += _add_all(count, base, theta, weights, kept, numerator, total, somebody)
        if how.elect:
            for m in range(votes.shape[0]):
                _add_elected(count, lefts[m], votes[m].scale, elected, numerator, total)
            _finish_elected(count, base, numerator, total, how.lam, weights)
        elif how.has_base:
            _finish(count, base, numerator, total, somebody, how.lam, weights)
        else:
            _finish_without_base(count, plain, votes.shape[0], numerator, total, weights)
        if how.mean_where_nobody and how.has_base:
            for i in range(count):
                if not somebody[i]:
                    weights[i] = plain[i] / votes.shape[0]
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
    masked_merge: str = "precond",
    fallback: str = "base",
    rescale: bool = False,
) -> tuple[list[int], int | None]:
    """What ``methods.ota`` makes of a block with its masks and weights, rounded into ``out``.

    base: n elements as stored, or ``memory.start_of`` them; None where there is none and every vote keeps everything. out: float32,
    bfloat16 or float64, n elements, contiguous. masked_merge, fallback: as recipes have them; rescale: whether task vectors are multiplied
    by their ``stretch``. Returns how many elements each expert kept, and the position of the first expert whose v holds a negative, NaN or
    infinite entry (``out`` is then incomplete), else None.
    """
    filled = start_of(base, [vote.theta for vote in votes])
    table = np.zeros(len(votes), VOTE)
    for row, vote in zip(table, votes, strict=True):
        row["theta"], row["mean"], row["scale"] = source_of(vote.theta), vote.mean, vote.scale
        row["stretch"], row["metric"] = vote.stretch, vote.metric
        if vote.v is not None:
            row["has_v"], row["v"], row["factor"] = True, vote.v.source, vote.v.factor
        if not vote.takes_part:
            row["keeps"] = NOTHING
        elif vote.kept is not None:
            assert vote.kept.flags.c_contiguous and vote.kept.dtype == np.bool_
            row["keeps"], row["mask"] = GIVEN, vote.kept.ctypes.data
        elif vote.threshold is not None:
            row["keeps"], row["threshold"] = ABOVE, vote.threshold
    how = np.zeros((), HOW)
    how["has_base"], how["filled"] = base is not None, filled is not None
    how["power"], how["epsilon"], how["lam"], how["kept_only"] = power, epsilon, lam, denominator == "kept"
    how["constant"], how["elect"] = masked_merge == "linear", masked_merge == "ties"
    how["stretched"], how["mean_where_nobody"] = rescale, fallback == "mean"
    assert base is not None or not np.isin(table["keeps"], (ABOVE, GIVEN)).any()
    counts = np.zeros(len(votes), np.int64)
    start = source_of(filled if filled is not None else votes[0].theta)[()]
    bad = _merge(how[()], start, tile_of(filled), table, out.size, WRITTEN[out.dtype], out.address, counts)
    return counts.tolist(), None if bad < 0 else bad
