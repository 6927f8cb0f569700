"""A job: what it makes, from what, with every option that decides its bytes; and the one cached task that has it done, here or elsewhere."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from prefect import task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture
from pydantic import Field

from ota_core.artifact import ArtifactRef
from ota_core.errors import OtaError, raise_all
from ota_core.recipe.recipe import MergeRecipe
from tasks.analyse import AnalyseJob, PreflightJob
from tasks.artifacts.step import Stage, Work
from tasks.benchmark import Benchmark, ScoreJob, SmokeJob, TrialJob
from tasks.compress import CompressJob, compress_jobs
from tasks.evaluation.gradients.job import EstimateJob, estimate_jobs
from tasks.evaluation.kept import read_smoke
from tasks.evaluation.smoke import Smoke, judge
from tasks.evaluation.subject import Subject
from tasks.fetch import FetchJob
from tasks.mask import MaskJob, mask_jobs
from tasks.merge import AssembleJob, FactsJob, MergeJob, ScaledFactsJob, ScalesJob, ShardJob, SumsJob, SurveyJob
from tasks.merging.composed import composed
from tasks.merging.inputs import Estimate, fetch_all, model_sources
from tasks.merging.sources import Planned
from tasks.orchestration.credentials import block_credentials
from tasks.orchestration.executors import Executor, Here
from tasks.settings import Places
from tasks.storage.models import Fetched
from tasks.storage.streaming.streams import Streams
from tasks.storage.watch import identity_of_source, is_intact

T = TypeVar("T")

Job = Annotated[
    FetchJob
    | EstimateJob
    | CompressJob
    | MaskJob
    | SumsJob
    | SurveyJob
    | FactsJob
    | ScalesJob
    | ScaledFactsJob
    | ShardJob
    | AssembleJob
    | MergeJob
    | AnalyseJob
    | PreflightJob
    | SmokeJob
    | ScoreJob
    | TrialJob,
    Field(discriminator="kind"),
]


def _key(context: TaskRunContext, parameters: dict[str, Any]) -> str | None:
    key: str | None = parameters["job"].key(parameters["where"])
    return key


@task(
    name="job", task_run_name="{job.name}{executor.place}", cache_policy=CacheKeyFnPolicy(cache_key_fn=_key), persist_result=True,
    result_serializer="json",
)  # fmt: skip
def run_job(job: Work, where: Places, executor: Executor) -> Any:
    """What the job leaves: a reference to its artifact, or a fetched checkpoint."""
    with block_credentials():  # a process of Dask or Ray is handed none
        return executor.run(job, where)


def run_jobs(jobs: Sequence[Stage], where: Places, executor: Executor) -> list[ArtifactRef]:
    """What the jobs leave, each a task of its own. A remembered reference whose artifact is gone is made again.

    All are waited for; the errors of all are raised together. Raises OtaError.
    """
    there = [job.find(where) is not None for job in jobs]
    asked = executor.together([job for job, done in zip(jobs, there, strict=True) if not done], where)
    again = run_job.with_options(refresh_cache=True)
    return results(
        (run_job if done else again).submit(job, where, asked) for job, done in zip(jobs, there, strict=True)
    )  # fmt: skip


def run_here(job: Stage, where: Places) -> ArtifactRef:
    """The same of one job in the flow's own process, also where its task runner has others."""
    done = job.find(where) is not None
    made: Any = run_job.with_options(refresh_cache=not done)(job, where, Here())
    return cast(ArtifactRef, made)


def results(futures: Iterable[PrefectFuture[T]]) -> list[T]:
    """What the tasks return, once all have ended. The users' errors of all of them are raised together."""
    found, errors = [], []
    for future in list(futures):  # all are submitted before the first is waited for
        try:
            found.append(future.result())
        except OtaError as error:
            errors.append(error)
    kinds = {type(error) for error in errors}
    raise_all([problem for error in errors for problem in error.problems], kinds.pop() if len(kinds) == 1 else OtaError)
    return found


