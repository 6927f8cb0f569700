"""A tuning in MLflow: one run of role ``tune``, with every step as a point of its curves as it ends."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from uuid import uuid4

from prefect.runtime import flow_run

from tasks.experiments.tune.learn import Learned, Step
from tasks.tracking.run import TAG_FLOW_RUN, LoggedRun, logged_run
from tasks.tracking.store import (
    PARAM_LENGTH,
    Store,
    artifact_errors,
    clear_errors,
    connect,
    cut,
    experiment_id,
    locked,
    mlflow_metrics,
    mlflow_names,
)
from tasks.tracking.write import TAG_ROLE, find_or_create

_SAFE = "Nothing was written to OUT yet."


def begin(name: str, params: Mapping[str, object], store: Store) -> LoggedRun:
    """The run of this flow run, RUNNING; made when it is missing. Raises StorageError."""
    from mlflow.entities import Param

    with clear_errors(store, f"logging {name!r}", _SAFE), locked(store):
        client = connect(store)
        experiment = experiment_id(client, store)
        identity = {TAG_ROLE: "tune", TAG_FLOW_RUN: str(flow_run.id or uuid4())}
        run = find_or_create(client, experiment, identity, name)
        client.update_run(run.info.run_id, status="RUNNING")
        new = {name: cut(str(params[key]), PARAM_LENGTH) for key, name in mlflow_names(params).items()}
        kept = [Param(name, value) for name, value in new.items() if name not in run.data.params]
        client.log_batch(run.info.run_id, params=kept, synchronous=True)
    return logged_run(store, experiment, run.info.run_id)


def log_step(logged: LoggedRun, step: Step, store: Store) -> None:
    """The losses of one step: ``loss/train`` and, where it was looked at, ``loss/held_out``, each also by capability. Raises StorageError."""
    from mlflow.entities import Metric

    metrics = {f"loss/train/{name}": value for name, value in step.train.items()}
    if step.train:
        metrics |= {"loss/train": fmean(step.train.values()), "scales/distance": step.distance}
    if step.held_out and step.value is not None:
        metrics |= {f"loss/held_out/{name}": value for name, value in step.held_out.items()}
        metrics |= {"loss/held_out": fmean(step.held_out.values()), "objective": step.value}
    now = int(time.time() * 1000)
    points = [Metric(name, value, now, step.number) for name, value in mlflow_metrics(metrics).items()]
    with clear_errors(store, f"logging step {step.number}", _SAFE):
        connect(store).log_batch(logged.run_id, metrics=points, synchronous=True)


def finish(logged: LoggedRun, learned: Learned, scales: Path, files: Mapping[str, str | bytes], store: Store) -> None:
    """The file of scales and others by their paths among the run's artifacts; the run is FINISHED. Raises StorageError."""
    with clear_errors(store, "logging the end of the tuning", "The recipe and its scales are written."):
        client = connect(store)
        client.set_tag(logged.run_id, "best_step", str(learned.best))
        client.log_metric(logged.run_id, "seconds/tune", learned.steps[-1].seconds)
        with tempfile.TemporaryDirectory() as temporary:
            for name, content in {**files, "scales.safetensors": scales.read_bytes()}.items():
                path = Path(temporary) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
            with artifact_errors("the files of the tuning", logged.run_id, "The recipe and its scales are written."):
                client.log_artifacts(logged.run_id, temporary)
        client.set_terminated(logged.run_id, status="FINISHED")


def fail(logged: LoggedRun, store: Store, status: str) -> None:
    """Mark the run as FAILED or KILLED. Raises StorageError."""
    with clear_errors(store, "logging that the tuning ended", _SAFE):
        connect(store).set_terminated(logged.run_id, status=status)
