"""The nightly merge, top to bottom: look → check → look ahead → merge the candidates → compare → gate → publish and promote → remember.

Every step is found done by the next run: a night that was interrupted is simply run again. What was seen is written down last.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed

from flows.merge import merge_flow
from flows.outlook import Ahead, look_ahead, merge_without
from ota_core.errors import OtaError, RecipeError, raise_all
from ota_core.recipe.recipe import MergeRecipe
from tasks.benchmark import Benchmark
from tasks.evaluation.gate import check_margins
from tasks.evaluation.kept import read_all, read_scores
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.subject import Subject
from tasks.experts import find as experts
from tasks.experts.find import ExpertFound, ExpertProblem
from tasks.job import score_all
from tasks.orchestration.deployed import cancel_children
from tasks.orchestration.executors import executor_of, gpu_deployment
from tasks.orchestration.run_log import for_users
from tasks.orchestration.runners import several_at_once
from tasks.orchestration.shown import show_markdown, show_mlflow, show_scores
from tasks.pages.markdown import cell
from tasks.pages.outcome import MergeOutcome, comparison_table
from tasks.registry.arrivals import choose, look, seen_of
from tasks.registry.nightly import NightlyConfig, NightlyError, find_config, last_night, load_nightly, remember
from tasks.registry.verdict import Night, Verdict, judge, keep_published, settle
from tasks.settings import places


def _run_name() -> str:
    return f"nightly {datetime.now(UTC):%Y-%m-%d %H:%M}"


@for_users
@flow(
    name="nightly", flow_run_name=_run_name, task_runner=several_at_once(), persist_result=False,
    on_cancellation=[cancel_children], on_crashed=[cancel_children],
)  # fmt: skip
def nightly_flow(config: NightlyConfig | str | None = None, force: bool = False) -> State[Any]:
    """Merge the newest experts in every configured way, and promote the best merge if it passes the gate.

    Args:
        config: The configuration, or where its YAML lies (s3://… or a file); OTA_NIGHTLY or deployments/nightly.yaml by default.
        force: Merge and judge again, also when nothing has changed since the last night.
    """
    if not isinstance(config, NightlyConfig):
        config = load_nightly(find_config(config))
    where, log = places(), get_run_logger()
    benchmark = Benchmark.of(config.suite, config.data_dir, config.limit, where).check()
    check_margins(config.gate, benchmark.tests)
    executor = executor_of(gpu_deployment(), config.device)
    setting = config.digest(benchmark.tests, benchmark.data_digest)

    def score(subject: Subject) -> ModelScores:
        """One more model, asked as the candidates were."""
        tonight = read_scores(where, next(one.scores["merged"] for one in outcomes.values() if one.scores))
        return read_all(where, score_all({"one": subject}, benchmark.asked_as(tonight), where, executor))["one"]

    found, problems = look(config)
    last = None if force else last_night(where, config.name)
    seen = seen_of(config, setting, found, problems)
    if last and last.seen == seen:
        keep_published(config, where)
        return _nothing_new(last.experts, last.left_out, "nothing has arrived since")
    chosen, unhealthy = choose(config, found, where)
    problems = [*problems, *unhealthy]
    left_out = [f"{problem.capability}/{problem.name}: {problem.problem}" for problem in problems]
    left_out += [
        f"{capability}: no sound expert has arrived" for capability in config.capabilities or () if capability not in chosen
    ]
    for line in left_out:
        log.warning("left out: %s", line)
    if not chosen:
        return _no_expert(config, left_out)
    merged = f"{experts.identity_of_lineup(config.base_model, chosen)}-{setting}"
    if last and last.merged == merged:
        remember(
            where, config.name, seen=seen, merged=merged, experts=last.experts, left_out=left_out, outcome=last.outcome
        )  # fmt: skip
        keep_published(config, where)
        return _nothing_new(last.experts, left_out, "what has arrived since is left out")
    log.info("tonight's set: %s", ", ".join(f"{one.capability}/{one.name}" for one in chosen.values()))

    if left_out:  # on a page of its own, and now: the night may end before it has a verdict to show
        show_markdown("left-out", "\n".join(f"- {cell(line)}" for line in left_out), "Left out of tonight's merges")
    try:
        recipes, failures = _recipes(config, chosen)
        ahead = look_ahead(config, benchmark.tests, recipes, where)
        outcomes = _merge_all(config, recipes, failures)
        if not outcomes:
            raise_all([f"candidate '{name}' could not be merged: {reason}" for name, reason in failures.items()], NightlyError)
        outcomes |= merge_without(ahead, recipes, outcomes, lambda recipe, keep: _merge(config, recipe, keep).result())
        night = Night(config=config, suite=benchmark.tests, where=where, outcomes=outcomes)
        verdict = judge(night, score)
        settle(night, verdict)
    except OtaError as error:
        if not left_out:
            raise
        raise NightlyError(f"{error}{_left_out(left_out)}") from error
    _show(night, verdict, problems, failures, ahead)
    message = _message(verdict, left_out, failures)
    if failures:  # told as a failure, and not written down: the next night tries these candidates again
        return Failed(message=message)
    uris = {capability: one.uri for capability, one in chosen.items()}
    remember(where, config.name, seen=seen, merged=merged, experts=uris, left_out=left_out, outcome=message)
    return Completed(name="Promoted" if verdict.promoted else "Kept", message=message)


def _recipes(config: NightlyConfig, chosen: dict[str, ExpertFound]) -> tuple[dict[str, MergeRecipe], dict[str, str]]:
    """Every candidate's recipe, and what is wrong with others, which only the experts that were found tell: their number, their names."""
    recipes: dict[str, MergeRecipe] = {}
    failures: dict[str, str] = {}
    uris = {capability: one.uri for capability, one in chosen.items()}
    for candidate in config.candidates:
        try:
            recipes[candidate.name] = candidate.recipe(config.base_model, uris)
        except RecipeError as error:
            failures[candidate.name] = str(error)
    return recipes, failures


def _merge(config: NightlyConfig, recipe: MergeRecipe, keep: bool = True) -> Any:
    """The state of one merge, benchmarked; with ``keep`` it gains a version in the registry."""
    return merge_flow(
        recipe, suite=config.suite, data_dir=config.data_dir, limit=config.limit, device=config.device, memory=config.memory,
        registered_model=config.name if keep else None, report=config.report, return_state=True,
    )  # fmt: skip


def _merge_all(config: NightlyConfig, recipes: dict[str, MergeRecipe], failures: dict[str, str]) -> dict[str, MergeOutcome]:
    """Every candidate merged and benchmarked; why others were not is added to ``failures``. One that fails does not stop the others."""
    outcomes: dict[str, MergeOutcome] = {}
    for name, recipe in recipes.items():
        state: Any = _merge(config, recipe)
        if state.is_completed():
            outcomes[name] = state.result()
        else:
            failures[name] = state.message or state.name
    return outcomes


def _left_out(lines: Sequence[str]) -> str:
    return f"; left out: {'; '.join(lines)}" if lines else ""


def _nothing_new(uris: dict[str, str], left_out: Sequence[str], why: str) -> State[Any]:
    names = ", ".join("/".join(uri.rstrip("/").split("/")[-2:]) for uri in uris.values())
    return Completed(name="NothingNew", message=f"this set was merged last ({names}): {why}{_left_out(left_out)}")


def _no_expert(config: NightlyConfig, left_out: Sequence[str]) -> State[Any]:
    wanted = f" of {', '.join(config.capabilities)}" if config.capabilities else ""
    return Completed(
        name="NothingNew", message=f"no complete, sound expert{wanted} lies below {config.experts}{_left_out(left_out)}"
    )


def _message(verdict: Verdict, left_out: Sequence[str], failures: dict[str, str]) -> str:
    failed = "".join(f"; candidate {name} failed: {reason}" for name, reason in failures.items())
    refused = "".join(f"; candidate {name} is refused: {reason}" for name, reason in verdict.refused.items())
    return f"{verdict.headline}{refused}{_left_out(left_out)}{failed}"


def _show(
    night: Night, verdict: Verdict, problems: list[ExpertProblem], failures: dict[str, str], ahead: Ahead
) -> None:  # fmt: skip
    """The night's pages in the Prefect UI."""
    first = verdict.winner or verdict.challenger
    if first:
        show_mlflow(first, night.outcomes[first].logged.url)
    benchmarked = {name: outcome for name, outcome in night.outcomes.items() if outcome.scores}
    if benchmarked:
        table = comparison_table(benchmarked, night.where, more=verdict.champion_scores)
        show_scores(table, title="Tonight's candidates")
    pages: list[str] = []  # the headline stands above the page
    if problems:
        pages += [
            "## Left out",
            "",
            *(f"- **{cell(one.capability)}/{cell(one.name)}**: {cell(one.problem)}" for one in problems),
            "",
        ]
    if verdict.refused:
        pages += [
            "## Refused before the benchmark",
            "",
            *(f"- **{cell(name)}**: {cell(why)}" for name, why in verdict.refused.items()),
            "",
        ]
    if failures:
        pages += ["## Failed", "", *(f"- **{cell(name)}**: {cell(reason)}" for name, reason in failures.items()), ""]
    show_markdown("gate", "\n".join([*pages, *verdict.pages(night), *ahead.pages(night.outcomes)]), verdict.headline)


def run_nightly(config: str | None, *, force: bool) -> str:
    """One night in this process; the message of its end. Raises OtaError with what went wrong."""
    state: Any = nightly_flow(config, force, return_state=True)
    if not state.is_completed():
        error = state.result(raise_on_failure=False)
        raise error if isinstance(error, OtaError) else OtaError(state.message or state.name)
    return f"{state.name}: {state.message}"
