"""Retention from what a preflight measures: a ridge regression on the merges that are known, and how far it is off where it did not look.

Intervals are CV+ (Barber, Candès, Ramdas & Tibshirani 2021, "Predictive inference with the jackknife+", arXiv 1905.02928): each known value is
predicted by a fit without its group, and the new one by each of these fits, give or take what they missed. They hold whatever the
distribution of the errors is, as far as the new merge is like those known. Groups are sets of experts: merges of the same ones resemble
each other, and a fit that knew some would flatter itself on the others.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ota_core.frozen import Frozen
from tasks.experiments.preflight.features import MEASURES, Features

CONFIDENCE = 0.9
LEAST, GROUPS = 9, 3
"""Known values, and groups of them, below which nothing is predicted: of fewer no quantile at ``CONFIDENCE`` exists, or none that means anything."""
RIDGE = 1.0
"""Penalty on the squares of standardised coefficients."""
SIGNS = {"reach": 1.0, "disturbance": -1.0, "log_experts": -1.0}
"""The only direction in which a measure may count. Chance, and what goes along with it in the merges that happen to be known, can say the opposite:
a large λ disturbs more and still gains, but an expert that disturbs more does not."""
COLUMNS = (*MEASURES, "log_experts", "refined")

Floats = NDArray[np.float64]


class Point(Frozen):
    """One expert in one merge: what is known of it before."""

    capability: str | None = None
    """``<suite>/<capability>``, by which merges are told apart: some tasks lose more than others, whatever is measured. None for one that is new."""
    refined: bool
    """Whether a row-space regression follows."""
    experts: int
    features: Features


class Example(Point):
    """The same of a merge that was scored."""

    merge: str
    group: str
    """The set of experts."""
    here: bool
    """Of this installation, not shipped with the program."""
    retention: float


@dataclass(frozen=True)
class Interval:
    """A prediction, and where the true value lies with ``CONFIDENCE``."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class _Fit:
    """A ridge regression. What lies beyond all that it has seen counts as the most extreme of that: no line is drawn further than it is known."""

    least: Floats
    most: Floats
    means: Floats
    scales: Floats
    weights: Floats
    intercept: float

    def of(self, x: Floats) -> Floats:
        """x: (n, F); (n,)."""
        found: Floats = (x.clip(self.least, self.most) - self.means) / self.scales @ self.weights + self.intercept
        return found


def _fit(x: Floats, y: Floats, plain: int) -> _Fit:
    """By least squares with a penalty, without what counts against ``SIGNS``. x: (n, F), of which the first ``plain`` columns are measures and the others mark a capability; y: (n,)."""
    means, scales = x.mean(0), x.std(0)
    scales[scales == 0] = 1.0
    scales[plain:] = 1.0
    z = (x - means) / scales
    kept, signs = np.ones(x.shape[1], bool), np.array([SIGNS.get(name, 0.0) for name in COLUMNS])
    while True:
        weights = np.zeros(x.shape[1])
        weights[kept] = np.linalg.solve(
            z[:, kept].T @ z[:, kept] + RIDGE * np.eye(int(kept.sum())), z[:, kept].T @ (y - y.mean())
        )
        against = weights[:plain] * signs
        if against.min() >= 0:
            break
        kept[int(against.argmin())] = False
    return _Fit(x.min(0), x.max(0), means, scales, weights, float(y.mean()))


