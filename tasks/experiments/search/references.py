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


class References:
    """Scores of base and experts, each measured once for every number of documents that is asked for."""

    def __init__(
        self, config: SearchConfig, benchmark: Benchmark, subjects: dict[str, Subject], where: Places, executor: Executor
    ) -> None:
        self._config, self._benchmark, self._subjects, self._where, self._executor = config, benchmark, subjects, where, executor

    def floors(self, limit: int) -> dict[str, float]:
        """The floors as measured on so many documents. On fewer than all, only those models are scored that floors refer to."""
        wanted, last = self._config.floors(), limit == self._config.budget.rungs[-1]
        kinds = {one.kind for one in wanted.values()}
        models = {key: one for key, one in self._subjects.items() if last or one.role in kinds}
        found = read_all(self._where, score_all(models, self._benchmark, self._where, self._executor, limit))
        experts = {one.name: (one.capability or one.name, found[key]) for key, one in models.items() if one.role == "expert"}
        return floors_of(wanted, self._benchmark.tests.capabilities, found.get("base"), experts)


def identity_of(plan: Planned, benchmark: Benchmark) -> str:
    """What decides a trial's scores besides its values: the models, the method's other settings, suite and data, and what of it counts."""
    identity = {"merge": merge_step(plan.recipe, plan.inputs).fingerprint, "scores": benchmark.wanted}
    # Trials that were measured by right answers alone do not compare.
    return canonical_json(identity | ({"objective": "likelihood of a byte"} if benchmark.tests.losses else {}))
