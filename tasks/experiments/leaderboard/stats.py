"""How sure a leaderboard is: intervals of scores and of their mean, and comparisons of two merges document by document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from tasks.evaluation.pairs import differences, sign_flips
from tasks.tracking.run import Benchmarked

LEVEL = 0.95
Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
RESAMPLES = 10_000
SEED = 0

Interval = tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """A merge's average minus the baseline's, over the same documents."""

    value: float
    low: float
    high: float
    p_value: float
    """Two-sided: how likely a difference at least this large is by chance, if the two are equally good."""
    documents: int


def score_interval(score: float, stderr: float | None, documents: int | None) -> Interval | None:
    """The interval of a mean of scores in 0…1 (Wilson, JASA 1927), None where nothing tells its width.

    The number of trials is the one that has the standard error, score·(1 − score)/stderr² (the effective sample size of Korn and
    Graubard, Survey Methodology 1998), so that it also holds for weighted means and for scores between 0 and 1. Where every document
    scored the same there is no such error, and the number of documents takes its place: 0 of 200 right is not surely 0.
    """
    trials: float | None = documents
    if stderr and 0 < score < 1:
        trials = score * (1 - score) / stderr**2
    elif stderr is None and 0 < score < 1:
        return None
    if not trials or not 0 <= score <= 1:
        return None
    middle = (score + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z / (1 + Z**2 / trials) * math.sqrt(score * (1 - score) / trials + Z**2 / (4 * trials**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(scores: Sequence[float], intervals: Sequence[Interval | None]) -> Interval | None:
    """The interval of the plain mean of independent scores from theirs (MOVER: Zou and Donner, Statistics in Medicine 2008).

    None where one is not known. Unlike a normal interval from standard errors it does not take a capability at 0 for certain.
    """
    known = [interval for interval in intervals if interval is not None]
    if not scores or len(known) < len(scores):
        return None
    mean = math.fsum(scores) / len(scores)
    below = math.sqrt(math.fsum((s - low) ** 2 for s, (low, _) in zip(scores, known, strict=True))) / len(scores)
    above = math.sqrt(math.fsum((high - s) ** 2 for s, (_, high) in zip(scores, known, strict=True))) / len(scores)
    return mean - below, mean + above


def ratio_interval(above: float, of_above: Interval | None, below: float, of_below: Interval | None) -> Interval | None:
    """The interval of a ratio of two independent scores from theirs (MOVER-R: Donner and Zou, Statistical Methods in Medical Research 2012).

    Scores of the same documents agree more than independent ones: then it is wider than need be. None where an interval is not known
    or that of the denominator reaches 0, so that the ratio has no upper end.
    """
    if of_above is None or of_below is None or of_below[0] <= 0:
        return None
    (l1, u1), (l2, u2) = of_above, of_below
    product = above * below
    low = product - math.sqrt(max(0.0, product**2 - l1 * u2 * (2 * above - l1) * (2 * below - u2)))
    high = product + math.sqrt(max(0.0, product**2 - u1 * l2 * (2 * above - u1) * (2 * below - l2)))
    return low / (u2 * (2 * below - u2)), high / (l2 * (2 * below - l2))


def paired_difference(candidate: Benchmarked, baseline: Benchmarked, capabilities: Sequence[str]) -> Difference:
    """The candidate's mean over these capabilities minus the baseline's: normal interval of the documents' differences, sign-flip test.

    Raises GateError for scores that are not over the same documents, or no means over documents.
    """
    parts, error = differences(candidate.suite, capabilities, "baseline", candidate.merged, baseline.merged)
    value = math.fsum(parts)
    one_sided = (sign_flips(signed, resamples=RESAMPLES, seed=SEED) for signed in (parts, -parts))
    return Difference(
        value=value,
        low=value - Z * error,
        high=value + Z * error,
        p_value=min(1.0, 2 * min(one_sided)),
        documents=len(parts),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm, Scandinavian Journal of Statistics 1979), in the given order."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
