"""The promotion gate: is a candidate better than the champion, and nowhere worse than champion or base beyond the noise?

Pure: scores in, a decision out. ``tasks/evaluation/pairs.py`` judges the noise, ``tasks/registry/promotion.py`` moves the aliases.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from ota_core.errors import raise_all
from ota_core.frozen import Frozen
from tasks.evaluation.pairs import GateError, differences, sign_flips
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import Suite

__all__ = ["Check", "GateDecision", "GateError", "GateSettings", "best", "decide"]

Reference = Literal["champion", "base"]

# Sums over the same numbers in another order differ by less; half a document of a million is more.
_ROUNDING = 1e-9


class GateSettings(Frozen):
    """How sure the gate must be before it calls a fall real."""

    confidence: float = Field(
        0.95,
        gt=0.5,
        lt=1,
        description="One-sided confidence of each comparison: a fall counts when its p-value is at most 1 − this.",
    )
    resamples: int = Field(
        9999, ge=1, description="Random sign flips for each comparison; all of them where that is fewer (13 differing documents)."
    )
    seed: int = Field(0, ge=0, description="Seed of the random sign flips.")

    @model_validator(mode="after")
    def _enough(self) -> Self:
        # The smallest p-value that can come out is 1 / (resamples + 1).
        if (self.resamples + 1) * (1 - self.confidence) < 1:
            least = math.ceil(1 / (1 - self.confidence)) - 1
            raise ValueError(
                f"resamples {self.resamples} can never show a fall at confidence {self.confidence}; give at least {least}"
            )
        return self


class Check(Frozen):
    """One capability of the candidate against one reference."""

    capability: str
    reference: Reference
    n: int
    """Documents that both answered."""
    candidate_score: float
    reference_score: float
    difference: float
    """Candidate minus reference, 0…1 like the scores."""
    standard_error: float
    """Of ``difference``, over documents as pairs, within each task."""
    p_value: float
    """One-sided: how likely a fall at least this large is by chance, if the two are equally good."""
    falls_below: bool
    """Whether the candidate is lower by more than the noise."""


class GateDecision(Frozen):
    """What the gate decided, and every number that it decided by."""

    candidate: str
    promoted: bool
    """True: to be the champion. False: the challenger."""
    reasons: tuple[str, ...]
    """Plain sentences, each with its numbers; of a promotion as well."""
    average: float
    champion_average: float | None
    """None: there was no champion, the base's average was to be beaten."""
    base_average: float
    suite: str
    suite_digest: str
    confidence: float
    checks: tuple[Check, ...]

    @property
    def average_difference(self) -> float:
        """The candidate's average minus the one to be beaten."""
        return self.average - (self.base_average if self.champion_average is None else self.champion_average)

    @property
    def test(self) -> str:
        """How each comparison was tested."""
        return f"Paired sign-flip test, one-sided, {100 * self.confidence:g} % confidence in each comparison"

    def metrics(self) -> dict[str, float]:
        """The numbers to log: ``gate/promoted``, ``gate/difference/<reference>/<capability>`` and so on."""
        named = {"gate/promoted": float(self.promoted), "gate/average_difference": self.average_difference}
        for check in self.checks:
            named[f"gate/difference/{check.reference}/{check.capability}"] = check.difference
            named[f"gate/p_value/{check.reference}/{check.capability}"] = check.p_value
        return named


def decide(
    name: str,
    candidate: ModelScores,
    *,
    champion: ModelScores | None,
    base: ModelScores,
    suite: Suite,
    settings: GateSettings | None = None,
) -> GateDecision:
    """Whether the candidate becomes the champion.

    It does when its average over the capabilities is higher than the champion's (without a champion: than the base's) and no
    capability falls below champion or base by more than the noise. ``suite`` gives the weights of tasks; that they and the
    samples give the reported scores is checked. The result depends on the scores alone, not on the order of documents.

    With k capabilities there are up to 2k comparisons, each at the stated confidence, so that a candidate equal to its
    references is refused more often than 1 − confidence.

    Raises GateError, with all problems, for scores that do not compare: another suite or limit, other documents, a capability
    measured on one side only, fewer than two documents, a score that is no weighted mean over documents.
    """
    settings = settings or GateSettings()
    references: dict[Reference, ModelScores] = {"champion": champion} if champion is not None else {}
    references["base"] = base
    raise_all([p for label, scores in references.items() for p in _mismatches(name, candidate, label, scores)], GateError)
    if candidate.average is None or base.average is None:
        raise GateError(f"no capability of suite {candidate.suite} was measured for '{name}'; benchmark it, then decide")

    checks: list[Check] = []
    problems: list[str] = []
    for capability in candidate.measured:
        for label, scores in references.items():
            try:
                checks.append(_check(suite, capability, label, candidate, scores, settings))
            except GateError as error:
                problems += error.problems
    raise_all(list(dict.fromkeys(problems)), GateError)

    decision = GateDecision(
        candidate=name,
        promoted=False,
        reasons=(),
        average=candidate.average,
        champion_average=champion.average if champion is not None else None,
        base_average=base.average,
        suite=candidate.suite,
        suite_digest=candidate.suite_digest,
        confidence=settings.confidence,
        checks=tuple(checks),
    )
    better = decision.average_difference > _ROUNDING
    promoted = better and not any(check.falls_below for check in checks)
    left_out = [c for c in candidate.capabilities if c not in candidate.measured]
    return decision.model_copy(update={"promoted": promoted, "reasons": tuple(_reasons(decision, better, left_out))})


