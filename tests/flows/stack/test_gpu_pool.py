"""GPU stages on a pool: what is sent, what becomes of a dead worker, what a failure says; and the flow that a worker runs."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow
from prefect.states import Cancelled, Completed, Crashed, Failed

from flows.stage import stage
from ota_core.artifact import ArtifactRef
from ota_core.errors import ArtifactError, OtaError
from tasks.benchmark import Benchmark, ScoreJob
from tasks.evaluation.subject import Subject
from tasks.job import run_jobs
from tasks.orchestration import executors
from tasks.orchestration.executors import TRIES_AFTER_A_LOST_WORKER, Pool, WorkerLost, gpu_deployment
from tasks.settings import Places, places
from tasks.storage import models as storage
from tests.flows.merge_fixture import World


@pytest.fixture
def where(tmp_path: Path) -> Places:
    return places(tmp_path / "home")


def score_job(world: World, **changes: Any) -> ScoreJob:
    """Score the base, which lies in S3."""
    fetched = storage.fetch(f"{world.uri}/models/base", cache=world.home / "cache")
    known = {"name": "base", "role": "base", "path": None, "digest": fetched.digest, "location": fetched.resolved}
    subject = Subject.model_validate(known | changes)
    return Benchmark.of(str(world.suite), str(world.data), None, places(world.home)).job(subject)


Sent = list[dict[str, Any]]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sent]:
    """Workers of which each ends its run in the next of these states, a function is called for one; returns what is sent."""

    def use(*states: Any) -> Sent:
        sent: Sent = []
        left = iter(states)

        def run_deployed(deployment: str, **options: Any) -> Any:
            sent.append({"deployment": deployment, **options})
            state = next(left)
            return SimpleNamespace(state=state(options) if callable(state) else state)

        monkeypatch.setattr(executors, "run_deployed", run_deployed)
        return sent

    return use


def ask(job: ScoreJob, where: Places, *more: ScoreJob) -> Any:
    """The end state of a flow that sends the job, or several."""

    @flow(name="parent")
    def parent() -> ArtifactRef:
        return run_jobs([job, *more], where, Pool("stage/gpu"))[0]

    return parent(return_state=True)


def done_there(options: dict[str, Any]) -> Any:
    """What the deployment's flow does with what was sent."""
    return stage(**options["parameters"], return_state=True)


def test_a_stage_on_the_pool_leaves_its_artifact(world: World, where: Places, pool: Callable[..., Sent]) -> None:
    job, sent = score_job(world), pool(done_there)
    ref = ask(job, where).result()
    assert ref == job.find(where) and ref is not None
    (one,) = sent
    assert one["deployment"] == "stage/gpu" and one["name"] == "benchmark base" and one["as_subflow"]
    assert one["parameters"]["device"] == "auto" and one["parameters"]["where"] == where.model_dump(mode="json")
    # A second flow over the same root is given what is there.
    assert ask(job, where).result() == ref and len(sent) == 1


def test_a_stage_whose_worker_died_is_sent_again_as_another_run(world: World, where: Places, pool: Callable[..., Sent]) -> None:
    lost = Crashed(message="silent for five minutes")
    job, sent = score_job(world), pool(lost, lost, done_there)
    assert ask(job, where).is_completed()
    assert len(sent) == 3 and len({one["key"] for one in sent}) == 3
    assert len({str(one["parameters"]) for one in sent}) == 1


def test_several_jobs_travel_in_one_run_and_one_that_fails_fails_alone(
    world: World, where: Places, pool: Callable[..., Sent]
) -> None:
    fine, sent = score_job(world), pool(done_there, done_there)
    lost = score_job(world, name="lost", digest="xxh3:0", location=None)
    other = score_job(world, name="other", digest="xxh3:1", location=f"{world.uri}/models/nowhere")
    with pytest.raises(OtaError) as caught:
        ask(lost, where, fine, other).result()
    (one,) = sent
    assert one["name"] == "benchmark lost, base, other" and len(one["parameters"]["jobs"]) == 3
    assert fine.find(where), "what succeeded is kept"
    first, second = caught.value.problems
    assert first == "benchmark lost: lost: the model lies in a folder of another machine; keep it in s3://…"
    assert second.startswith("benchmark other: ") and "models/nowhere" in second
    # Asked again, only those are sent that are not there.
    with pytest.raises(OtaError):
        ask(fine, where, lost).result()
    assert [len(one["parameters"]["jobs"]) for one in sent] == [3, 1] and sent[1]["name"] == "benchmark lost"


