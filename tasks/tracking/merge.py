"""One merge in MLflow: a run with its scores, artifacts and lineage, a child run per benchmarked model, and a version of
the registered model.

Everything is found again by tags, so that logging the same merge twice, or again after a failure in the middle, ends in one run.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from tasks.artifacts.system_metrics import SystemPoint
from tasks.tracking.models import INPUT, MERGE, external_model, link, note_version
from tasks.tracking.registered import TAG_DIGEST, TAG_SOURCE, register_version
from tasks.tracking.run import (
    DOCUMENTS_JSON,
    SCORES_JSON,
    TAG_COMMIT,
    TAG_FINGERPRINT,
    TAG_LOGGED,
    ChildRun,
    InputRef,
    LoggedRun,
    MergeRun,
    logged_run,
    uncertainty,
    write_artifacts,
)
from tasks.tracking.store import (
    artifact_errors,
    batches,
    clear_errors,
    connect,
    experiment_id,
    locked,
    mlflow_names,
    open_hint,
    resolve_store,
)
from tasks.tracking.view import show_columns
from tasks.tracking.write import NOTE, PARENT, TAG_ROLE, find_or_create, in_progress, log_values

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

    from tasks.evaluation.scores import ModelScores

__all__ = ["ChildRun", "InputRef", "LoggedRun", "MergeRun", "log_benchmark", "log_merge", "open_hint"]

TAG_MODEL = "model_name"
TAG_SCORES = "scores_fingerprint"
SCORES_OF_ONE = "scores.json"
_TABLES = "mlflow.loggedArtifacts"


def log_merge(run: MergeRun, *, tracking_uri: str | None = None, root: Path | None = None) -> LoggedRun:
    """Log one merge, or bring the run that logged it before up to date.

    The store is ``tracking_uri``, else ``MLFLOW_TRACKING_URI``, else SQLite under ``root``. The run is known by the recipe's
    fingerprint and the model's digest. It reads FINISHED only when everything is there, children and model version included;
    after an error it reads FAILED, after a kill RUNNING, and the next call continues it. Threads and processes may log at the
    same time. Raises StorageError, within about a minute, when the store is away or refuses.
    """
    store = resolve_store(tracking_uri=tracking_uri, root=root)
    safe = f"Nothing is lost: the merged model lies at {run.model_uri}, and a repeat continues in the same run."
    with clear_errors(store, f"logging {run.name!r}", safe), locked(store):
        client = connect(store)
        experiment = experiment_id(client, store)
        parent = find_or_create(client, experiment, {TAG_FINGERPRINT: run.fingerprint, TAG_DIGEST: run.model_digest}, run.name)
        run_id = parent.info.run_id
        with in_progress(client, parent):
            tags = {**run.tags, "method": run.method, TAG_SOURCE: run.model_uri, TAG_LOGGED: datetime.now(UTC).date().isoformat()}
            if TAG_COMMIT in run.tags:
                tags["mlflow.source.git.commit"] = run.tags[TAG_COMMIT]
            if run.benchmarked is not None:
                tags |= run.benchmarked.tags()
            shown = [path for path in (SCORES_JSON, DOCUMENTS_JSON) if path in run.tables or (path == SCORES_JSON and run.table)]
            if shown:
                tags[_TABLES] = json.dumps([{"path": path, "type": "table"} for path in shown])
            if NOTE not in parent.data.tags:  # a description that somebody edited stays
                tags[NOTE] = _without_head(run.model_card) or f"Merged weights: `{run.model_uri}`"
            models = _models(client, experiment, run_id, run)
            log_values(client, parent, {"merge_method": run.method, **run.params}, run.metrics, tags, models[run.model_digest])
            show_columns(client, experiment, sorted(n for n in mlflow_names(run.metrics).values() if n.startswith("score/")))
            client.log_inputs(run_id, datasets=[_dataset(i) for i in run.inputs])
            link(client, parent, [models[i.digest] for i in run.inputs if i.digest in models], models[run.model_digest])
            _log_system(client, run_id, run.system)
            _log_artifacts(client, parent, run)
            scored_on = [_dataset(one) for one in run.inputs if one.role == "data"]
            for child in run.children:
                _log_child(client, experiment, run_id, child, models.get(child.digest), scored_on)
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
                note_version(client, models[run.model_digest], run.registered_model, version)
    return logged_run(store, experiment, run_id, version)


def _without_head(card: str | None) -> str | None:
    """The model card without its YAML, which MLflow would show as text in front of everything."""
    head, mark, text = (card or "").partition("\n---\n")
    return text.lstrip("\n") if mark and head.startswith("---\n") else card


def log_benchmark(
    name: str, *, source: str, digest: str, fingerprint: str, scores: ModelScores, data: InputRef | None = None,
    tracking_uri: str | None = None, root: Path | None = None,
) -> LoggedRun:  # fmt: skip
    """Log one model's scores on a suite as a run of its own, known by the scores' ``fingerprint``: of model, suite and data. ``data``: the suite as an
    input of the run.

    Raises StorageError.
    """
    store, safe = resolve_store(tracking_uri=tracking_uri, root=root), "The scores are kept as an artifact."
    with clear_errors(store, f"logging the scores of {name!r}", safe), locked(store):
        client = connect(store)
        experiment = experiment_id(client, store)
        identity = {TAG_ROLE: "benchmark", TAG_SCORES: fingerprint}
        run = find_or_create(client, experiment, identity, f"benchmark {name}")
        metrics = scores.metrics() | uncertainty(scores)
        with in_progress(client, run):
            params = {"model": source or name, "suite": scores.suite, "limit": scores.limit or "none", **scores.asked()}
            log_values(client, run, params, metrics, {TAG_SOURCE: source, TAG_DIGEST: digest})
            client.log_inputs(run.info.run_id, datasets=[_dataset(data)] if data else [])
            table = scores.model_dump(mode="json")
            with artifact_errors(SCORES_OF_ONE, run.info.artifact_uri, safe):
                client.log_dict(run.info.run_id, table, SCORES_OF_ONE)
    return logged_run(store, experiment, run.info.run_id)


def _log_child(
    client: MlflowClient, experiment: str, parent_id: str, child: ChildRun, model_id: str | None, data: list[DatasetInput]
) -> None:
    """The run of one benchmarked model, below the merge's. Its scores are also the model's own in MLflow's table of models."""
    identity = {PARENT: parent_id, TAG_ROLE: child.role, TAG_MODEL: child.name}
    run = find_or_create(client, experiment, identity, child.name)
    with in_progress(client, run):
        params = {"model": child.name, "role": child.role} | ({"capability": child.capability} if child.capability else {})
        log_values(client, run, params, child.metrics, {TAG_DIGEST: child.digest}, model_id)
        client.log_inputs(run.info.run_id, datasets=data)
        if model_id:
            link(client, run, [model_id])


