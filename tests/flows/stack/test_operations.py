"""Operations from end to end, with the processes of the local stack: Prefect, MLflow and S3 servers, a CPU and a GPU worker.

One story in its order: a first night, a night without news, a broken expert, a better one, a worse one, a GPU worker that dies in the middle of a
merge.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tasks.local.stack import control as stack_control
from tasks.local.stack.layout import ROOT
from tasks.registry.promotion import CHAMPION, Version, current
from tasks.registry.publish import read_latest
from tasks.storage import s3
from tasks.storage.layout import write_expert_json
from tasks.storage.models import EXPERT_JSON, upload_folder
from tasks.tracking.registered import CHALLENGER, TAG_REPLACED
from tests.flows.stack.live_stack import Live, stack_up, until
from tests.tiny_models import perturb, write_tiny_llama
from tests.tiny_suite import write_tiny_suite
from tests.tiny_training import memorise, rows_of

pytestmark = pytest.mark.slow
BUCKET = "s3://ota-test"
EXPERTS, BASE = f"{BUCKET}/experts", f"{BUCKET}/models/base"
NAME, MOMENTS = "ota-merged", "exp_avg_sq.safetensors"


@dataclass
class Operations:
    """The stack, and what happens to it in the story."""

    live: Live
    seen: set[Any] = field(default_factory=set)
    """Nightly runs that a test has looked at."""

    def ota(self, *arguments: str) -> str:
        """A command as from a shell that sourced the stack's env.sh."""
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", *arguments], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def push(self, folder: Path, capability: str, name: str, trained_at: str) -> None:
        """A new expert, as its trainer would bring it; the event says that it is there."""
        said = self.ota(
            "push", str(folder), EXPERTS, "--capability", capability, "--base-model", BASE, "--name", name, "--trained-at", trained_at
        )  # fmt: skip
        assert "ota.expert.arrived" in said and "not sent" not in said, said

    def nightly(self) -> Any:
        """A run of the deployment, to its end."""
        from prefect.deployments import run_deployment

        return self.looked_at(run_deployment("nightly/nightly", timeout=600, poll_interval=1, as_subflow=False))

    def started_by_event(self, seconds: float = 240) -> Any:
        """The nightly run that the arrival of an expert started, at its end."""
        from prefect.client.orchestration import get_client

        def new() -> list[Any]:
            with get_client(sync_client=True) as client:
                runs = [run for run in client.read_flow_runs(limit=100) if run.id not in self.seen and is_night(run)]
                return [run for run in runs if run.state.is_final()]

        (run,) = until(new, self.live, seconds=seconds)
        assert run.created_by is not None and run.created_by.type == "AUTOMATION", run.created_by
        return self.looked_at(run)

    def looked_at(self, run: Any) -> Any:
        self.seen.add(run.id)
        return run

    def champion(self) -> Version | None:
        return current(CHAMPION)


def is_night(run: Any) -> bool:
    return run.deployment_id is not None and run.auto_scheduled is False and run.name.startswith("nightly")


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operations]:
    with stack_up(tmp_path_factory.mktemp("operations")) as live:
        s3.create_bucket(BUCKET)
        suite, data = write_tiny_suite(live.folder / "suite", n=16)
        base = write_tiny_llama(live.folder / "base", hidden=48)
        upload_folder(base, BASE)
        # The first two have only begun to learn: what comes after them is better.
        for name, steps in {"math": 12, "knowledge": 20, "better": 150, "last": 160}.items():
            memorise(base, live.folder / name, rows_of(data), seed=1, steps=steps)
        for name in ("math", "knowledge"):
            write_expert_json(live.folder / name, capability=name, base_model=BASE, trained_at="2026-11-20")
            upload_folder(live.folder / name, f"{EXPERTS}/{name}/2026-11-20", last=EXPERT_JSON)
        config = live.folder / "nightly.yaml"
        config.write_text(yaml.safe_dump(configuration(suite, data)))
        use_configuration(config)
        yield Operations(live)


def configuration(suite: Path, data: Path) -> dict[str, Any]:
    return {
        "experts": EXPERTS, "base_model": BASE, "suite": str(suite), "data_dir": str(data), "publish": f"{BUCKET}/merged", "name": NAME,
        "memory": "256MiB",
        "candidates": [
            {"name": "ota rho=0.80", "merge_method": "ota", "parameters": {"density": 0.8, "compression": "rank1"}},
            {"name": "linear", "merge_method": "linear"},
        ],
    }  # fmt: skip


def use_configuration(config: Path) -> None:
    """Every run of the deployment, by hand or by event, takes it."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import DeploymentUpdate

    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name("nightly/nightly")
        client.update_deployment(deployment.id, DeploymentUpdate(parameters={"config": str(config)}))


def runs_of_stage() -> list[Any]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName

    with get_client(sync_client=True) as client:
        return client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=["stage"])), limit=200)


def pages_of(run: Any) -> dict[str, Any]:
    """The artifacts of a run, as the Prefect UI shows them, by key."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id])))
    return {one.key: one.data for one in found if one.key}


