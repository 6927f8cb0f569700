"""One merge in MLflow: a run with its scores, artifacts and lineage, a child run per benchmarked model, and a version of
the registered model.

Everything is found again by tags, so that logging the same merge twice, or again after a failure in the middle, ends in one run.
"""

from __future__ import annotations

import getpass
import json
import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ota_core.errors import StorageError
from tasks.registry import TAG_DIGEST, TAG_SOURCE, register_version
from tasks.tracking_run import (
    SCORES_JSON,
    TAG_COMMIT,
    TAG_FINGERPRINT,
    ChildRun,
    InputRef,
    LoggedRun,
    MergeRun,
    write_artifacts,
)
from tasks.tracking_store import (
    NAME_LENGTH,
    PARAM_LENGTH,
    TAG_LENGTH,
    batches,
    clear_errors,
    connect,
    cut,
    experiment_id,
    locked,
    mlflow_names,
    open_hint,
    page_url,
    quoted,
    resolve_store,
    show_columns,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

    from tasks.scores import ModelScores

__all__ = ["ChildRun", "InputRef", "LoggedRun", "MergeRun", "log_benchmark", "log_merge", "open_hint"]

log = logging.getLogger(__name__)

TAG_ROLE = "role"
TAG_MODEL = "model_name"
TAG_SCORES = "scores_fingerprint"
SCORES_OF_ONE = "scores.json"
_PARENT = "mlflow.parentRunId"
_NOTE = "mlflow.note.content"
_TABLES = "mlflow.loggedArtifacts"


def log_merge(run: MergeRun, *, tracking_uri: str | None = None, root: Path | None = None) -> LoggedRun:
    """Log one merge, or bring the run that logged it before up to date.

    The store is ``tracking_uri``, else ``MLFLOW_TRACKING_URI``, else SQLite under ``root``. The run is known by the recipe's
    fingerprint and the model's digest. It reads FINISHED only when everything is there, children and model version included;
    after an error it reads FAILED, after a kill RUNNING, and the next call continues it. Threads and processes may log at the
    same time. Raises StorageError, within about a minute, when the store is away or refuses; OtaError for a table that cannot be
    drawn.
    """
    store = resolve_store(tracking_uri=tracking_uri, root=root)
    safe = f"Nothing is lost: the merged model lies at {run.model_uri}, and a repeat continues in the same run."
    with clear_errors(store, f"logging {run.name!r}", safe), locked(store):
        client = connect(store)
        experiment = experiment_id(client, store)
        parent = _find_or_create(client, experiment, {TAG_FINGERPRINT: run.fingerprint, TAG_DIGEST: run.model_digest}, run.name)
        run_id = parent.info.run_id
        with _in_progress(client, parent):
            tags = {**run.tags, "method": run.method, TAG_SOURCE: run.model_uri}
            if TAG_COMMIT in run.tags:
                tags["mlflow.source.git.commit"] = run.tags[TAG_COMMIT]
            if run.table:
                tags[_TABLES] = json.dumps([{"path": SCORES_JSON, "type": "table"}])
            if _NOTE not in parent.data.tags:  # a description that somebody edited stays
                tags[_NOTE] = run.model_card or f"Merged weights: `{run.model_uri}`"
            _log_values(client, parent, {"merge_method": run.method, **run.params}, run.metrics, tags)
            show_columns(client, experiment, sorted(n for n in mlflow_names(run.metrics).values() if n.startswith("score/")))
            client.log_inputs(run_id, datasets=[_dataset(i) for i in run.inputs])
            _log_artifacts(client, parent, run)
            for child in run.children:
                _log_child(client, experiment, run_id, child)
            version = None
            if run.registered_model is not None:
                version = register_version(
                    client,
                    store,
                    run_id=run_id,
                    uri=run.model_uri,
                    digest=run.model_digest,
                    tags={TAG_FINGERPRINT: run.fingerprint, "method": run.method},
                    description=f"{run.name}: weights at {run.model_uri}",
                    name=run.registered_model,
                )
    url = page_url(store.shown, experiment, run_id) if store.is_server else None
    return LoggedRun(run_id=run_id, experiment_id=experiment, url=url, model_version=version)


def log_benchmark(
    name: str, *, source: str, digest: str, fingerprint: str, scores: ModelScores, tracking_uri: str | None = None,
    root: Path | None = None,
) -> LoggedRun:  # fmt: skip
    """Log one model's scores on a suite as a run of its own, known by the scores' ``fingerprint``: of model, suite and data.

    Raises StorageError.
    """
    store = resolve_store(tracking_uri=tracking_uri, root=root)
    with clear_errors(store, f"logging the scores of {name!r}", "The scores are kept as an artifact."), locked(store):
        client = connect(store)
        experiment = experiment_id(client, store)
        identity = {TAG_ROLE: "benchmark", TAG_SCORES: fingerprint}
        run = _find_or_create(client, experiment, identity, f"benchmark {name}")
        metrics = {f"score/{key}": value for key, value in scores.by_capability().items() if value is not None}
        if scores.average is not None:
            metrics["score/avg"] = scores.average
        with _in_progress(client, run):
            params = {"model": source or name, "suite": scores.suite, "limit": scores.limit or "none"}
            _log_values(client, run, params, metrics, {TAG_SOURCE: source, TAG_DIGEST: digest})
            client.log_dict(run.info.run_id, scores.model_dump(mode="json"), SCORES_OF_ONE)
    url = page_url(store.shown, experiment, run.info.run_id) if store.is_server else None
    return LoggedRun(run_id=run.info.run_id, experiment_id=experiment, url=url, model_version=None)


def _find_or_create(client: MlflowClient, experiment: str, identity: Mapping[str, str], name: str) -> Run:
    """The experiment's run with these tags; made when there is none."""
    found = _find(client, experiment, identity)
    if found is not None:
        return found
    made = client.create_run(experiment, run_name=name, tags={**identity, **_origin()})
    # A server cannot look and make in one step. Two clients that made the same run at once agree here on the older.
    oldest = _find(client, experiment, identity) or made
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


def _find(client: MlflowClient, experiment: str, identity: Mapping[str, str]) -> Run | None:
    # A child that is the merge itself carries the merge's digest, too, but never the recipe's fingerprint.
    found = client.search_runs([experiment], filter_string=quoted(identity))
    return min(found, key=lambda r: (r.info.start_time, r.info.run_id), default=None)


@contextmanager
def _in_progress(client: MlflowClient, run: Run) -> Iterator[None]:
    """RUNNING inside, FINISHED after, FAILED after an error. A run that was complete before stays FINISHED all along."""
    if run.info.status == "FINISHED":
        yield
        return
    run_id = run.info.run_id
    if run.info.status != "RUNNING":
        client.update_run(run_id, status="RUNNING")
    try:
        yield
    except Exception as error:
        try:
            client.set_terminated(run_id, status="FAILED")
        except Exception as second:  # the store is away: the first error says so, and must not be hidden by this one
            error.add_note(f"the run {run_id} could not be marked as failed either: {second}")
        raise
    client.set_terminated(run_id, status="FINISHED")


def _log_values(
    client: MlflowClient, run: Run, params: Mapping[str, Any], metrics: Mapping[str, float], tags: Mapping[str, str]
) -> None:
    """Log what the run does not hold yet. Params are immutable in MLflow: the first value stays, another one is kept as a tag."""
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
    named = {name: metrics[key] for key, name in mlflow_names(metrics).items()}
    # A value that is there already would become a second point of a curve.
    new_metrics = [Metric(n, float(v), now, 0) for n, v in named.items() if run.data.metrics.get(n) != float(v)]
    rows = [RunTag(k, v) for k, v in new_tags.items() if run.data.tags.get(k) != v]
    groups = zip_longest(batches(new_params, 100), batches(new_metrics, 500), batches(rows, 100), fillvalue=())
    for some_params, some_metrics, some_tags in groups:  # one request, for all but the longest lists
        client.log_batch(run.info.run_id, params=some_params, metrics=some_metrics, tags=some_tags, synchronous=True)


def _log_child(client: MlflowClient, experiment: str, parent_id: str, child: ChildRun) -> None:
    """The run of one benchmarked model, below the merge's."""
    identity = {_PARENT: parent_id, TAG_ROLE: child.role, TAG_MODEL: child.name}
    run = _find_or_create(client, experiment, identity, child.name)
    with _in_progress(client, run):
        params = {"model": child.name, "role": child.role} | ({"capability": child.capability} if child.capability else {})
        _log_values(client, run, params, child.metrics, {TAG_DIGEST: child.digest})


def _dataset(ref: InputRef) -> DatasetInput:
    """An input as MLflow's lineage shows it. The digest is cut for its tables; the source holds it whole."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    scheme = ref.source.split("://", 1)[0] if "://" in ref.source else ""
    kind = {"": "local" if ref.source.startswith((".", "/")) else "hub", "file": "local"}.get(scheme, scheme)
    source = json.dumps({"uri": ref.source, "digest": ref.digest})
    data = Dataset(name=ref.name[:500], digest=ref.digest[:16], source_type=kind, source=source)
    return DatasetInput(data, [InputTag("mlflow.data.context", ref.role)])


def _log_artifacts(client: MlflowClient, parent: Run, run: MergeRun) -> None:
    """Write all files to a temporary folder, then upload them in one call. Files of an earlier call are replaced."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_artifacts(folder, run)
        try:
            client.log_artifacts(parent.info.run_id, str(folder))
        except Exception as error:  # each kind of artifact store raises its own exceptions
            raise StorageError(
                f"the artifacts of the run {parent.info.run_id} could not be stored at {parent.info.artifact_uri} ({error}). "
                f"The merged model lies safe at {run.model_uri}. Check access to the artifact store, then run the same again"
            ) from error
