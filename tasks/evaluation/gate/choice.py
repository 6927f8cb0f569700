"""Of several candidates the best, without taking luck for merit.

The best of six looks better than it is: among six equal ones one is ahead by chance. So one part of the documents chooses, and the chosen
candidate alone has to be better on the other part, which chose nothing: one test, that nothing has to correct. Where there are too few
documents for two parts, each candidate is tested on all of them, with p-values corrected for their number (``pairs.max_t``).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.evaluation.gate.decide import ROUNDING, best, comparable, compared, decide
from tasks.evaluation.gate.decision import Choice, GateDecision, GateSettings, Reference
from tasks.evaluation.pairs import Documents, Paired, max_t, paired, sign_flips
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import Suite
from tasks.evaluation.tiers import Tier, deciding


@dataclass(frozen=True)
class Split:
    """Which documents choose. The same document is always on the same side, whatever the model, task and order.

    Only the tier ``development`` chooses: the documents of the other tiers all confirm.
    """

    settings: GateSettings
    tiers: Mapping[str, Tier]
    """Capability to its tier, of those that are not for development."""

    def chooses(self, capability: str, document: str) -> bool:
        return self.develops(capability) and not self._held_out(document)

    def confirms(self, capability: str, document: str) -> bool:
        return not self.chooses(capability, document)

    def develops(self, capability: str) -> bool:
        return capability not in self.tiers

    def _held_out(self, document: str) -> bool:
        """By the document's hash; one that comes again (``…#2``) goes with the first."""
        text = f"{self.settings.seed} {document.partition('#')[0]}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64 < self.settings.held_out

    def why_not(self, scores: ModelScores) -> str:
        """Why these documents are too few for two parts; empty where they are enough."""
        if not any(map(self.develops, scores.measured)):
            return "No documents are held out, because no capability is of the tier development, which chooses."
        for capability in filter(self.develops, scores.measured):
            counts = [
                (sum(self._held_out(one) for one in documents), len(documents))
                for documents in scores.samples[capability].values()
            ]
            held, total = sum(held for held, _ in counts), sum(n for _, n in counts)
            if min(held, total - held) < self.settings.least or min(min(held, n - held) for held, n in counts) < 2:
                return (
                    f"No documents are held out, because there are too few: of the {total:,} of {capability} {total - held:,} would choose and "
                    f"{held:,} confirm, and either part needs {self.settings.least} (gate.least), two of each task."
                )
        return ""


def decide_all(
    candidates: Mapping[str, ModelScores], *, champion: ModelScores | None, base: ModelScores, suite: Suite,
    settings: GateSettings | None = None,
) -> dict[str, GateDecision]:  # fmt: skip
    """What the gate decides of each candidate, their number taken into account as ``settings.several`` says. Raises GateError."""
    settings = settings or GateSettings()
    found = [comparable(name, scores, champion, base) for name, scores in candidates.items()]
    choices: Mapping[str, Choice] = {}
    split = Split(settings, suite.tiers)
    if len(candidates) > 1 and settings.several != "uncorrected":
        why = "" if settings.several == "corrected" else split.why_not(base)
        held_out = settings.several == "held_out" and not why
        choices = dict(
            _held_out(candidates, found[0], suite, split) if held_out else _corrected(candidates, found[0], suite, settings, why)
        )
    confirming = split.confirms if any(one.how == "held_out" for one in choices.values()) else None
    return {
        name: decide(
            name, scores, champion=champion, base=base, suite=suite, settings=settings, choice=choices.get(name), confirming=confirming,
        )
        for name, scores in candidates.items()
    }  # fmt: skip


def choosing_documents(scores: ModelScores, suite: Suite, settings: GateSettings) -> Documents | None:
    """The documents that anything may be chosen by before the gate decides; None for all of them, where none are held out."""
    split = Split(settings, suite.tiers)
    return None if settings.several != "held_out" or split.why_not(scores) else split.chooses


