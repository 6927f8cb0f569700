"""What a search's trials are measured against: the scores of base and experts; and what decides a trial's scores."""

from ota_core.artifact import canonical_json
from tasks.benchmark import Benchmark
from tasks.evaluation.kept import read_all
from tasks.evaluation.subject import Subject
from tasks.experiments.search.config import SearchConfig, floors_of
from tasks.job import score_all
from tasks.merge import merge_step
from tasks.merging.sources import Planned
from tasks.orchestration.executors import Executor
from tasks.settings import Places


def floors_at(
    limit: int, config: SearchConfig, benchmark: Benchmark, subjects: dict[str, Subject], where: Places, executor: Executor
) -> dict[str, float]:
    """The floors as measured on so many documents. On fewer than all, only those models are scored that floors refer to."""
    wanted, last = config.floors(), limit == config.budget.rungs[-1]
    kinds = {one.kind for one in wanted.values()}
    models = {key: one for key, one in subjects.items() if last or one.role in kinds}
    found = read_all(where, score_all(models, benchmark, where, executor, limit))
    experts = {one.name: (one.capability or one.name, found[key]) for key, one in models.items() if one.role == "expert"}
    return floors_of(wanted, benchmark.tests.capabilities, found.get("base"), experts)


def identity_of(plan: Planned, benchmark: Benchmark) -> str:
    """What decides a trial's scores besides its values: the models, the method's other settings, suite and data, and what of it counts."""
    identity = {"merge": merge_step(plan.recipe, plan.inputs).fingerprint, "scores": benchmark.wanted}
    # Trials that were measured by right answers alone do not compare.
    return canonical_json(identity | ({"objective": "likelihood of a byte"} if benchmark.tests.losses else {}))
