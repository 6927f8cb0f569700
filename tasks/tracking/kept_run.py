"""A run of MLflow as something that can be kept in a file and logged later: what a search or a study is to be known by, found again by its tags."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from ota_core.artifact import canonical_json
from tasks.tracking.artifacts import replace_artifacts
from tasks.tracking.experiment import complete_merges
from tasks.tracking.run import TAG_FINGERPRINT, LoggedRun, logged_run
from tasks.tracking.store import Store, artifact_errors, clear_errors, connect, experiment_id, locked, mlflow_metrics
from tasks.tracking.write import PARENT, find_or_create, in_progress, log_values

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


class Labels(BaseModel):
    """A tag for runs of merges: those of merges that are named here get it, and others lose it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tag: str
    merges: dict[str, str]
    """Fingerprint to the tag's value."""


class KeptRun(BaseModel):
    """What one run is to hold, and the runs below it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    kind: Literal["run"] = "run"
    name: str
    identity: dict[str, str]
    """Tags that it is found by."""
    params: dict[str, str] = {}
    tags: dict[str, str] = {}
    points: dict[int, dict[str, float]] = {}
    """Step to metrics."""
    files: dict[str, bytes] = {}
    """By their paths among its artifacts."""
    labels: Labels | None = None
    children: tuple[KeptRun, ...] = ()
    safe: str = "Nothing is lost."
    """What is not lost where it cannot be logged."""

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(canonical_json(self.identity).encode()).hexdigest()[:32]


def log_kept(run: KeptRun, store: Store) -> LoggedRun:
    """Log the run, its children and labels; what an earlier try logged is not logged twice. Raises StorageError."""
    with clear_errors(store, f"logging {run.name!r}", run.safe), locked(store):
        client = connect(store)
        experiment = experiment_id(client, store)
        made = _log(client, experiment, run, {})
        if run.labels is not None:
            _label(client, experiment, run.labels)
    return logged_run(store, experiment, made.info.run_id)


def _log(client: MlflowClient, experiment: str, run: KeptRun, parent: Mapping[str, str]) -> Run:
    found = find_or_create(client, experiment, {**parent, **run.identity}, run.name)
    if parent and found.info.status == "FINISHED":
        return found
    with in_progress(client, found):
        log_values(client, found, run.params, {}, run.tags)
        _log_points(client, found, run.points)
        for child in run.children:
            _log(client, experiment, child, {PARENT: found.info.run_id})
        if run.files:
            with (
                tempfile.TemporaryDirectory() as temporary,
                artifact_errors(f"the files of {run.name}", found.info.artifact_uri, run.safe),
            ):
                for name, content in run.files.items():
                    path = Path(temporary) / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                replace_artifacts(client, found.info.run_id, Path(temporary))
    return found


def _log_points(client: MlflowClient, run: Run, points: Mapping[int, Mapping[str, float]]) -> None:
    """The points of curves that the run does not hold yet: a value that is there already would become a second point."""
    from mlflow.entities import Metric

    now, known = int(time.time() * 1000), dict[str, set[tuple[int, float]]]()
    new = []
    for step, metrics in points.items():
        for name, value in mlflow_metrics(metrics).items():
            if name not in known:
                held = client.get_metric_history(run.info.run_id, name) if name in run.data.metrics else []
                known[name] = {(one.step, one.value) for one in held}
            if (step, float(value)) not in known[name]:
                new.append(Metric(name, float(value), now, step))
    for start in range(0, len(new), 500):
        client.log_batch(run.info.run_id, metrics=new[start : start + 500], synchronous=True)


def _label(client: MlflowClient, experiment: str, labels: Labels) -> None:
    for one in complete_merges(client, experiment):
        label = labels.merges.get(one.data.tags[TAG_FINGERPRINT])
        if label is None and labels.tag in one.data.tags:
            client.delete_tag(one.info.run_id, labels.tag)
        elif label is not None and one.data.tags.get(labels.tag) != label:
            client.set_tag(one.info.run_id, labels.tag, label)
