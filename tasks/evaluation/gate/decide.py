"""The promotion gate: is a candidate better than the champion, and nowhere worse than champion or base beyond the noise?

Pure: scores in, a decision out. ``tasks/evaluation/pairs.py`` judges the noise, ``tasks/registry/promotion.py`` moves the aliases.
"""

from collections.abc import Iterator, Mapping, Sequence

from ota_core.errors import raise_all
from tasks.evaluation.gate.decision import (
    Check,
    Choice,
    GateDecision,
    GateSettings,
    Reference,
    TierCheck,
)
from tasks.evaluation.pairs import Documents, GateError, paired, sign_flips
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import Suite
from tasks.evaluation.tiers import DEVELOPMENT, TIERS

ROUNDING = 1e-9
"""Sums over the same numbers in another order differ by less; half a document of a million is more."""


def decide(
    name: str, candidate: ModelScores, *, champion: ModelScores | None, base: ModelScores, suite: Suite,
    settings: GateSettings | None = None, choice: Choice | None = None, confirming: Documents | None = None,
) -> GateDecision:  # fmt: skip
    """Whether the candidate becomes the champion.

    It does when its average over the capabilities is higher than the champion's (without a champion: than the base's), no
    capability falls below champion or base by more than the noise, and each tier with a margin is shown not to be lower by more than that.
    Of several candidates ``choice`` has to hold as well (``tasks/evaluation/gate/choice.py``), and margins are shown on the ``confirming``
    documents, which chose nothing. ``suite`` gives the weights of tasks; that they and the samples give the reported scores is checked.
    The result depends on the scores alone, not on the order of documents.

    With k capabilities there are up to 2k comparisons, each at the stated confidence, so that a candidate equal to its
    references is refused more often than 1 − confidence.

    Raises GateError, with all problems, for scores that do not compare: another suite or limit, other documents, a capability
    measured on one side only, fewer than two documents, a score that is no weighted mean over documents.
    """
    settings = settings or GateSettings()
    references = comparable(name, candidate, champion, base)
    assert candidate.average is not None and base.average is not None  # comparable has looked
    checks = compared(candidate, references, suite, settings)
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
        tiers=tuple(_tier_checks(candidate, references, suite, settings, confirming)),
        choice=choice,
    )
    better = decision.average_difference > ROUNDING
    promoted = better and not decision.fallen and not decision.unshown and (choice is None or choice.holds)
    left_out = [c for c in candidate.capabilities if c not in candidate.measured]
    return decision.model_copy(update={"promoted": promoted, "reasons": tuple(_reasons(decision, better, left_out))})


def comparable(
    name: str, candidate: ModelScores, champion: ModelScores | None, base: ModelScores
) -> dict[Reference, ModelScores]:
    """What the candidate is compared with, once that is known to make sense. Raises GateError."""
    references: dict[Reference, ModelScores] = {"champion": champion} if champion is not None else {}
    references["base"] = base
    raise_all([p for label, scores in references.items() for p in _mismatches(name, candidate, label, scores)], GateError)
    if candidate.average is None:
        raise GateError(f"no capability of suite {candidate.suite} was measured for '{name}'; benchmark it, then decide")
    return references


def compared(
    candidate: ModelScores, references: Mapping[Reference, ModelScores], suite: Suite, settings: GateSettings,
    documents: Documents | None = None,
) -> list[Check]:  # fmt: skip
    """Every capability against every reference, on all documents or some. Raises GateError with the problems of all."""
    checks: list[Check] = []
    problems: list[str] = []
    for capability in candidate.measured:
        margin = settings.margin_of(suite.tiers.get(capability, DEVELOPMENT)) or 0.0
        for label, scores in references.items():
            try:
                found = paired(suite, [capability], label, candidate, scores, documents)
            except GateError as error:
                problems += error.problems
                continue
            if documents is None:  # as the table of scores has them
                mine, theirs = (one.capabilities[capability].score or 0.0 for one in (candidate, scores))
            else:
                mine, theirs = found.means
            p_value = sign_flips(found.parts, resamples=settings.resamples, seed=settings.seed)
            falls = mine < theirs - margin and p_value <= 1 - settings.confidence
            checks.append(Check(
                capability=capability, reference=label, n=found.n, candidate_score=mine, reference_score=theirs,
                difference=mine - theirs, standard_error=found.error, p_value=p_value, falls_below=falls,
            ))  # fmt: skip
    raise_all(list(dict.fromkeys(problems)), GateError)
    return checks


def check_margins(settings: GateSettings, suite: Suite) -> None:
    """Raises GateError for margins of tiers that the suite does not have."""
    known = [tier for tier in TIERS if any(suite.tiers.get(name, DEVELOPMENT) == tier for name in suite.capabilities)]
    unknown = [tier for tier in settings.margins if tier not in known]
    if unknown:
        raise GateError(f"gate.margins names {', '.join(unknown)}, but suite {suite.name} has the tiers {', '.join(known)}")


