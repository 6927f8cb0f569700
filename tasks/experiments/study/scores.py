"""What the cells of a study scored, as tidy frames, and what tables need of them: means with standard errors.

A standard error is taken over replicates where there are at least two: standard deviation (n − 1) / √n. With one replicate it is taken
over documents: of scores as if their errors were independent, of differences of losses and of what is recovered document by document.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, NamedTuple

import pandas as pd

from tasks.evaluation.loss_errors import difference_error, recovered_error
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.tiers import deciding
from tasks.experiments.study.cells import Cell, spelled

AVERAGE, RETENTION, BELOW = "average", "retention", "below_base"


class Estimate(NamedTuple):
    """A number and its standard error, NaN where there is none."""

    mean: float
    error: float


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """One cell on one replicate."""

    label: str
    replicate: str
    scores: ModelScores
    merge: str = ""
    """Fingerprint of the merge."""
    bytes_per_param: float = math.nan
    """Of the second moments as the merge read them, mean over its experts; NaN where it reads none."""
    sqrt_error: float = math.nan
    """Relative error of √v, the largest of its experts."""
    chosen: dict[str, float] = field(default_factory=dict)
    """What a tuned cell's search found."""


@dataclass(frozen=True, kw_only=True)
class StudyResults:
    """All scores of a study. Cells that failed on any replicate are in ``failed`` and in no table: they would be means over fewer."""

    name: str
    suite: str
    experts: dict[str, str | None]
    """Expert's name to its own capability."""
    replicates: tuple[str, ...]
    base: dict[str, ModelScores]
    """Replicate to the base's scores."""
    alone: dict[str, dict[str, ModelScores]]
    """Replicate to expert to the scores of the expert itself."""
    cells: tuple[Cell, ...]
    results: tuple[CellResult, ...]
    failed: tuple[str, ...] = ()

    @cached_property
    def capabilities(self) -> tuple[str, ...]:
        """In the suite's order."""
        return tuple(next(iter(self.base.values())).capabilities)

    @cached_property
    def _everyone(self) -> list[ModelScores]:
        alone = [scores for found in self.alone.values() for scores in found.values()]
        return [*self.base.values(), *alone, *(one.scores for one in self.results)]

    @cached_property
    def averaged(self) -> tuple[str, ...]:
        """The capabilities for development that every model was measured on: averages are taken over these."""
        tiers = next(iter(self.base.values())).tiers
        return tuple(
            name
            for name in deciding(self.capabilities, tiers)
            if all(one.by_capability().get(name) is not None for one in self._everyone)
        )

    @cached_property
    def lossy(self) -> tuple[str, ...]:
        """The capabilities that every model has a held-out loss of."""
        return tuple(name for name in self.capabilities if all(name in one.losses for one in self._everyone))

    @cached_property
    def _by_label(self) -> dict[str, list[CellResult]]:
        found: dict[str, list[CellResult]] = {}
        for one in self.results:
            found.setdefault(one.label, []).append(one)
        return found

    def of(self, cell: Cell) -> list[CellResult]:
        """The cell's results, in the order of the replicates."""
        return self._by_label[cell.label]

    @property
    def over(self) -> str:
        """What standard errors are taken over: ``replicates`` or ``documents``."""
        return "replicates" if len(self.replicates) > 1 else "documents"

    def models(self, cell: Cell | None = None, expert: str | None = None) -> list[ModelScores]:
        """The scores of a cell, an expert, or of the base, a replicate each."""
        if cell is not None:
            return [one.scores for one in self.of(cell)]
        return [self.alone[r][expert] if expert else self.base[r] for r in self.replicates]

    def score(self, models: Sequence[ModelScores], *capabilities: str) -> Estimate:
        """The mean of these capabilities' scores, 0..1."""
        return estimate([_mean([_score(one, name) for name in capabilities]) for one in models])

    def average(self, models: Sequence[ModelScores]) -> Estimate:
        """The mean over ``averaged``."""
        return self.score(models, *self.averaged)

    def loss(self, models: Sequence[ModelScores], *capabilities: str) -> Estimate:
        """The mean of these capabilities' losses, bits per byte."""
        return estimate([_mean([_loss(one, name) for name in capabilities]) for one in models])

    def recovered(self, cell: Cell) -> Estimate:
        """Mean over the merged experts' own capabilities of (base − merge) / (base − expert) in losses: which part of the experts' gain is kept,
        of the best expert where several share a capability.

        Without ``unrecoverable``; NaN where nothing is left. Over documents, the three are paired: see ``tasks.evaluation.loss_errors``.
        """
        left_out, values = self.unrecoverable(cell), []
        for one in self.of(cell):
            base, alone = self.base[one.replicate], self.alone[one.replicate]
            own = [(name, alone[e]) for name, e in self._least_loss(one.replicate, cell.experts).items() if name not in left_out]
            parts = [(base.losses[k] - one.scores.losses[k]) / (base.losses[k] - expert.losses[k]) for k, expert in own]
            values.append(
                Estimate(fmean(parts), recovered_error(base, one.scores, own)) if parts else Estimate(math.nan, math.nan)
            )
        return estimate(values)

    def loss_difference(self, cell: Cell, other: Cell, capabilities: Sequence[str]) -> Estimate:
        """The loss of ``cell`` less that of ``other``, mean over these capabilities of ``lossy``; bits per byte.

        Replicate by replicate; over documents, which both read alike, document by document: see ``tasks.evaluation.loss_errors``.
        """
        values = []
        for a, b in zip(self.of(cell), self.of(other), strict=True):
            mean = fmean(a.scores.losses[name] - b.scores.losses[name] for name in capabilities)
            values.append(Estimate(mean, difference_error(a.scores, b.scores, capabilities)))
        return estimate(values)

    def unrecoverable(self, cell: Cell) -> tuple[str, ...]:
        """Capabilities that ``recovered`` leaves out: no merged expert is better than the base on its own text, so there is no gain to keep.

        Those of any replicate are left out on all: means over different capabilities compare to nothing.
        """
        return tuple(name for name in self.lossy if any(self._nothing_gained(name, r, cell.experts) for r in self.replicates))

    def _nothing_gained(self, name: str, replicate: str, experts: Sequence[str]) -> bool:
        best = self._least_loss(replicate, experts).get(name)
        return best is not None and self.alone[replicate][best].losses[name] >= self.base[replicate].losses[name]

    def retention(self, cell: Cell) -> Estimate:
        """Mean over the merged experts' own capabilities of merged / expert (docs/methods.md section 7), the best expert where several share one.

        NaN where no expert has a capability of its own that it scores above 0 on.
        """
        values = []
        for one in self.of(cell):
            own = [
                _ratio(_score(one.scores, name), score)
                for name, score in self._own(one.replicate, cell.experts).items()
                if score.mean > 0
            ]
            values.append(_mean(own))
        return estimate(values)

    def below_base(self, cell: Cell) -> Estimate:
        """On how many capabilities the merge falls below the base. Without a standard error over documents: a count has none."""
        counts = [
            sum(_score(one.scores, name).mean < _score(self.base[one.replicate], name).mean for name in self.averaged)
            for one in self.of(cell)
        ]
        return estimate([Estimate(float(count), math.nan) for count in counts])

    def difference(self, cell: Cell, other: Cell) -> Estimate:
        """The average of ``cell`` less that of ``other``: replicate by replicate, so that what replicates share cancels."""
        pairs = [(self.average([a.scores]), self.average([b.scores])) for a, b in zip(self.of(cell), self.of(other), strict=True)]
        return estimate([Estimate(a.mean - b.mean, math.hypot(a.error, b.error)) for a, b in pairs])

    def _own(self, replicate: str, experts: Sequence[str]) -> dict[str, Estimate]:
        """Own capability to the score of the best of these experts that has it."""
        alone = self.alone[replicate]
        best = self._best_of(experts, self.capabilities, lambda name, own: _score(alone[name], own).mean)
        return {own: _score(alone[name], own) for own, name in best.items()}

    def _least_loss(self, replicate: str, experts: Sequence[str]) -> dict[str, str]:
        """Own capability to that one of these experts with the lowest loss on it, where losses are measured."""
        return self._best_of(experts, self.lossy, lambda name, own: -self.alone[replicate][name].losses[own])

    def _best_of(self, experts: Sequence[str], capabilities: Sequence[str], merit: Callable[[str, str], float]) -> dict[str, str]:
        """Own capability, of these, to the expert that has it with the highest ``merit`` (of name and capability), of equals the first."""
        found: dict[str, str] = {}
        for name in experts:
            own = self.experts[name]
            if own is not None and own in capabilities and merit(name, own) > merit(found.setdefault(own, name), own):
                found[own] = name
        return found

    def tidy(self) -> pd.DataFrame:
        """One capability a row: model, kind (base, expert, merge), replicate, capability, score, stderr (over documents), documents, loss, loss_stderr."""
        models = [("base", "base", r, s) for r, s in self.base.items()]
        models += [(name, "expert", r, s) for r, found in self.alone.items() for name, s in found.items()]
        models += [(one.label, "merge", one.replicate, one.scores) for one in self.results]
        rows = [
            {"model": label, "kind": kind, "replicate": replicate, "capability": name, "score": one.score, "stderr": one.stderr,
             "documents": one.n_samples, "loss": scores.losses.get(name), "loss_stderr": scores.loss_stderr.get(name)}
            for label, kind, replicate, scores in models
            for name, one in scores.capabilities.items()
        ]  # fmt: skip
        return pd.DataFrame(rows).astype(dict.fromkeys(("score", "stderr", "loss", "loss_stderr"), float))

    def settings(self) -> pd.DataFrame:
        """One cell on one replicate a row: every parameter in force, the experts, bytes per parameter and √v error of the second moments."""
        rows: list[dict[str, Any]] = []
        for cell in self.cells:
            for one in self.of(cell):
                cost = {"bytes_per_param": one.bytes_per_param, "sqrt_error": one.sqrt_error}
                rows.append(
                    {"model": cell.label, "replicate": one.replicate, "experts": "+".join(cell.experts)}
                    | cell.settings
                    | one.chosen
                    | cost
                )
        return in_one_type(pd.DataFrame(rows))


