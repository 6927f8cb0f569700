"""A search in MLflow: one run of role ``search``, and below it one of role ``trial`` for every trial, logged as it ends.

Everything is found again by tags: what an interrupted search has logged is not logged twice.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.runtime import flow_run

from tasks.experiments.search.search import Trial, Tuned
from tasks.tracking.kept_run import KeptRun
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
    mlflow_name,
    mlflow_names,
    pages,
    quoted,
)
from tasks.tracking.write import PARENT, TAG_ROLE, find_or_create

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TAG_SEARCH = "search"
TAG_TRIAL = "trial"
_SAFE = "The search itself keeps every trial, and a repeat goes on with the next."


def _identity(search: str) -> dict[str, str]:
    return {TAG_ROLE: "search", TAG_SEARCH: search}


def fingerprint(search: str) -> str:
    """Of the search with this name in its storage, among what is kept for MLflow."""
    return KeptRun(name="", identity=_identity(search)).fingerprint


def begin(name: str, search: str, params: Mapping[str, object], store: Store) -> LoggedRun:
    """The run of the search with this name in its storage, RUNNING; made when it is missing. Raises StorageError."""
    with clear_errors(store, f"logging {name!r}", _SAFE), locked(store):
        client = connect(store)
        experiment = experiment_id(client, store)
        found = find_or_create(client, experiment, _identity(search), name)
        client.update_run(found.info.run_id, status="RUNNING")
        _log(client, found, params, {}, {TAG_FLOW_RUN: str(flow_run.id)} if flow_run.id else {})
    return logged_run(store, experiment, found.info.run_id)


def logged_trials(parent: LoggedRun, store: Store) -> set[int]:
    """The numbers of the trials that have their whole run below the search's already. Raises StorageError."""
    with clear_errors(store, "reading the trials of the search", _SAFE):
        wanted = quoted({PARENT: parent.run_id, TAG_ROLE: "trial"})
        runs = pages(connect(store).search_runs, experiment_ids=[parent.experiment_id], filter_string=wanted)
        return {int(run.data.tags[TAG_TRIAL]) for run in runs if run.info.status == "FINISHED"}


def log_trial(parent: LoggedRun, trial: Trial, best: Trial, store: Store) -> None:
    """One trial as a run below the search's, with the scores of every rung: the metric's step is the number of documents.

    ``best`` of the trials so far becomes a point of the search's own curve, at the trial's number. Raises StorageError.
    """
    name = f"trial {trial.number}"
    with clear_errors(store, f"logging {name} of the search", _SAFE), locked(store):
        client = connect(store)
        identity = {PARENT: parent.run_id, TAG_ROLE: "trial", TAG_TRIAL: str(trial.number)}
        run = find_or_create(client, parent.experiment_id, identity, name)
        if run.info.status == "FINISHED":
            return
        params, points, tags = _of_trial(trial)
        _log(client, run, params, points, tags)
        text = trial.recipe.to_yaml()
        with artifact_errors(f"the recipe of {name}", run.info.artifact_uri, _SAFE):
            client.log_text(run.info.run_id, text, "recipe.yaml")
        owner = client.get_run(parent.run_id)  # first: a trial that is FINISHED is not logged again
        _log(client, owner, {}, {trial.number: _curve(best)}, {})
        client.set_terminated(run.info.run_id, status="FINISHED")


def finish(parent: LoggedRun, tuned: Tuned, files: Mapping[str, str | bytes], store: Store) -> None:
    """The winner's scores on the search's run, and files by their paths among its artifacts; the run is FINISHED. Raises StorageError."""
    with clear_errors(store, "logging the end of the search", _SAFE), locked(store):
        client = connect(store)
        metrics, tags = _of_search(tuned)
        run = client.get_run(parent.run_id)
        _log(client, run, {}, {0: metrics}, tags)
        with tempfile.TemporaryDirectory() as temporary:
            for name, content in files.items():
                path = Path(temporary) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
            with artifact_errors("the files of the search", run.info.artifact_uri, _SAFE):
                client.log_artifacts(parent.run_id, temporary)
        client.set_terminated(parent.run_id, status="FINISHED")