def first_choice(candidates: Mapping[str, ModelScores], suite: Suite, settings: GateSettings) -> str:
    """The candidate with the highest average on the documents that choose; of equal ones the first listed. Raises GateError as ``best``."""
    first = best(candidates)
    documents = choosing_documents(candidates[first], suite, settings)
    if documents is None:
        return first
    averages = {
        name: paired(suite, deciding(scores.measured, scores.tiers), name, scores, scores, documents).means[0]
        for name, scores in candidates.items()
    }
    highest = max(averages.values())
    return next(name for name, average in averages.items() if average >= highest - ROUNDING)


_References = Mapping[Reference, ModelScores]


def _held_out(
    candidates: Mapping[str, ModelScores], references: _References, suite: Suite, split: Split
) -> Iterator[tuple[str, Choice]]:
    """Chosen on one part, the one with the highest average of those that fall nowhere there; tested on the other."""
    settings = split.settings
    label, reference = next(iter(references.items()))
    choosing, falls = dict[str, Paired](), dict[str, bool]()
    for name, scores in candidates.items():
        developed = _only(scores, split)
        choosing[name] = paired(suite, developed.measured, label, scores, reference, split.chooses)
        checks = compared(developed, references, suite, settings, split.chooses)
        falls[name] = any(check.falls_below for check in checks)
    averages = {name: found.means[0] for name, found in choosing.items()}
    standing = [name for name in candidates if not falls[name]] or list(candidates)
    highest = max(averages[name] for name in standing)
    chosen = next(name for name in standing if averages[name] >= highest - ROUNDING)
    for name, scores in candidates.items():
        found = paired(suite, _only(scores, split).measured, label, scores, reference, split.confirms)
        p_value = sign_flips(-found.parts, resamples=settings.resamples, seed=settings.seed)
        holds = name == chosen and p_value <= 1 - settings.confidence
        yield name, _choice(
            found, "held_out", averages=averages, chosen=chosen, reference=label, choosing=choosing[name].n,
            documents=_digest(scores, _only(scores, split).measured, split.confirms), p_value=p_value, holds=holds,
        )  # fmt: skip


def _corrected(
    candidates: Mapping[str, ModelScores], references: _References, suite: Suite, settings: GateSettings, why: str
) -> Iterator[tuple[str, Choice]]:
    """Each tested on all documents, with the p-values corrected for their number."""
    label, reference = next(iter(references.items()))
    averaged = deciding(reference.measured, reference.tiers)
    found = {name: paired(suite, averaged, label, scores, reference) for name, scores in candidates.items()}
    p_values = max_t(np.array([one.parts for one in found.values()]), resamples=settings.resamples, seed=settings.seed)
    averages = {name: one.means[0] for name, one in found.items()}
    for (name, one), p_value in zip(found.items(), p_values.tolist(), strict=True):
        yield name, _choice(
            one, "corrected", why=why, averages=averages, chosen=None, reference=label, choosing=one.n,
            documents=_digest(reference, averaged, lambda *_: True), p_value=p_value, holds=p_value <= 1 - settings.confidence,
        )  # fmt: skip


def _choice(found: Paired, how: str, **more: object) -> Choice:
    mine, theirs = found.means
    numbers = {"candidate_score": mine, "reference_score": theirs, "difference": mine - theirs, "standard_error": found.error}
    return Choice.model_validate({"how": how, "confirming": found.n, **numbers, **more})


def _only(scores: ModelScores, split: Split) -> ModelScores:
    """The capabilities that choose."""
    kept = {name: one for name, one in scores.capabilities.items() if split.develops(name)}
    return scores.model_copy(update={"capabilities": kept})


def _digest(scores: ModelScores, capabilities: Sequence[str], counts: Documents) -> str:
    """Of the documents that a test is made on, 16 hex digits."""
    lines = sorted(
        f"{capability} {task} {document}" for capability in capabilities for task, documents in scores.samples[capability].items()
        for document in documents if counts(capability, document)
    )  # fmt: skip
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