def test_the_first_night_merges_on_the_gpu_worker_and_promotes(operations: Operations) -> None:
    night = operations.nightly()
    assert night.state.name == "Promoted", (night.state.message, operations.live.logs())
    assert night.work_pool_name == "ota-cpu"
    stages = runs_of_stage()
    assert {run.name.split()[0] for run in stages} == {"merge", "smoke-test", "benchmark"}
    assert {(run.work_pool_name, run.state_name) for run in stages} == {("ota-gpu", "Completed")}
    champion = operations.champion()
    assert champion is not None and "gate/decision" in champion.tags
    record = json.loads(s3.read_bytes(f"{champion.source_uri}/record.json"))
    assert record["provenance"]["work_pool"] == "ota-gpu"
    latest = read_latest(f"{BUCKET}/merged", NAME)
    assert latest is not None and (latest.version, latest.digest) == (champion.version, champion.digest)
    assert s3.exists(f"{latest.uri}/record.json") and s3.exists(f"{latest.uri}/model.safetensors")
    pages = pages_of(night)
    assert {"scores", "gate"} <= set(pages) and "champion" in pages["gate"]


def test_a_second_night_does_nothing(operations: Operations) -> None:
    before, stages = operations.champion(), len(runs_of_stage())
    night = operations.nightly()
    assert night.state.name == "NothingNew" and "2026-11-20" in night.state.message
    assert len(runs_of_stage()) == stages
    assert operations.champion() == before


def test_a_broken_expert_is_left_out_by_name(operations: Operations) -> None:
    from safetensors.torch import load_file, save_file

    before = operations.champion()
    broken = shutil.copytree(operations.live.folder / "knowledge", operations.live.folder / "nan")
    (broken / EXPERT_JSON).unlink()
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    operations.push(broken, "knowledge", "2026-11-21", "2026-11-21")
    night = operations.started_by_event()
    assert night.state.name == "NothingNew", night.state.message
    assert "knowledge/2026-11-21" in night.state.message and "model.norm.weight" in night.state.message
    assert operations.champion() == before


def test_a_better_expert_starts_a_night_that_moves_the_alias(operations: Operations) -> None:
    before, stages = operations.champion(), {run.id for run in runs_of_stage()}
    operations.push(operations.live.folder / "better", "math", "2026-11-22", "2026-11-22")
    night = operations.started_by_event()
    assert night.state.name == "Promoted", (night.state.message, operations.live.logs())
    new = [run for run in runs_of_stage() if run.id not in stages]
    assert {run.name.split()[0] for run in new} == {"merge", "smoke-test", "benchmark"}
    assert {(run.work_pool_name, run.state_name) for run in new} == {("ota-gpu", "Completed")}
    champion = operations.champion()
    assert before is not None and champion is not None and champion.version != before.version
    assert champion.tags[TAG_REPLACED] == before.version
    record = json.loads(s3.read_bytes(f"{champion.source_uri}/record.json"))
    assert record["provenance"]["work_pool"] == "ota-gpu"
    # The broken one is named and left out still; its capability has the expert before it.
    assert "knowledge/2026-11-21" in night.state.message and "model.norm.weight" in night.state.message
    sources = record["provenance"]["sources"]
    assert sources["math"].endswith("/math/2026-11-22") and sources["knowledge"].endswith("/knowledge/2026-11-20"), sources
    latest = read_latest(f"{BUCKET}/merged", NAME)
    assert latest is not None and (latest.version, latest.digest) == (champion.version, champion.digest)


def test_a_worse_set_is_not_promoted(operations: Operations) -> None:
    before = operations.champion()
    worse = perturb(operations.live.folder / "knowledge", operations.live.folder / "worse", seed=1, scale=1.0)
    (worse / EXPERT_JSON).unlink()
    shutil.copy(operations.live.folder / "knowledge" / MOMENTS, worse / MOMENTS)  # noise would make them negative
    operations.push(worse, "knowledge", "2026-11-23", "2026-11-23")
    night = operations.started_by_event()
    assert night.state.name == "Kept", night.state.message
    assert operations.champion() == before
    challenger = current(CHALLENGER)
    assert challenger is not None and challenger.tags["gate/decision"] == CHALLENGER
    assert "not higher" in challenger.tags["gate/reason"], challenger.tags


def test_a_merge_survives_the_death_of_its_gpu_worker(operations: Operations) -> None:
    operations.push(operations.live.folder / "last", "math", "2026-11-24", "2026-11-24")
    before = {run.id for run in runs_of_stage()}

    def merging() -> list[Any]:
        new = [run for run in runs_of_stage() if run.id not in before and run.name.startswith("merge")]
        return [run for run in new if run.state_name == "Running"]

    (killed,) = until(merging, operations.live)
    worker = psutil.Process(stack_control.processes(operations.live.home)["worker-gpu"].pid)
    for process in [*worker.children(recursive=True), worker]:
        process.kill()  # as when the machine goes away: no goodbye; supervisord starts another worker
    night = operations.started_by_event(seconds=900)
    assert night.state.is_completed(), (night.state.message, operations.live.logs())
    lost = next(run for run in runs_of_stage() if run.id == killed.id)
    again = [run for run in runs_of_stage() if run.id not in before and run.name == killed.name and run.id != killed.id]
    assert lost.state_name == "Crashed" and "silent" in lost.state.message, lost.state
    assert again and any(run.state_name == "Completed" for run in again)