def test_of_a_run_whose_worker_died_only_what_is_missing_is_sent_again(
    world: World, where: Places, pool: Callable[..., Sent]
) -> None:
    """And the job at which it died goes last: it may be the one that no machine survives."""

    def dies_at_the_second(options: dict[str, Any]) -> Any:
        done_there(options | {"parameters": options["parameters"] | {"jobs": options["parameters"]["jobs"][:1]}})
        return Crashed(message="out of memory")

    jobs = [score_job(world), *(score_job(world, name=name, digest=f"xxh3:{name}") for name in ("a", "b"))]
    sent = pool(dies_at_the_second, Failed(message="the run itself failed"))
    with pytest.raises(OtaError, match=r"(?s)benchmark a: the run itself failed.*benchmark b: the run itself failed"):
        ask(jobs[0], where, *jobs[1:]).result()
    assert [one["name"] for one in sent] == ["benchmark base, a, b", "benchmark b, a"] and jobs[0].find(where)


def test_a_machine_that_dies_at_every_try_is_an_error(world: World, where: Places, pool: Callable[..., Sent]) -> None:
    sent = pool(*[Crashed(message="out of memory")] * 9)
    with pytest.raises(WorkerLost, match=r"benchmark base: the worker that ran it is gone \(out of memory\); run again"):
        ask(score_job(world), where).result()
    assert len(sent) == 1 + TRIES_AFTER_A_LOST_WORKER


@pytest.mark.parametrize(
    ("state", "kind", "message"),
    [
        (Failed(message="the suite differs"), OtaError, "^benchmark base: the suite differs$"),
        (Cancelled(message="by anna"), OtaError, r"^benchmark base: its run ended as Cancelled \(by anna\); run again"),
        (Completed(), ArtifactError, "^benchmark base is done, but .* does not hold its output as this machine sees it"),
    ],
)
def test_what_is_no_accident_is_not_sent_again(
    world: World, where: Places, pool: Callable[..., Sent], state: Any, kind: type[OtaError], message: str
) -> None:
    sent = pool(state)
    with pytest.raises(kind, match=message):
        ask(score_job(world), where).result()
    assert len(sent) == 1


def test_the_flow_of_the_worker_tells_an_error_by_its_message(world: World, where: Places) -> None:
    job = score_job(world, location=None)
    state: Any = stage([job.model_dump(mode="json", by_alias=True)], where.model_dump(mode="json"), "cpu", return_state=True)
    assert state.is_failed() and state.message == "base: the model lies in a folder of another machine; keep it in s3://…"
    state = stage([score_job(world)], where, "gpu", return_state=True)
    assert state.is_failed() and "expected cpu, cuda or auto" in state.message


def test_the_flow_of_the_worker_uses_the_cache_of_its_machine(
    world: World, where: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "worker"))
    state: Any = stage([score_job(world)], where, "cpu", return_state=True)
    assert state.is_completed() and state.message == where.artifacts
    assert (tmp_path / "worker" / "cache").is_dir() and not where.cache.exists()


def test_the_deployment_is_named_by_the_environment() -> None:
    assert gpu_deployment({"OTA_GPU_DEPLOYMENT": "stage/gpu"}) == "stage/gpu"
    assert gpu_deployment({"OTA_GPU_DEPLOYMENT": ""}) is None and gpu_deployment({}) is None


def test_a_merge_for_a_deployment_that_is_not_there_names_it(world: World, tmp_path: Path) -> None:
    run = world.at(tmp_path / "home").run(world.recipe("linear"), suite=None, gpu="stage/nowhere")
    with pytest.raises(OtaError, match=r"no deployment 'stage/nowhere'; create it: prefect --no-prompt deploy --all"):
        _ = run.outcome
    assert run.states["merge linear on stage/nowhere"] == ["Failed"]


def test_a_flow_with_a_pool_gives_what_one_process_gives(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both GPU stages travel: the merge with masks and compressed moments, and every benchmark."""
    sent = []

    def run_deployed(deployment: str, **options: Any) -> Any:
        sent.append(options["name"])
        return SimpleNamespace(state=done_there(options))

    recipe = world.recipe(density=0.4, compression="rank1")
    alone = world.at(tmp_path / "alone").run(recipe).outcome
    monkeypatch.setattr(executors, "run_deployed", run_deployed)
    pooled = world.at(tmp_path / "pooled").run(recipe, gpu="stage/gpu").outcome
    assert sorted(sent) == sorted(["merge ota rho=0.40 rank1", f"benchmark base, math, knowledge, {alone.name}"])
    assert pooled.digest == alone.digest and pooled.merged.fingerprint == alone.merged.fingerprint
    assert {key: ref.fingerprint for key, ref in pooled.scores.items()} == {
        key: ref.fingerprint for key, ref in alone.scores.items()
    }