def _tier_checks(
    candidate: ModelScores, references: Mapping[Reference, ModelScores], suite: Suite, settings: GateSettings,
    confirming: Documents | None,
) -> Iterator[TierCheck]:  # fmt: skip
    """Every tier with a margin against every reference, on documents that chose nothing. Raises GateError."""
    check_margins(settings, suite)
    of = {name: suite.tiers.get(name, DEVELOPMENT) for name in candidate.measured}
    for tier in dict.fromkeys(of.values()):
        margin = settings.margin_of(tier)
        if margin is None:
            continue
        members = [name for name in of if of[name] == tier]
        for label, scores in references.items():
            found = paired(suite, members, label, candidate, scores, confirming)
            mine, theirs = found.means
            yield TierCheck(
                tier=tier, capabilities=tuple(members), reference=label, n=found.n, margin=margin, candidate_score=mine,
                reference_score=theirs, difference=mine - theirs, lower_bound=found.lower_bound(settings.confidence),
            )  # fmt: skip


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
    return next(name for name, average in measured.items() if average >= highest - ROUNDING)


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


def _reasons(decision: GateDecision, better: bool, left_out: Sequence[str]) -> Iterator[str]:
    """Why, in sentences: first what decides."""
    champion = decision.champion_average
    who, other = ("base", decision.base_average) if champion is None else ("champion", champion)
    verb = "is higher than" if better else "is not higher than"
    none_yet = "There is no champion yet. " if champion is None else ""
    yield (
        f"{none_yet}The average, {_percent(decision.average)}, {verb} the {who}'s, {_percent(other)} "
        f"({_points(decision.average_difference)} points)."
    )
    if decision.choice:
        yield _of_several(decision.candidate, decision.choice)
    for check in decision.fallen:
        yield (
            f"{check.capability} falls below the {check.reference}: {_percent(check.candidate_score)} against "
            f"{_percent(check.reference_score)} on the same {check.n:,} documents ({_points(check.difference)} ± "
            f"{100 * check.standard_error:.2f} points, p = {_p(check.p_value)})."
        )
    for tier in decision.unshown:
        yield (
            f"It is not shown that {tier.tier} is no more than {100 * tier.margin:g} points below the {tier.reference}: "
            f"{_points(tier.difference)} points on {tier.n:,} documents, and at {100 * decision.confidence:g} % confidence not below "
            f"{_points(tier.lower_bound)}; more documents tell more, gate.margins sets another margin."
        )
    if not decision.fallen:
        lowest = min(decision.checks, key=lambda check: (check.p_value, check.difference))
        against = "the base" if champion is None else "champion or base"
        yield (
            f"No capability falls below {against} by more than the noise; nearest to it is {lowest.capability} against the "
            f"{lowest.reference} ({_points(lowest.difference)} points, p = {_p(lowest.p_value)}). {decision.test}."
        )
    for tier in decision.tiers:
        if tier.holds:
            yield (
                f"{tier.tier} is no more than {100 * tier.margin:g} points below the {tier.reference}: {_points(tier.difference)} points on "
                f"{tier.n:,} documents, and at {100 * decision.confidence:g} % confidence not below {_points(tier.lower_bound)}."
            )
    if left_out:
        yield f"Not measured, hence not compared: {', '.join(left_out)}."


def _of_several(name: str, choice: Choice) -> str:
    """What the number of candidates means for this one."""
    count = len(choice.averages)
    gain = f"{_points(choice.difference)} ± {100 * choice.standard_error:.2f} points to the {choice.reference}, p = {_p(choice.p_value)}"
    if choice.how == "corrected":
        noise = "more than the noise" if choice.holds else "not more than the noise"
        return (
            f"Its gain is {noise} where the best of {count} candidates is looked for: {gain}, corrected for their number (max-T), on the "
            f"same {choice.confirming:,} documents that they are compared on.{f' {choice.why}' if choice.why else ''}"
        )
    if name != choice.chosen and choice.chosen is not None:
        ahead, own = choice.averages[choice.chosen], choice.averages[name]
        fell = ", but fell on a capability" if own > ahead + ROUNDING else ""
        return (
            f"Of {count} candidates {choice.chosen} was chosen: on the {choice.choosing:,} documents that choose it has "
            f"{_percent(ahead)}, this one {_percent(own)}{fell}."
        )
    told = "which confirms it" if choice.holds else "which does not confirm it"
    return (
        f"It was chosen from {count} candidates on {choice.choosing:,} documents; on the {choice.confirming:,} that chose nothing its "
        f"average is {_percent(choice.candidate_score)} ({gain}), {told}."
    )


def _percent(score: float) -> str:
    return f"{100 * score:.1f} %"


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f}".replace("-", "−")


def _p(value: float) -> str:
    return f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
