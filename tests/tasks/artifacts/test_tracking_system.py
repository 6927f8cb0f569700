"""What stages tell of their machine, and how it reaches MLflow."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ota_core.artifact import read_record
from tasks.artifacts.store import ArtifactStore, BuildResult
from tasks.artifacts.system_metrics import MOST_POINTS, SWITCH, Sampler, SystemPoint, points_of, sampled, thinned
from tasks.tracking.merge import log_merge
from tests.tasks.tracking.made_up import a_merge


def test_a_stage_that_was_computed_tells_of_its_machine_and_one_that_was_found_does_not_again(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "artifacts"), tmp_path / "cache")

    def build(folder: Path) -> BuildResult:
        (folder / "file").write_text("x")
        sum(i * i for i in range(300_000))
        return BuildResult()

    before = time.time()
    ref = store.produce("scores", "abc", config={}, inputs={}, build=build)
    after = time.time()
    points = points_of(read_record(Path(ref.uri)).provenance)
    assert points and all(before <= one.time <= after and one.host == platform.node() for one in points)
    assert all(0 <= one.values["cpu_utilization_percentage"] <= 100 for one in points)
    assert all(one.values["system_memory_usage_megabytes"] > 10 for one in points)
    store.produce("scores", "abc", config={}, inputs={}, build=build)
    provenance = read_record(Path(ref.uri)).provenance
    assert points_of(provenance) == points and points_of(provenance, since=time.time()) == []
    assert points_of({}) == []


def test_mlflows_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "false")
    with sampled() as sampler:
        assert sampler is None


def test_an_error_of_the_stage_ends_the_sampling(tmp_path: Path) -> None:
    import threading

    with pytest.raises(KeyError), sampled():
        raise KeyError("a bug")
    assert not any(thread.name == "system-metrics" for thread in threading.enumerate())


def test_long_stages_keep_a_bounded_number_of_points(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler()
    for _ in range(10 * MOST_POINTS):
        sampler._take([])
    assert MOST_POINTS // 2 <= len(sampler.series()["time"]) <= MOST_POINTS
    assert thinned([(1.0, {"a": 1.0}), (2.0, {"a": 3.0}), (3.0, {"a": 8.0, "b": 1.0})]) == [
        (2.0, {"a": 2.0}),
        (3.0, {"a": 8.0, "b": 1.0}),
    ]


def test_points_keep_their_times_and_are_logged_once(tracking: Path) -> None:
    points = [SystemPoint(time=1000.0 + i, host="here", values={"cpu_utilization_percentage": 10.0 * i}) for i in range(3)]
    client = MlflowClient(tracking_uri=f"sqlite:///{tracking}/mlflow.db")

    def logged(points: list[SystemPoint]) -> dict[str, list[tuple[int, int, float]]]:
        run_id = log_merge(a_merge(system=points), root=tracking).run_id
        names = [name for name in client.get_run(run_id).data.metrics if name.startswith("system/")]
        return {n: [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run_id, n)] for n in names}

    name = "system/cpu_utilization_percentage"
    expected = [(0, 1_000_000, 0.0), (1, 1_001_000, 10.0), (2, 1_002_000, 20.0)]
    assert logged(points) == {name: expected} == logged(points)
    later = SystemPoint(time=1010.0, host="here", values={"cpu_utilization_percentage": 50.0})
    assert logged([*points, later]) == {name: [*expected, (3, 1_010_000, 50.0)]}


def test_several_machines_have_a_group_each(tracking: Path) -> None:
    points = [SystemPoint(time=1.0, host=host, values={"cpu_utilization_percentage": 1.0}) for host in ("cpu-1", "gpu-1")]
    run_id = log_merge(a_merge(system=points), root=tracking).run_id
    metrics = MlflowClient(tracking_uri=f"sqlite:///{tracking}/mlflow.db").get_run(run_id).data.metrics
    assert {"system/cpu-1/cpu_utilization_percentage", "system/gpu-1/cpu_utilization_percentage"} <= set(metrics)
