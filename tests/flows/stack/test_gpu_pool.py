"""GPU stages on a pool: what is sent, what becomes of a dead worker, what a failure says; and the flow that a worker runs."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect import flow
from prefect.states import Cancelled, Completed, Crashed, Failed

import flows.pools
import flows.steps
from flows.pools import TRIES_AFTER_A_LOST_WORKER, WorkerLost, gpu_deployment, stage
from flows.steps import send
from ota_core.artifact import ArtifactRef
from ota_core.errors import ArtifactError, OtaError
from tasks import stages
from tasks.evaluation.suites import load_suite
from tasks.jobs import ScoreJob
from tasks.settings import Places, places
from tasks.stages import Subject
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
    step = stages.score_step(subject, load_suite(str(world.suite)), world.data, None)
    return ScoreJob(step=step, subject=subject, suite=str(world.suite), data_dir=str(world.data), limit=None)


Sent = list[dict[str, Any]]


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sent]:
    """Workers of which each ends its run in the next of these states, a function is called for one; returns what is sent."""
    monkeypatch.setattr(flows.steps, "send", send.with_options(retry_delay_seconds=0))

    def use(*states: Any) -> Sent:
        sent: Sent = []
        left = iter(states)

        def run_deployed(deployment: str, **options: Any) -> Any:
            sent.append({"deployment": deployment, **options})
            state = next(left)
            return SimpleNamespace(state=state(options) if callable(state) else state)

        monkeypatch.setattr(flows.pools, "run_deployed", run_deployed)
        return sent

    return use


def ask(job: ScoreJob, where: Places) -> Any:
    """The end state of a flow that sends the job."""

    @flow(name="parent")
    def parent() -> ArtifactRef:
        return flows.steps.send(job.step, where, job, "auto", "stage/gpu")

    return parent(return_state=True)


def done_there(options: dict[str, Any]) -> Any:
    """What the deployment's flow does with what was sent."""
    return stage(**options["parameters"], return_state=True)


def test_a_stage_on_the_pool_leaves_its_artifact(world: World, where: Places, pool: Callable[..., Sent]) -> None:
    job, sent = score_job(world), pool(done_there)
    ref = ask(job, where).result()
    assert ref == stages.store_of(where).find("scores", job.step.fingerprint) and ref is not None
    (one,) = sent
    assert one["deployment"] == "stage/gpu" and one["name"] == "benchmark base" and one["as_subflow"]
    assert one["parameters"]["device"] == "auto" and one["parameters"]["where"] == where.model_dump(mode="json")
    # A second flow over the same root is given what is there.
    assert ask(job, where).result() == ref and len(sent) == 1


def test_a_stage_whose_worker_died_is_sent_again_as_another_run(world: World, where: Places, pool: Callable[..., Sent]) -> None:
    lost = Crashed(message="silent for 90 seconds")
    job, sent = score_job(world), pool(lost, lost, done_there)
    assert ask(job, where).is_completed()
    assert len(sent) == 3 and len({one["key"] for one in sent}) == 3
    assert len({str(one["parameters"]) for one in sent}) == 1


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
    state: Any = stage(job.model_dump(mode="json", by_alias=True), where.model_dump(mode="json"), "cpu", return_state=True)
    assert state.is_failed() and state.message == "base: the model lies in a folder of another machine; keep it in s3://…"
    state = stage(score_job(world), where, "gpu", return_state=True)
    assert state.is_failed() and "expected cpu, cuda or auto" in state.message


def test_the_flow_of_the_worker_uses_the_cache_of_its_machine(
    world: World, where: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTA_HOME", str(tmp_path / "worker"))
    state: Any = stage(score_job(world), where, "cpu", return_state=True)
    assert state.is_completed() and state.message.startswith(where.artifacts)
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
    monkeypatch.setattr(flows.pools, "run_deployed", run_deployed)
    pooled = world.at(tmp_path / "pooled").run(recipe, gpu="stage/gpu").outcome
    assert sorted(sent) == sorted(
        ["merge ota rho=0.40 rank1", *(f"benchmark {n}" for n in ("base", "math", "knowledge", alone.name))]
    )
    assert pooled.digest == alone.digest and pooled.merged.fingerprint == alone.merged.fingerprint
    assert {key: ref.fingerprint for key, ref in pooled.scores.items()} == {
        key: ref.fingerprint for key, ref in alone.scores.items()
    }