class Predictor:
    """What is learned from known merges."""

    def __init__(self, examples: Sequence[Example]) -> None:
        """Raises ValueError where ``why_not`` says something."""
        if why := why_not(examples):
            raise ValueError(why)
        self.examples = [*examples]
        self._capabilities = sorted({one.capability for one in examples if one.capability is not None})
        self._x = np.array([self._row(one) for one in examples])
        # What is shipped stands for tasks that nobody here has seen: it is judged as such, though the fit tells its own tasks apart.
        self._asked = np.array([self._row(one if one.here else one.model_copy(update={"capability": None})) for one in examples])
        self._y = np.array([one.retention for one in examples])
        own = judged_by(examples)
        self.judged = [i for i, one in enumerate(examples) if one in own]
        """The examples whose errors make the intervals."""
        self._whole = _fit(self._x, self._y, len(COLUMNS))
        self._without: dict[str, _Fit] = {}
        for group in sorted({examples[i].group for i in self.judged}):
            kept = np.array([one.group != group for one in examples])
            self._without[group] = _fit(self._x[kept], self._y[kept], len(COLUMNS))

    def _row(self, point: Point) -> list[float]:
        plain = [*(point.features[name] for name in MEASURES), math.log(point.experts), float(point.refined)]
        return plain + [float(point.capability == name) for name in self._capabilities]

    def retention(self, point: Point) -> Interval:
        """Of one expert's capability."""
        return self._interval([point], [[i] for i in self.judged])

    def average(self, points: Sequence[Point]) -> Interval:
        """Mean retention of a merge."""
        return self._interval(points, self._merges())

    def _merges(self) -> list[list[int]]:
        """The judged examples by merge."""
        merges = defaultdict(list)
        for i in self.judged:
            merges[self.examples[i].merge].append(i)
        return list(merges.values())

    def _missed(self, members: list[int]) -> float:
        """How far the mean of some examples of one group is from what the fit without that group says."""
        fit = self._without[self.examples[members[0]].group]
        return abs(float(self._y[members].mean() - fit.of(self._asked[members]).mean()))

    def _interval(self, points: Sequence[Point], units: list[list[int]]) -> Interval:
        x = np.array([self._row(point) for point in points])
        ends = []
        for members in units:
            fit = self._without[self.examples[members[0]].group]
            ends.append((float(fit.of(x).mean()), self._missed(members)))
        value, rank = float(self._whole.of(x).mean()), math.ceil(CONFIDENCE * (len(ends) + 1)) - 1
        if rank >= len(ends):  # too few merges for their means; single values may be enough
            return Interval(value, -math.inf, math.inf)
        low = sorted((at - missed for at, missed in ends), reverse=True)[rank]
        high = sorted(at + missed for at, missed in ends)[rank]
        return Interval(value, max(0.0, min(low, value)), max(high, value))

    def change(self, before: Sequence[tuple[Point, float]], after: Sequence[tuple[Point, float]]) -> tuple[float, float]:
        """How much Σ weight · retention changes, and its standard error: of the fit, by the jackknife over groups, and of both merges, by what
        it missed of the means of known ones.

        before, after: points with their weights.
        """

        def under(fit: _Fit) -> float:
            sums = [sum(w * float(fit.of(np.array([self._row(p)]))[0]) for p, w in side) for side in (before, after)]
            return sums[1] - sums[0]

        means = [self._missed(members) for members in self._merges()]
        chance = math.sqrt(sum(sum(w for _, w in side) ** 2 for side in (before, after)) * float(np.mean(np.square(means))))
        return under(self._whole), math.hypot(_jackknife([under(fit) for fit in self._without.values()]), chance)

    @property
    def error(self) -> float:
        """Root mean square of what the fits without a group missed of it."""
        return float(np.sqrt(np.mean(np.square([self._missed([i]) for i in self.judged]))))

    def coefficients(self) -> dict[str, tuple[float, float]]:
        """Measure → change of retention for a change of it by one standard deviation, and its jackknife standard error over groups."""
        return {
            name: (float(self._whole.weights[i]), _jackknife([float(one.weights[i]) for one in self._without.values()]))
            for i, name in enumerate(COLUMNS)
        }


def judged_by(examples: Sequence[Example]) -> list[Example]:
    """Those whose errors tell how far a prediction may be off: this installation's where they are enough, else all."""
    here = [one for one in examples if one.here]
    return here if len(here) >= LEAST and len({one.group for one in here}) >= GROUPS else [*examples]


def why_not(examples: Sequence[Example]) -> str:
    """Why nothing can be predicted; empty where something can."""
    groups = {one.group for one in examples}
    if len(examples) >= LEAST and len(groups) >= GROUPS:
        return ""
    return (
        f"no retention is predicted: {len(examples)} values of {len(groups)} sets of experts are known, at least {LEAST} of {GROUPS} are needed; "
        "every ota run or night with a full report and a benchmark adds some"
    )


def _jackknife(values: Sequence[float]) -> float:
    """Standard error over groups, of what the fits without each of them say."""
    count, mean = len(values), sum(values) / len(values)
    return math.sqrt((count - 1) / count * sum((value - mean) ** 2 for value in values))
