"""The end of a night: which candidate, if any, becomes champion, and the steps that make it so.

``judge`` only reads; ``settle`` writes, in an order that leaves one champion wherever it is interrupted: publish the weights, move the alias,
point ``latest.json``. All of it can be done again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.evaluation.gate import GateDecision, best, decide_all
from tasks.evaluation.kept import read_scores
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.subject import Subject
from tasks.evaluation.suites import Suite
from tasks.pages.gate import others, to_markdown
from tasks.pages.outcome import MergeOutcome
from tasks.pages.report_page import keep_decision, with_decision
from tasks.registry import promotion
from tasks.registry.history import Move
from tasks.registry.nightly import NightlyConfig
from tasks.registry.promotion import Version
from tasks.registry.publish import Latest, publish, publish_champion, read_latest
from tasks.settings import Places
from tasks.tracking.registered import CHAMPION

Score = Callable[[Subject], ModelScores]
BY = "nightly"
STEP: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False, "retries": 2, "retry_delay_seconds": 10}


@dataclass(frozen=True, kw_only=True)
class Night:
    """What was merged tonight."""

    config: NightlyConfig
    suite: Suite
    where: Places
    outcomes: Mapping[str, MergeOutcome]
    """By the candidate's name."""

    @property
    def registry(self) -> dict[str, Any]:
        return {"root": self.where.tracking, "name": self.config.name}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the gate found."""

    decisions: Mapping[str, GateDecision]
    """Of every candidate that is not the champion already."""
    winner: str | None
    """The candidate that becomes champion."""
    challenger: str | None
    """The candidate that is kept as challenger: the chosen one where it was not confirmed, else the best of those that do not become champion."""
    champion: Version | None
    """As the night found it."""
    champion_scores: Mapping[str, ModelScores] = field(default_factory=dict)
    """Name for tables → its scores; empty where it is one of tonight's candidates, or there is none."""
    headline: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Candidates that failed the smoke test and were not benchmarked, and why."""

    @property
    def promoted(self) -> bool:
        return self.winner is not None

    def pages(self, night: Night) -> list[str]:
        """The decisions on the winner and the challenger in Markdown, with the ways to their MLflow runs; of the others, why not."""
        shown = [name for name in (self.winner, self.challenger) if name is not None]
        urls = {name: night.outcomes[name].logged.url for name in self.decisions}
        pages = [to_markdown(self.decisions[name], run_url=urls[name]) for name in shown]
        rest = {name: decision for name, decision in self.decisions.items() if name not in shown}
        return [*pages, *([others(rest, urls)] if rest else [])]


def judge(night: Night, score: Score) -> Verdict:
    """Gate every candidate that passed the smoke test against the champion, scored on the same suite (``score`` does it), and against the base. Raises OtaError.

    Of the candidates that pass, the one with the highest average wins; how their number counts, ``tasks/evaluation/gate/choice.py`` says. A version
    that somebody rolled back is not promoted again.
    """
    champion = promotion.current(CHAMPION, **night.registry)
    refused = {name: one.smoke.said for name, one in night.outcomes.items() if one.smoke and not one.smoke.passed}
    tested = {name: outcome for name, outcome in night.outcomes.items() if name not in refused}
    if not tested:
        stays = f"version {champion.version} stays champion" if champion else "there is still no champion"
        headline = f"{stays}: no candidate passed the smoke test"
        return Verdict(decisions={}, winner=None, challenger=None, champion=champion, headline=headline, refused=refused)
    scores = {name: read_scores(night.where, outcome.scores["merged"]) for name, outcome in tested.items()}
    base = read_scores(night.where, next(iter(tested.values())).scores["base"])
    standing = [name for name, outcome in tested.items() if champion and outcome.digest == champion.digest]
    champion_scores = scores[standing[0]] if standing else score(_subject(night, champion)) if champion else None
    judged = {name: found for name, found in scores.items() if name not in standing}
    rolled_back = {name: back for name in judged if (back := _rolled_back(night, name))}
    judging: dict[str, Any] = {"champion": champion_scores, "base": base, "suite": night.suite, "settings": night.config.gate}
    # What somebody rolled back is no candidate: it is judged by itself, as what it would be by hand.
    decisions = decide_all({name: found for name, found in judged.items() if name not in rolled_back}, **judging)
    for name, back in rolled_back.items():
        decisions |= {name: _withheld(decide_all({name: judged[name]}, **judging)[name], back)}
    decisions = {name: decisions[name] for name in judged}
    passed = {name: scores[name] for name, decision in decisions.items() if decision.promoted}
    winner = best(passed) if passed else None
    decisions = {name: _second(decision, winner) if name != winner else decision for name, decision in decisions.items()}
    rest = {name: scores[name] for name in decisions if name != winner}
    chosen = next((one.choice.chosen for one in decisions.values() if one.choice), None)
    challenger = (chosen if chosen in rest else best(rest)) if rest else None
    verdict = Verdict(
        decisions=decisions, winner=winner, challenger=challenger, champion=champion,
        champion_scores={f"champion v{champion.version}": champion_scores} if champion and champion_scores and not standing else {},
        headline=_headline(winner, challenger, champion, standing, decisions, scores), refused=refused,
    )  # fmt: skip
    return verdict


def _subject(night: Night, champion: Version) -> Subject:
    """The champion as something to score: the published copy, or its artifact."""
    latest = read_latest(night.config.publish, night.config.name) if night.config.publish else None
    published = latest.uri if latest and latest.version == champion.version else None
    return Subject(
        name=f"champion v{champion.version}", role="merge", path=None, digest=champion.digest,
        location=published or champion.source_uri,
    )  # fmt: skip


def _rolled_back(night: Night, name: str) -> Move | None:
    """That somebody took the alias from this candidate, and nobody gave it back."""
    number = night.outcomes[name].logged.model_version
    return promotion.rolled_back(number, **night.registry) if number else None


def _withheld(decision: GateDecision, back: Move) -> GateDecision:
    """The decision, but that what somebody rolled back stays back: by hand it can be promoted again."""
    if not decision.promoted:
        return decision
    reason = (
        f"It would pass, but version {back.from_version} was rolled back by {back.by} on {back.at} ({back.reason}); "
        f"to have it again: ota promote {back.from_version}."
    )
    return decision.model_copy(update={"promoted": False, "reasons": (reason, *decision.reasons)})


def _second(decision: GateDecision, winner: str | None) -> GateDecision:
    """The decision on a candidate that passed, but is not the best that did: there is one champion."""
    if not decision.promoted or winner is None:
        return decision
    reason = f"It passes the gate, but so does {winner}, with an average at least as high."
    return decision.model_copy(update={"promoted": False, "reasons": (reason, *decision.reasons)})


def _headline(
    winner: str | None,
    challenger: str | None,
    champion: Version | None,
    standing: list[str],
    decisions: Mapping[str, GateDecision],
    scores: Mapping[str, ModelScores],
) -> str:
    if winner:
        before = f", in place of version {champion.version}" if champion else ", the first one"
        return f"{winner} is the new champion{before}: average {100 * decisions[winner].average:.1f} %"
    stays = f"version {champion.version} stays champion" if champion else "there is still no champion"
    if challenger is None:
        return f"{stays}: it is tonight's {standing[0]}, average {100 * (scores[standing[0]].average or 0):.1f} %"
    return f"{stays}; {challenger} is the challenger: {' '.join(decisions[challenger].decisive)}"


def settle(night: Night, verdict: Verdict) -> None:
    """Log the decisions, publish and promote the winner or name the challenger, and have ``latest.json`` name the champion. Raises OtaError."""
    for name, decision in verdict.decisions.items():
        log_decision(night, name, decision)
    if verdict.winner:
        promote(night, verdict.winner, verdict.decisions[verdict.winner])
    if verdict.challenger:
        number = night.outcomes[verdict.challenger].logged.model_version
        if number:
            promotion.reject(number, verdict.decisions[verdict.challenger], **night.registry)
    keep_published(night.config, night.where)


@task(name="log decision", task_run_name="log the gate's decision on {name}", **STEP)
def log_decision(night: Night, name: str, decision: GateDecision) -> None:
    """The gate's numbers, in the candidate's MLflow run, and the decision in its report."""
    outcome = night.outcomes[name]
    keep_decision(outcome.merged, decision, night.where)
    report = with_decision(outcome.page, decision, night.where) if outcome.page else None
    promotion.log_decision(outcome.logged.run_id, decision, report=report, root=night.where.tracking)


@task(name="promote", task_run_name="publish and promote {name}", **STEP)
def promote(night: Night, name: str, decision: GateDecision) -> None:
    """Publish the weights, then move the alias: who follows the alias finds them."""
    outcome = night.outcomes[name]
    version = outcome.logged.model_version
    assert version is not None  # what is logged is registered
    if night.config.publish:
        publish(
            outcome.merged.uri, root=night.config.publish, name=night.config.name, version=version, cache=night.where.cache
        )  # fmt: skip
    promotion.promote(version, by=BY, reason=" ".join(decision.reasons), decision=decision, **night.registry)


@task(name="publish", task_run_name="point latest.json at the champion", **STEP)
def point_latest(config: NightlyConfig, where: Places) -> Latest:
    """Publish the champion unless it is, and have ``latest.json`` name it."""
    assert config.publish is not None
    return publish_champion(config.publish, cache=where.cache, tracking=where.tracking, name=config.name)


def keep_published(config: NightlyConfig, where: Places) -> None:
    """What is published follows the champion, also where somebody promoted by hand or an earlier night ended early. Raises OtaError."""
    if config.publish and promotion.current(CHAMPION, root=where.tracking, name=config.name):
        point_latest(config, where)