def in_one_type(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame as a file of columns takes it."""
    return frame.assign(**{name: spelled(list(frame[name])) for name in frame if frame[name].dtype == object})


def estimate(values: Sequence[Estimate]) -> Estimate:
    """The mean over replicates with its standard error; of one value its own. Values that are NaN make it NaN: means over fewer compare to nothing."""
    if len(values) == 1:
        return values[0]
    means = [value.mean for value in values]
    if any(math.isnan(mean) for mean in means):
        return Estimate(math.nan, math.nan)
    return Estimate(fmean(means), stdev(means) / math.sqrt(len(means)))


def _score(scores: ModelScores, capability: str) -> Estimate:
    found = scores.capabilities[capability]
    return Estimate(*(math.nan if value is None else value for value in (found.score, found.stderr)))


def _loss(scores: ModelScores, capability: str) -> Estimate:
    return Estimate(scores.losses[capability], scores.loss_stderr.get(capability, math.nan))


def _mean(values: Sequence[Estimate]) -> Estimate:
    """The mean of independent numbers."""
    if not values:
        return Estimate(math.nan, math.nan)
    return Estimate(fmean(value.mean for value in values), math.hypot(*(value.error for value in values)) / len(values))


def _ratio(merged: Estimate, expert: Estimate) -> Estimate:
    """merged / expert; its error to first order, as if the two were independent."""
    value = merged.mean / expert.mean
    return Estimate(value, math.hypot(merged.error, value * expert.error) / expert.mean)