def fail(parent: LoggedRun, store: Store, status: str) -> None:
    """Mark the search's run as FAILED or KILLED. A repeat goes on in the same run. Raises StorageError."""
    with clear_errors(store, "logging that the search ended", _SAFE), locked(store):
        connect(store).set_terminated(parent.run_id, status=status)


def search_run(
    name: str, search: str, params: Mapping[str, object], tuned: Tuned, files: Mapping[str, str | bytes], flow_run_id: str | None
) -> KeptRun:
    """The whole search as it is kept where MLflow is away: the same runs as those above, found by the same tags."""
    children, points, metrics, tags = [], dict[int, dict[str, float]](), *_of_search(tuned)
    for trial in tuned.trials:
        own, steps, marks = _of_trial(trial)
        children.append(
            KeptRun(
                name=f"trial {trial.number}", identity={TAG_ROLE: "trial", TAG_TRIAL: str(trial.number)}, params=_texts(own), tags=marks,
                points=steps, files={"recipe.yaml": trial.recipe.to_yaml().encode()},
            )
        )  # fmt: skip
        points[trial.number] = _curve(tuned.best_until(trial))
    points[0] = points.get(0, {}) | metrics
    return KeptRun(
        name=name, identity=_identity(search), params=_texts(params),
        tags=tags | ({TAG_FLOW_RUN: flow_run_id} if flow_run_id else {}), points=points, children=tuple(children), safe=_SAFE,
        files={path: content if isinstance(content, bytes) else content.encode() for path, content in files.items()},
    )  # fmt: skip


def _of_trial(trial: Trial) -> tuple[dict[str, object], dict[int, dict[str, float]], dict[str, str]]:
    """(params, metrics by the number of documents, tags) of a trial's run."""
    points = {limit: _metrics(scores) for limit, scores in trial.scores.items()}
    points[max(points)]["violation"] = trial.violation
    tags = {"pruned": str(not trial.complete).lower(), "feasible": str(not trial.shortfall).lower(), "origin": trial.origin}
    return {"merge_method": trial.recipe.merge_method, **trial.values}, points, tags


def _of_search(tuned: Tuned) -> tuple[dict[str, float], dict[str, str]]:
    """(metrics, tags) of the search's run at its end."""
    best = tuned.best
    metrics = _metrics(best.last) | {"violation": best.violation, "start/avg": tuned.start.average}
    metrics |= {"evaluations": tuned.evaluations, "trials": float(len(tuned.trials))}
    return metrics, {"feasible": str(tuned.feasible).lower(), "best_trial": str(best.number)}


def _curve(best: Trial) -> dict[str, float]:
    return {"best/avg": best.average, "best/violation": best.violation}


def _texts(params: Mapping[str, object]) -> dict[str, str]:
    return {key: str(value) for key, value in params.items()}


def _metrics(scores: Mapping[str, float]) -> dict[str, float]:
    return {f"score/{name}": value for name, value in scores.items()} | {"score/avg": sum(scores.values()) / len(scores)}


def _log(
    client: MlflowClient, run: Run, params: Mapping[str, object], points: Mapping[int, Mapping[str, float]], tags: Mapping[str, str]
) -> None:  # fmt: skip
    """What the run does not hold yet, in one request. ``points``: step to metrics."""
    from mlflow.entities import Metric, Param, RunTag

    now = int(time.time() * 1000)
    names = mlflow_names(params)
    new = [Param(name, cut(str(params[key]), PARAM_LENGTH)) for key, name in names.items() if name not in run.data.params]
    rows = [(mlflow_name(key), value, step) for step, some in points.items() for key, value in some.items()]
    # A value that is there already would become a second point of a curve.
    known = {name for name, *_ in rows} & set(run.data.metrics)
    held = {(name, one.value, one.step) for name in known for one in client.get_metric_history(run.info.run_id, name)}
    metrics = [Metric(name, value, now, step) for name, value, step in rows if (name, value, step) not in held]
    marks = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
    client.log_batch(run.info.run_id, params=new, metrics=metrics, tags=marks, synchronous=True)