def fetch_models(recipe: MergeRecipe, recipe_dir: Path | None, where: Places, streams: Streams | None = None) -> list[Fetched]:
    """All checkpoints, in parallel, base first. Every source that fails is reported, not only the first.

    With ``streams``, only outlines of what lies in S3: whoever needs its tensors reads them there.
    """
    if streams is not None:
        return fetch_all(recipe, cache=where.cache, recipe_dir=recipe_dir, streams=streams)
    asked = model_sources(recipe, recipe_dir)
    parts = fetch([part for parts in asked for part in parts], where)
    return composed(asked, parts, lambda source: fetch([source], where)[0], recipe_dir, has_base=recipe.base_model is not None)


def fetch(sources: Sequence[str], where: Places) -> list[Fetched]:
    """Checkpoints, in parallel; one that Prefect remembers, but that has left the cache since, is fetched again. Raises StorageError."""
    jobs = [FetchJob(source=source, identity=identity_of_source(source)) for source in sources]
    found: list[Fetched] = results(run_job.submit(job, where, Here()) for job in jobs)
    again = run_job.with_options(refresh_cache=True)
    damaged = {i: again.submit(jobs[i], where, Here()) for i, one in enumerate(found) if not is_intact(one)}
    repaired = dict(zip(damaged, results(damaged.values()), strict=True))
    return [repaired.get(i, one) for i, one in enumerate(found)]


def estimates(
    recipe: MergeRecipe, fetched: Sequence[Fetched], where: Places, recipe_dir: Path | None, executor: Executor
) -> tuple[dict[int, Estimate], list[ArtifactRef]]:
    """Second moments that training did not keep, by the experts' positions: estimated, where the recipe asks for it, and what that left.

    fetched: base first, each with all of its bytes. Raises OtaError.
    """
    jobs = estimate_jobs(recipe, fetched, where, recipe_dir)
    made = dict(zip(jobs, run_jobs(list(jobs.values()), where, executor), strict=True))
    return {i: job.located(made[i], where) for i, job in jobs.items()}, list(made.values())


def second_moments(
    plan: Planned, where: Places, device: str, *, masks: bool = True
) -> tuple[Planned, dict[str, list[ArtifactRef]]]:
    """Compressed second moments and masks of every expert, made here: the plan with them, and what each stage left."""
    compressed = run_jobs(compress_jobs(plan), where, Here())
    plan = plan.with_artifacts(compressed)
    jobs = mask_jobs(plan) if masks else {}
    made = dict(zip(jobs, run_jobs(list(jobs.values()), where, Here(device)), strict=True))
    left = {"compress": compressed, "mask": list(made.values())}
    return plan.with_artifacts(masks=made), {stage: refs for stage, refs in left.items() if refs}


def smoke_test(subjects: Mapping[str, Subject], where: Places, executor: Executor) -> Smoke:
    """How ``merged`` stands beside ``base``, where there is one: whether it is worth a benchmark. Raises OtaError."""
    tried = {key: SmokeJob.of(subjects[key]) for key in ("base", "merged") if key in subjects}
    made = dict(zip(tried, run_jobs(list(tried.values()), where, executor), strict=True))
    found = {key: read_smoke(where, ref) for key, ref in made.items()}
    return judge(found["merged"], found.get("base"))


def score_all(
    subjects: Mapping[str, Subject], benchmark: Benchmark, where: Places, executor: Executor, limit: int | None = None
) -> dict[str, ArtifactRef]:
    """The scores of these models, all asked alike; ``limit`` instead of the benchmark's own. Raises OtaError."""
    benchmark = benchmark.asked_alike(subjects.values())
    jobs = [benchmark.job(subject, limit) for subject in subjects.values()]
    return dict(zip(subjects, run_jobs(jobs, where, executor), strict=True))
