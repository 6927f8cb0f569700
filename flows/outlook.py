"""Will tonight's experts merge? What preflights say of every candidate before it is merged, and the merges without an expert that they expect to hurt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from prefect.logging import get_run_logger

from ota_core.artifact import ArtifactRef
from ota_core.errors import OtaError
from ota_core.recipe.recipe import MergeRecipe
from tasks.analyse import preflight_job
from tasks.artifacts.store import store_of
from tasks.evaluation.gate import first_choice
from tasks.evaluation.kept import read_all, read_scores
from tasks.evaluation.scores import ModelScores, retention
from tasks.evaluation.suites import Suite
from tasks.experiments.preflight import page
from tasks.experiments.preflight.history import examples, known_of, shipped
from tasks.experiments.preflight.outlook import Outlook, outlook
from tasks.experiments.preflight.predict import Example
from tasks.job import estimates, fetch_models, run_here
from tasks.merging.sources import planned
from tasks.orchestration.executors import executor_of, gpu_deployment
from tasks.pages import markdown
from tasks.pages.analysis import read_settings, read_tables
from tasks.pages.outcome import MergeOutcome
from tasks.registry.leave_out import Trial, trials_table, try_without
from tasks.registry.nightly import NightlyConfig
from tasks.settings import Places
from tasks.tracking.store import resolve_store

Merge = Callable[[MergeRecipe, bool], MergeOutcome]
"""A recipe, and whether the merged model gains a version in the registry. Raises OtaError."""


@dataclass
class Ahead:
    """What was known of tonight's candidates before they were merged, and what was tried of it."""

    config: NightlyConfig
    suite: Suite
    where: Places
    measured: dict[str, ArtifactRef] = field(default_factory=dict)
    """Candidate → its preflight."""
    known: list[Example] = field(default_factory=list)
    """The merges of the nights before."""
    trials: dict[str, list[Trial]] = field(default_factory=dict)
    """Merge → what leaving out one of its experts changed."""

    def outlook(self, name: str, outcome: MergeOutcome) -> Outlook:
        """Of one candidate: predicted from what was known before the night, weighed by what its experts score."""
        folder = store_of(self.where).local_path(self.measured[name])
        found = read_all(self.where, outcome.scores)
        base, experts = (
            _measured(found["base"]),
            {key.removeprefix("expert/"): one for key, one in found.items() if key.startswith("expert/")},
        )
        known, capabilities = known_of(
            found["merged"].suite, base, {key: (outcome.capabilities.get(key), _measured(one)) for key, one in experts.items()}
        )
        return outlook(read_tables(folder), read_settings(folder), self.known, known, capabilities)

    def _came_out(self, outcome: MergeOutcome) -> dict[str, float]:
        """Expert → retention of its own capability."""
        found = read_all(self.where, outcome.scores)
        experts = {key.removeprefix("expert/"): one for key, one in found.items() if key.startswith("expert/")}
        own = {name: (outcome.capabilities.get(name) or name, scores) for name, scores in experts.items()}
        kept = retention(found["merged"], own)
        return {name: kept[capability] for name, (capability, _) in own.items() if capability in kept}

    def pages(self, outcomes: Mapping[str, MergeOutcome]) -> list[str]:
        """The sections of the night's page, in Markdown."""
        lines = [
            page.to_markdown(self.outlook(name, outcomes[name]), name, self._came_out(outcomes[name]))
            for name in self.measured
            if _scored(outcomes, name)
        ]
        for name, trials in self.trials.items():
            lines += [f"## {markdown.cell(name)} without one expert", "", markdown.captioned(trials_table(trials))]
        return lines


def look_ahead(config: NightlyConfig, suite: Suite, recipes: Mapping[str, MergeRecipe], where: Places) -> Ahead:
    """In a flow: preflights of these candidates. One that cannot be made is told in the log, and does not end the night."""
    ahead = Ahead(config, suite, where)
    if config.report != "full" and config.leave_out == "never":
        return ahead
    for name, recipe in recipes.items():
        try:
            fetched = fetch_models(recipe, None, where)
            estimated, _ = estimates(recipe, fetched, where, None, executor_of(gpu_deployment(), config.device))
            plan = planned(recipe, fetched, where, memory=config.memory, estimated=estimated)
            ahead.measured[name] = run_here(preflight_job(plan), where)
        except OtaError as error:
            get_run_logger().warning("nothing is known of candidate %s before it is merged: %s", name, error)
    try:
        ahead.known = examples(resolve_store(root=where.tracking))
    except OtaError as error:
        get_run_logger().warning(
            "what is predicted of the candidates is not learned from the merges of this installation: %s", error
        )
        ahead.known = shipped()
    return ahead


def merge_without(
    ahead: Ahead, recipes: Mapping[str, MergeRecipe], outcomes: Mapping[str, MergeOutcome], merge: Merge
) -> dict[str, MergeOutcome]:
    """In a flow: the best candidate without the experts that are expected (or every one), and then measured, to lower its average beyond the noise.

    One after the other: of several the one whose absence gains most goes first, then those are tried again whose absence gained, too: twenty
    experts are twenty merges and not two hundred. Empty where nothing is better left out, and where the configuration does not ask for it.
    Raises OtaError.
    """
    scores = {
        name: read_scores(ahead.where, outcomes[name].scores["merged"]) for name in ahead.measured if _scored(outcomes, name)
    }
    if not ahead.config.tries or not scores:
        return {}
    first = first_choice(scores, ahead.suite, ahead.config.gate)
    seen = ahead.outlook(first, outcomes[first])
    suspects = [one.name for one in (seen.experts if ahead.config.leave_out == "each" else seen.hurting)]
    name, recipe, whole = first, recipes[first], scores[first]
    found: dict[str, MergeOutcome] = {}
    while suspects and len(recipe.models) > 1:
        smaller = {suspect: _less(recipe, suspect) for suspect in suspects}
        merged = {suspect: merge(one, False) for suspect, one in smaller.items()}
        trials = try_without(
            whole, {suspect: read_scores(ahead.where, one.scores["merged"]) for suspect, one in merged.items()}, ahead.suite, ahead.config.gate
        )  # fmt: skip
        ahead.trials[name] = trials
        gains = {one.expert: one.without_it for one in trials if one.leave_out}
        if not gains:
            break
        worst = max(gains, key=lambda expert: gains[expert])
        suspects = [suspect for suspect in suspects if suspect in gains and suspect != worst]
        name = f"{name} without {worst}" if not found else f"{name}, {worst}"
        recipe, whole = smaller[worst], read_scores(ahead.where, merged[worst].scores["merged"])
        found = {name: merge(recipe, True)}  # everything is there: it gains its version in the registry
        get_run_logger().info("%s is better than with it, beyond the noise", name)
    return found


def _less(recipe: MergeRecipe, expert: str) -> MergeRecipe:
    return recipe.model_copy(update={"models": tuple(one for one in recipe.models if one.capability != expert)})


def _scored(outcomes: Mapping[str, MergeOutcome], name: str) -> bool:
    return name in outcomes and "merged" in outcomes[name].scores


def _measured(scores: ModelScores) -> dict[str, float]:
    return {name: value for name, value in scores.by_capability().items() if value is not None}