def _models(client: MlflowClient, experiment: str, run_id: str, run: MergeRun) -> dict[str, str]:
    """Digest to MLflow's id of every model that the merge read, and of the one that it made."""
    models = {
        one.digest: external_model(
            client, experiment, name=one.name, uri=one.source, digest=one.digest, kind=INPUT, tags={TAG_ROLE: one.role}
        )
        for one in run.inputs
        if one.role != "data"
    }
    made = external_model(
        client, experiment, name=run.name, uri=run.model_uri, digest=run.model_digest, kind=MERGE, run_id=run_id,
        tags={TAG_FINGERPRINT: run.fingerprint, TAG_ROLE: "merge"},
    )  # fmt: skip
    return {**models, run.model_digest: made}


def _log_system(client: MlflowClient, run_id: str, points: Sequence[SystemPoint]) -> None:
    """What the machines were doing, at the times when it was; points that an earlier call logged are left out.

    Of several machines each has a group of its own, as MLflow does for the nodes of a training.
    """
    from mlflow.entities import Metric

    hosts = {point.host for point in points}
    rows: list[Metric] = []
    for host in sorted(hosts):
        prefix = f"system/{host}/" if len(hosts) > 1 else "system/"
        series: dict[str, list[tuple[int, float]]] = {}
        for point in sorted((one for one in points if one.host == host), key=lambda one: one.time):
            for name, value in point.values.items():
                series.setdefault(f"{prefix}{name}", []).append((int(point.time * 1000), value))
        names = mlflow_names(series)
        for key, values in series.items():
            old = client.get_metric_history(run_id, names[key])
            last = max((one.timestamp for one in old), default=-1)
            new = [(at, value) for at, value in values if at > last]
            rows += [Metric(names[key], value, at, len(old) + step) for step, (at, value) in enumerate(new)]
    for some in batches(rows, 1000):
        client.log_batch(run_id, metrics=some, synchronous=True)


def _dataset(ref: InputRef) -> DatasetInput:
    """An input as MLflow's lineage shows it. The digest is cut for its tables; the source holds it whole."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    scheme = ref.source.split("://", 1)[0] if "://" in ref.source else ""
    kind = {"": "local" if ref.source.startswith((".", "/")) else "hub", "file": "local"}.get(scheme, scheme)
    source = json.dumps({"uri": ref.source, "digest": ref.digest})
    profile = json.dumps(ref.profile) if ref.profile else None
    data = Dataset(name=ref.name[:500], digest=ref.digest[:16], source_type=kind, source=source, profile=profile)
    return DatasetInput(data, [InputTag("mlflow.data.context", ref.role)])


def suite_data(scores: ModelScores, data_digest: str | None, data_dir: str | None) -> InputRef:
    """What a model was scored on as an input of its run: the documents, or where lm-eval reads public ones, the suite that names them."""
    counted: dict[str, str | int] = {"num_rows": sum(scores.documents.values()), "limit": scores.limit or "none"}
    return InputRef(
        name=f"suite {scores.suite}", source=data_dir or "lm-eval", digest=data_digest or scores.suite_digest, role="data",
        profile={"suite_digest": scores.suite_digest, "lm_eval": scores.lm_eval_version, **counted},
    )  # fmt: skip


def _log_artifacts(client: MlflowClient, parent: Run, run: MergeRun) -> None:
    """Write all files to a temporary folder, then upload them in one call. Files of an earlier call are replaced."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_artifacts(folder, run)
        with artifact_errors("the artifacts", parent.info.artifact_uri, f"The merged model lies safe at {run.model_uri}."):
            client.log_artifacts(parent.info.run_id, str(folder))