def best(candidates: Mapping[str, ModelScores]) -> str:
    """The candidate with the highest average; of equal ones the first listed. Raises GateError for none, and for averages that do not compare."""
    if not candidates:
        raise GateError("there is no candidate to choose from; list at least one merge")
    first, *others = candidates
    raise_all([p for other in others for p in _mismatches(first, candidates[first], other, candidates[other])], GateError)
    averages = {name: scores.average for name, scores in candidates.items()}
    measured = {name: average for name, average in averages.items() if average is not None}
    if not measured:
        raise GateError(f"no capability was measured for {', '.join(candidates)}; benchmark them, then choose")
    highest = max(measured.values())
    return next(name for name, average in measured.items() if average >= highest - _ROUNDING)


def _mismatches(name: str, scores: ModelScores, other: str, reference: ModelScores) -> Iterator[str]:
    """Why averages and documents of two models do not compare."""
    again = f"benchmark both on the same suite, then compare '{name}' with {other} again"
    if scores.suite_digest != reference.suite_digest:
        yield (
            f"'{name}' was scored on suite {scores.suite} ({scores.suite_digest[:12]}, lm-eval {scores.lm_eval_version}), "
            f"{other} on {reference.suite} ({reference.suite_digest[:12]}, lm-eval {reference.lm_eval_version}); {again}"
        )
    if scores.limit != reference.limit:
        yield f"'{name}' was scored with limit {scores.limit}, {other} with limit {reference.limit}; {again}"
    for capability in dict.fromkeys([*scores.measured, *reference.measured]):
        if capability not in scores.measured:
            yield f"{capability} was measured for {other}, but not for '{name}'; {again}"
        elif capability not in reference.measured:
            yield f"{capability} was measured for '{name}', but not for {other}; {again}"


def _check(
    suite: Suite, capability: str, label: Reference, candidate: ModelScores, reference: ModelScores, settings: GateSettings
) -> Check:
    """Compare one capability over its documents. Raises GateError."""
    mine, theirs = (scores.capabilities[capability].score for scores in (candidate, reference))
    assert mine is not None and theirs is not None  # _mismatches has looked
    parts, error = differences(suite, [capability], label, candidate, reference)
    p_value = sign_flips(parts, resamples=settings.resamples, seed=settings.seed)
    return Check(
        capability=capability,
        reference=label,
        n=len(parts),
        candidate_score=mine,
        reference_score=theirs,
        difference=mine - theirs,
        standard_error=error,
        p_value=p_value,
        falls_below=mine < theirs and p_value <= 1 - settings.confidence,
    )


def _reasons(decision: GateDecision, better: bool, left_out: Sequence[str]) -> Iterator[str]:
    """Why, in sentences."""
    champion = decision.champion_average
    who, other = ("base", decision.base_average) if champion is None else ("champion", champion)
    verb = "is higher than" if better else "is not higher than"
    none_yet = "There is no champion yet. " if champion is None else ""
    yield (
        f"{none_yet}The average, {_percent(decision.average)}, {verb} the {who}'s, {_percent(other)} "
        f"({_points(decision.average_difference)} points)."
    )
    fallen = [check for check in decision.checks if check.falls_below]
    for check in fallen:
        yield (
            f"{check.capability} falls below the {check.reference}: {_percent(check.candidate_score)} against "
            f"{_percent(check.reference_score)} on the same {check.n:,} documents ({_points(check.difference)} ± "
            f"{100 * check.standard_error:.2f} points, p = {_p(check.p_value)})."
        )
    if not fallen:
        lowest = min(decision.checks, key=lambda check: (check.p_value, check.difference))
        against = "the base" if champion is None else "champion or base"
        yield (
            f"No capability falls below {against} by more than the noise; nearest to it is {lowest.capability} against the "
            f"{lowest.reference} ({_points(lowest.difference)} points, p = {_p(lowest.p_value)}). {decision.test}."
        )
    if left_out:
        yield f"Not measured, hence not compared: {', '.join(left_out)}."


def _percent(score: float) -> str:
    return f"{100 * score:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}".replace("-", "−")


def _p(value: float) -> str:
    return f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
