"""The beginning of a night: which experts have arrived, and which of them are sound."""

import hashlib

from prefect import task
from prefect.cache_policies import NO_CACHE

from ota_core.artifact import canonical_json
from ota_core.recipe.methods import NEEDS_MOMENTS
from ota_core.recipe.parameters import default
from tasks.experts import check as expert_check
from tasks.experts import find as experts
from tasks.experts.find import ExpertFound, ExpertProblem
from tasks.orchestration.executors import TURNS
from tasks.orchestration.run_log import Progress
from tasks.registry.nightly import NightlyConfig
from tasks.settings import Places


@task(name="look", task_run_name="look at {config.experts}", cache_policy=NO_CACHE, persist_result=False)
def look(config: NightlyConfig) -> tuple[list[ExpertFound], list[ExpertProblem]]:
    """The experts that have arrived, and those that cannot be taken."""
    return experts.find_experts(config.experts, base_model=config.base_model)


@task(name="check", task_run_name="check {expert.capability}/{expert.name}", cache_policy=NO_CACHE, persist_result=False)
def check(expert: ExpertFound, config: NightlyConfig, where: Places) -> list[str]:
    """What is wrong with one expert's weights and second moments; remembered by their content."""
    reading = [
        one.parameters.missing_curvature or default(one.merge_method, "missing_curvature")
        for one in config.candidates if one.merge_method in NEEDS_MOMENTS
    ]  # fmt: skip
    # Where second moments are estimated, an expert is sound without any.
    with TURNS["engine"], Progress() as progress:
        return expert_check.check(
            where, expert.uri, config.base_model, needs_moments=bool(set(reading) - {"estimate"}),
            missing_curvature="error" if "error" in reading else "mean", memory=config.memory, progress=progress,
        )  # fmt: skip


def seen_of(config: NightlyConfig, setting: str, found: list[ExpertFound], problems: list[ExpertProblem]) -> str:
    """Over all that arrived, broken experts included: as long as it is the same, nobody has to look at weights again."""
    everything = {one.uri: one for one in found}
    broken = hashlib.sha256(canonical_json(problems).encode()).hexdigest()[:32]
    return "-".join([experts.identity_of_lineup(config.base_model, everything), broken, setting])


def choose(config: NightlyConfig, found: list[ExpertFound], where: Places) -> tuple[dict[str, ExpertFound], list[ExpertProblem]]:
    """The newest sound expert of every capability: one that is broken leaves its place to the one before it."""
    chosen, broken = {}, []
    for capability, newest_first in experts.lineup(found, config.capabilities).items():
        for expert in newest_first:
            problems = check(expert, config, where)
            if not problems:
                chosen[capability] = expert
                break
            broken += [
                ExpertProblem(uri=expert.uri, capability=capability, name=expert.name, problem=problem) for problem in problems
            ]
    return chosen, broken
