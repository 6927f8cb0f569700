"""A run of MLflow as something that can be kept in a file and logged later, or part by part: of a search, a tuning or a study, found by its tags."""

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
from tasks.tracking.patience import MARKING_SECONDS, within
from tasks.tracking.run import TAG_FINGERPRINT, LoggedRun, logged_run
from tasks.tracking.store import Store, artifact_errors, batches, clear_errors, connect, experiment_id, locked, mlflow_metrics
from tasks.tracking.write import PARENT, find_or_create, in_progress, log_values

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Known = dict[str, set[tuple[int, float]]]
"""Metric to the points (step, value) that MLflow holds of it."""


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


def texts(params: Mapping[str, object]) -> dict[str, str]:
    """Params as MLflow keeps them."""
    return {key: str(value) for key, value in params.items()}


def as_bytes(files: Mapping[str, str | bytes]) -> dict[str, bytes]:
    """Files as a run holds them, texts as UTF-8."""
    return {path: content if isinstance(content, bytes) else content.encode() for path, content in files.items()}


def log_kept(run: KeptRun, store: Store) -> LoggedRun:
    """Log the run, its children and labels; what an earlier try logged is not logged twice. Raises StorageError."""
    with clear_errors(store, f"logging {run.name!r}", run.safe), locked(store):
        client = connect(store)
        experiment = experiment_id(client, store)
        made = _log(client, experiment, run, {})
        if run.labels is not None:
            _label(client, experiment, run.labels)
    return logged_run(store, experiment, made.info.run_id)


def log_part(run: KeptRun, store: Store, logged: LoggedRun | None = None, known: Known | None = None) -> LoggedRun:
    """Log what there is so far of a run that goes on and stays RUNNING; its children are complete. Raises StorageError.

    logged: what an earlier call returned. known: the same dict for all parts that one process logs, one after the other: curves are then not
    read again for every point. What an earlier try logged is not logged twice.
    """
    with clear_errors(store, f"logging {run.name!r}", run.safe), locked(store):
        client = connect(store)
        if logged is None:
            experiment = experiment_id(client, store)
            found = find_or_create(client, experiment, run.identity, run.name)
        else:
            experiment, found = logged.experiment_id, client.get_run(logged.run_id)
        if found.info.status != "RUNNING":
            client.update_run(found.info.run_id, status="RUNNING")
        _log_content(client, found, run, {} if known is None else known)
    return logged_run(store, experiment, found.info.run_id)


def mark(logged: LoggedRun, name: str, store: Store, status: str) -> None:
    """Give the run a status such as FAILED or KILLED. Raises StorageError."""
    with clear_errors(store, f"logging that {name!r} ended", "A repeat computes only what is missing."):
        within(MARKING_SECONDS, "marking it", lambda: connect(store).set_terminated(logged.run_id, status=status))


def _log(client: MlflowClient, experiment: str, run: KeptRun, parent: Mapping[str, str]) -> Run:
    found = find_or_create(client, experiment, {**parent, **run.identity}, run.name)
    if parent and found.info.status == "FINISHED":
        return found
    with in_progress(client, found):
        _log_content(client, found, run, {})
    return found


def _log_content(client: MlflowClient, found: Run, run: KeptRun, known: Known) -> None:
    log_values(client, found, run.params, {}, run.tags)
    _log_points(client, found, run.points, known)  # first: a child that is FINISHED is not logged again
    for child in run.children:
        _log(client, found.info.experiment_id, child, {PARENT: found.info.run_id})
    if not run.files:
        return
    with (
        tempfile.TemporaryDirectory() as temporary,
        artifact_errors(f"the files of {run.name}", found.info.artifact_uri, run.safe),
    ):
        for name, content in run.files.items():
            path = Path(temporary) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        replace_artifacts(client, found.info.run_id, Path(temporary))


def _log_points(client: MlflowClient, run: Run, points: Mapping[int, Mapping[str, float]], known: Known) -> None:
    """The points of curves that the run does not hold yet: a value that is there already would become a second point."""
    from mlflow.entities import Metric

    now, new = int(time.time() * 1000), []
    for step, metrics in points.items():
        for name, value in mlflow_metrics(metrics).items():
            if name not in known:
                held = client.get_metric_history(run.info.run_id, name) if name in run.data.metrics else []
                known[name] = {(one.step, one.value) for one in held}
            if (step, float(value)) not in known[name]:
                new.append(Metric(name, float(value), now, step))
    for some in batches(new, 500):
        client.log_batch(run.info.run_id, metrics=some, synchronous=True)
        for one in some:
            known[one.key].add((one.step, one.value))


def _label(client: MlflowClient, experiment: str, labels: Labels) -> None:
    for one in complete_merges(client, experiment):
        label = labels.merges.get(one.data.tags[TAG_FINGERPRINT])
        if label is None and labels.tag in one.data.tags:
            client.delete_tag(one.info.run_id, labels.tag)
        elif label is not None and one.data.tags.get(labels.tag) != label:
            client.set_tag(one.info.run_id, labels.tag, label)
