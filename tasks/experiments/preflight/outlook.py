"""What a preflight says of a merge: its pairs, what is predicted of each expert, and which experts hurt. Numbers here, words in ``page``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tasks.experiments.preflight.features import MEASURES, OF_PAIRS, Features, features, names_of
from tasks.experiments.preflight.predict import Example, Interval, Point, Predictor, why_not

if TYPE_CHECKING:
    import pandas as pd

OVERRULED = 1.0
"""Mean interference above which an expert is named by this measure alone: it acts on others' inputs more strongly than their own edits do."""


@dataclass(frozen=True)
class Known:
    """What base and experts score, where that was measured."""

    base: Mapping[str, float]
    """By capability, 0..1."""
    experts: Mapping[str, tuple[str, float]]
    """Expert → its own capability, and its score there."""


@dataclass(frozen=True, kw_only=True)
class Alone:
    """One expert of the merge."""

    name: str
    measured: Features
    retention: Interval | None
    """Of its own capability; None where nothing is predicted."""
    acts: float | None
    """The mean of its interference on the others."""
    others: float | None
    """The mean fit of the others in the merge."""
    others_without: float | None
    """The same in the merge without it."""
    change: tuple[float, float] | None
    """How much the average changes when it is left out, as predicted, and the standard error; 0..1."""
    hurts: str
    """Why it may be better left out, which a merge without it can tell; empty where nothing says so."""

    @property
    def surely(self) -> bool:
        """Whether the reason is beyond the prediction's own error (one-sided, 95 %), or is no prediction."""
        predicted = self.change is not None and self.hurts.startswith("the average")
        return bool(self.hurts) and (not predicted or (self.change is not None and self.change[0] > 1.645 * self.change[1]))


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What is known of a merge before it is made."""

    scale: float | None
    """λ as the row spaces say."""
    refined: bool
    pairs: list[dict[str, Any]]
    """One for each pair of experts: ``expert``, ``other``, and the measures of ``OF_PAIRS``; of ``interference`` the larger of both ways."""
    experts: list[Alone]
    average: Interval | None
    """Mean retention."""
    why_not: str
    """Why nothing is predicted; empty where something is."""
    learned: tuple[int, int, float] | None
    """Values that the prediction learned from, of them this installation's, and its typical error."""
    in_scores: bool
    """Whether changes are of scores; else of retention, as if every expert scored 1 and the base 0."""
    left_out: list[str]

    @property
    def hurting(self) -> list[Alone]:
        """The experts that are better left out, the worst first."""
        named = [one for one in self.experts if one.hurts]
        return sorted(named, key=lambda one: (-(one.change or (0.0, 0.0))[0], -(one.acts or 0.0)))


def outlook(
    table: pd.DataFrame, said: Mapping[str, Any], examples: Sequence[Example], known: Known | None = None,
    capabilities: Mapping[str, str] | None = None,
) -> Outlook:  # fmt: skip
    """From a preflight's table and settings, and the merges that are known.

    capabilities: expert → ``<suite>/<capability>``, as ``Example.capability`` names it. known: scores of base and experts.
    """
    names, refined = names_of(table), bool(said["settings"]["refined"])
    measured, why = features(table), why_not(examples)
    if not why and not all(_complete(own) for own in measured.values()):
        why = "no retention is predicted: the measures that predictions read are those of two experts or more, each of which moved a matrix"
    learned = None if why else Predictor(examples)
    points = {name: _point(name, measured[name], refined, len(names), capabilities) for name in names}
    alone = [_alone(name, table, measured, points, learned, refined, known, capabilities) for name in names]
    scale = table[(table.measure == "lambda") & (table.variant == "auto")].value
    return Outlook(
        scale=float(scale.iloc[0]) if len(scale) else None, refined=refined, pairs=_pairs(table), experts=alone, why_not=why,
        average=learned.average(list(points.values())) if learned else None, in_scores=known is not None, left_out=[*said["left_out"]],
        learned=(len(learned.examples), sum(one.here for one in learned.examples), learned.error) if learned else None,
    )  # fmt: skip


def _complete(own: Features) -> bool:
    return own.keys() >= set(MEASURES)


def _point(name: str, own: Features, refined: bool, experts: int, capabilities: Mapping[str, str] | None) -> Point:
    return Point(capability=(capabilities or {}).get(name), refined=refined, experts=experts, features=own)


def _alone(
    name: str, table: pd.DataFrame, measured: Mapping[str, Features], points: Mapping[str, Point], learned: Predictor | None,
    refined: bool, known: Known | None, capabilities: Mapping[str, str] | None,
) -> Alone:  # fmt: skip
    others = [other for other in points if other != name]
    acting = table[(table.measure == "interference") & (table.other == name)].value.tolist()
    acts = fmean(acting) if acting else None
    fits = {key: [own["fit"] for other, own in found.items() if other != name and "fit" in own] for key, found in (("with", measured), ("without", features(table, name)))}  # fmt: skip
    change = None
    if learned and fits["without"]:
        after = {other: _point(other, own, refined, len(others), capabilities) for other, own in features(table, name).items()}
        if all(_complete(point.features) for point in after.values()):
            change = _change(name, learned, points, after, known)
    return Alone(
        name=name, measured=measured[name], acts=acts, change=change, hurts=_why(name, acts, change, known),
        retention=learned.retention(points[name]) if learned else None,
        others=fmean(fits["with"]) if fits["with"] else None, others_without=fmean(fits["without"]) if fits["without"] else None,
    )  # fmt: skip


def _change(
    name: str, learned: Predictor, before: Mapping[str, Point], after: Mapping[str, Point], known: Known | None
) -> tuple[float, float]:
    """Of the mean over the experts' capabilities: what the others gain, less what the merge keeps of the expert that is left out."""

    def score(expert: str) -> float:
        if known is None:
            return 1.0
        return known.experts[expert][1] if expert in known.experts else 0.0  # what nobody measures is in no average

    def weighed(points: Mapping[str, Point]) -> list[tuple[Point, float]]:
        return [(point, score(expert) / len(before)) for expert, point in points.items()]

    gained, error = learned.change(weighed(before), weighed(after))
    # Without its expert a capability falls back to what the base does.
    floor = known.base.get(known.experts[name][0], 0.0) if known and name in known.experts else 0.0
    return gained + floor / len(before), error


def _why(name: str, acts: float | None, change: tuple[float, float] | None, known: Known | None) -> str:
    if known and name in known.experts and known.experts[name][1] <= known.base.get(known.experts[name][0], 0.0):
        capability, score = known.experts[name]
        return f"it scores {100 * score:.1f} % on {capability}, no more than the base: nothing is lost without it"
    if acts is not None and acts > OVERRULED:
        return f"it acts on the inputs of the others {acts:.1f} times as strongly as their own edits"
    if change is not None and change[0] > 0:
        return f"the average is predicted to rise by {100 * change[0]:.1f} ± {100 * change[1]:.1f} points without it"
    return ""


def _pairs(table: pd.DataFrame) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    names = names_of(table)
    for row in table[table.measure.isin(OF_PAIRS) & table.other.notna()].itertuples():
        one, other = sorted((row.expert, row.other), key=names.index)
        pair = found.setdefault((one, other), {"expert": one, "other": other})
        pair[row.measure] = max(row.value, pair.get(row.measure, row.value))
    return list(found.values())
