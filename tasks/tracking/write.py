"""Runs of MLflow that are found again by their tags, and written so that a repeat changes nothing."""

from __future__ import annotations

import getpass
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from ota_core.errors import OtaError
from tasks.tracking.patience import MARKING_SECONDS, within
from tasks.tracking.store import NAME_LENGTH, PARAM_LENGTH, TAG_LENGTH, batches, cut, mlflow_metrics, mlflow_names, pages, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

TAG_ROLE = "role"
PARENT = "mlflow.parentRunId"
NOTE = "mlflow.note.content"


def find_or_create(client: MlflowClient, experiment: str, identity: Mapping[str, str], name: str) -> Run:
    """The experiment's run with these tags; made when there is none."""
    found = find(client, experiment, identity)
    if found is not None:
        return found
    made = client.create_run(experiment, run_name=name, tags={**identity, **_origin()})
    # A server cannot look and make in one step. Two clients that made the same run at once agree here on the older.
    oldest = find(client, experiment, identity) or made
    if oldest.info.run_id != made.info.run_id:
        client.delete_run(made.info.run_id)
    return oldest


def _origin() -> dict[str, str]:
    """What MLflow's own start of a run would record: who, and with what."""
    tags = {"mlflow.source.name": "ota", "mlflow.source.type": "LOCAL"}
    try:
        return {**tags, "mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # a container's user without a name
        return tags


def find(client: MlflowClient, experiment: str, identity: Mapping[str, str]) -> Run | None:
    """The experiment's run with these tags, of several the oldest."""
    # A child that is the merge itself carries the merge's digest, too, but never the recipe's fingerprint.
    asked = {key: value for key, value in identity.items() if "'" not in value}  # which MLflow's search cannot escape
    found = [
        run
        for run in pages(client.search_runs, experiment_ids=[experiment], filter_string=quoted(asked))
        if all(run.data.tags.get(key) == value for key, value in identity.items())
    ]
    return min(found, key=lambda r: (r.info.start_time, r.info.run_id), default=None)


@contextmanager
def in_progress(client: MlflowClient, run: Run) -> Iterator[None]:
    """RUNNING inside, FINISHED after, FAILED after an error, KILLED where it was cancelled. A run that was complete before stays FINISHED."""
    if run.info.status == "FINISHED":
        yield
        return
    run_id = run.info.run_id
    if run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    try:
        yield
    except BaseException as error:
        status = status_after(error)
        try:
            within(MARKING_SECONDS, "marking it", lambda: client.set_terminated(run_id, status=status))
        except Exception as second:  # the store is away: the first error says so, and must not be hidden by this one
            error.add_note(f"the run {run_id} could not be marked as failed either: {second}")
        raise
    client.set_terminated(run_id, status="FINISHED")


def log_values(
    client: MlflowClient, run: Run, params: Mapping[str, Any], metrics: Mapping[str, float], tags: Mapping[str, str],
    model_id: str | None = None,
) -> None:  # fmt: skip
    """Log what the run does not hold yet. Params are immutable in MLflow: the first value stays, another one is kept as a tag.

    ``model_id``: the model that the metrics are of; its page shows them, too.
    """
    from mlflow.entities import Metric, Param, RunTag

    new_params, new_tags = [], {key: cut(value, TAG_LENGTH) for key, value in tags.items()}
    for key, name in mlflow_names(params).items():
        value = cut(str(params[key]), PARAM_LENGTH)
        old = run.data.params.get(name)
        if old is None:
            new_params.append(Param(name, value))
        elif old != value:
            # The fingerprint and the digest are the same, so this is another spelling, such as the base under another path.
            log.warning("the run %s keeps %s=%r; %r becomes its tag latest/%s", run.info.run_id, name, old, value, name)
            new_tags[f"latest/{name}"[:NAME_LENGTH]] = value
    now = int(time.time() * 1000)
    named = mlflow_metrics(metrics)
    # A value that is there already would become a second point of a curve.
    new_metrics = [
        Metric(n, float(v), now, 0, model_id=model_id) for n, v in named.items() if run.data.metrics.get(n) != float(v)
    ]
    rows = [RunTag(k, v) for k, v in new_tags.items() if run.data.tags.get(k) != v]
    groups = zip_longest(batches(new_params, 100), batches(new_metrics, 500), batches(rows, 100), fillvalue=())
    for some_params, some_metrics, some_tags in groups:  # one request, for all but the longest lists
        client.log_batch(run.info.run_id, params=some_params, metrics=some_metrics, tags=some_tags, synchronous=True)


def status_after(error: BaseException) -> str:
    """The status of a run in MLflow that this ended: KILLED where a user or a signal did."""
    return "FAILED" if isinstance(error, Exception) else "KILLED"


def fails_with(fail: Callable[[str], None]) -> Callable[[type[BaseException] | None, BaseException | None, object], None]:
    """For an ExitStack: where an error ends it, ``fail`` gives the run in MLflow the status FAILED or KILLED, and the error passes."""

    def leave(kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None:
            return
        try:
            fail(status_after(error))
        except OtaError as second:
            error.add_note(str(second))

    return leave
