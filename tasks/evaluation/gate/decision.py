"""What a gate is told and what it says: its settings, its comparisons, its decision. Frozen values that survive JSON."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ota_core.frozen import Frozen
from tasks.evaluation.tiers import DEVELOPMENT, Tier

Reference = Literal["champion", "base"]


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
    seed: int = Field(0, ge=0, description="Seed of the random sign flips, and of which documents choose and which confirm.")
    several: Literal["held_out", "corrected", "uncorrected"] = Field(
        "held_out",
        description="Of several candidates. held_out: one is chosen on a part of the documents, and must be better than the champion "
        "on the others; corrected: each must be better on all documents, with the test corrected for their number; uncorrected: neither.",
    )
    held_out: float = Field(0.5, gt=0, lt=1, description="Share of the documents that confirm; the others choose.")
    least: int = Field(
        20, ge=2, description="Documents of each capability that either part must hold; with fewer the test is corrected instead."
    )
    margin: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.02,
        description="How much lower a tier may be at most, 0 to 1, shown with this confidence; of every tier but development.",
    )
    margins: dict[Tier, Annotated[float, Field(ge=0, lt=1)]] = Field({}, description="Tier to a margin of its own.")

    def margin_of(self, tier: Tier) -> float | None:
        """None: no margin has to be shown for the tier; no capability may fall below by more than the noise."""
        return self.margins.get(tier, None if tier == DEVELOPMENT else self.margin)

    def said(self) -> dict[str, Any]:
        """What decides, as a night's identity holds it: settings that came later and are not set leave it as it was."""
        later = {"several", "held_out", "least", "margin", "margins"}
        mine = self.model_dump(mode="json")
        return {key: value for key, value in mine.items() if key not in later or value != type(self).model_fields[key].default}

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


class TierCheck(Frozen):
    """A tier of the suite with a margin, against one reference: the candidate has to show that it is not lower by more."""

    tier: Tier
    capabilities: tuple[str, ...]
    reference: Reference
    n: int
    """Documents that both answered and that chose nothing."""
    margin: float
    candidate_score: float
    """Mean over the tier's capabilities, on these documents."""
    reference_score: float
    difference: float
    lower_bound: float
    """What the difference is not below, at the gate's one-sided confidence (``pairs.Paired.lower_bound``)."""

    @property
    def holds(self) -> bool:
        """Whether that is shown."""
        return self.lower_bound >= -self.margin


class Choice(Frozen):
    """One of several candidates: how it was chosen from them, and whether it is better than the reference when that is accounted for."""

    how: Literal["held_out", "corrected"]
    why: str = ""
    """Of a correction in place of documents that were held out: why."""
    averages: dict[str, float]
    """Candidate to its average on the documents that chose."""
    chosen: str | None
    """The candidate with the highest average on them, of those that fell nowhere; None where each was tested."""
    reference: Reference
    choosing: int
    """Documents that chose."""
    confirming: int
    """Documents that the test was made on; the same ones as those that chose where ``how`` is corrected."""
    documents: str
    """Digest of the hashes of those that confirm, 16 hex digits: the split can be made again from the gate's settings."""
    candidate_score: float
    """This candidate's average on the documents of the test."""
    reference_score: float
    difference: float
    standard_error: float
    p_value: float
    """One-sided: how likely a gain at least this large is by chance, if the two are equally good; corrected for the number of candidates
    where ``how`` says so."""
    holds: bool
    """Whether this is the chosen one, or any where each was tested, and the gain is more than the noise."""


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
    tiers: tuple[TierCheck, ...] = ()
    """Of tiers with a margin."""
    choice: Choice | None = None
    """None where there was one candidate, or the gate was told not to account for their number."""

    @property
    def fallen(self) -> tuple[Check, ...]:
        """The comparisons in which a capability falls below by more than the noise."""
        return tuple(check for check in self.checks if check.falls_below)

    @property
    def unshown(self) -> tuple[TierCheck, ...]:
        """The tiers that are not shown to be within their margin."""
        return tuple(tier for tier in self.tiers if not tier.holds)

    @property
    def decisive(self) -> tuple[str, ...]:
        """The reasons that decide; those after them say what else was seen."""
        return self.reasons[: 1 + (self.choice is not None) + len(self.fallen) + len(self.unshown)]

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
        for tier in self.tiers:
            named[f"gate/lower_bound/{tier.reference}/{tier.tier}"] = tier.lower_bound
        if self.choice is not None:
            named |= {"gate/choice/difference": self.choice.difference, "gate/choice/p_value": self.choice.p_value}
        return named
