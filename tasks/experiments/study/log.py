"""A study in MLflow: one run with its tables and figures, found again by its tag, and a tag on the run of every merge of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tasks.evaluation.scores import mlflow_metric_name
from tasks.tracking.artifacts import replace_artifacts
from tasks.tracking.experiment import complete_merges
from tasks.tracking.run import TAG_FINGERPRINT, LoggedRun, logged_run
from tasks.tracking.store import Store, artifact_errors, clear_errors, connect, experiment_id, locked
from tasks.tracking.write import TAG_ROLE, find_or_create, in_progress, log_values

TAG_STUDY = "study"
ROLE = "study"
CONFIG = "study.json"
"""The study as it was run, among the run's artifacts."""


def study_tag(name: str) -> str:
    """The tag by which the merges of a study are found, such as ``study.demo``; a merge may be in several. Its value is the cell's label."""
    return mlflow_metric_name(f"{TAG_STUDY}.{name}")


def log_study(
    name: str, folder: Path, *, config: str, tags: Mapping[str, str], metrics: Mapping[str, float], merges: Mapping[str, str],
    store: Store,
) -> LoggedRun:  # fmt: skip
    """Log a study's folder as the artifacts of one run, known by the study's name; a repeated study replaces them.

    ``config``: the study as JSON, among the artifacts; ``tags``: what is to be seen of it at once. Not params, which MLflow never changes:
    a study that grew would for ever be described as it first was. ``merges``: fingerprint to the cell's label; their runs get the study's tag, and those of merges that the study has no longer lose
    it. Raises StorageError.
    """
    safe = f"Its tables and figures lie in {folder}."
    with clear_errors(store, f"logging the study {name!r}", safe), locked(store):
        client = connect(store)
        experiment = experiment_id(client, store)
        run = find_or_create(client, experiment, {TAG_ROLE: ROLE, TAG_STUDY: name}, f"study {name}")
        with in_progress(client, run):
            log_values(client, run, {}, metrics, tags)
            with artifact_errors("the tables and figures", run.info.artifact_uri, safe):
                replace_artifacts(client, run.info.run_id, folder)
                client.log_text(run.info.run_id, config, CONFIG)
            tag = study_tag(name)
            for one in complete_merges(client, experiment):
                label = merges.get(one.data.tags[TAG_FINGERPRINT])
                if label is None and tag in one.data.tags:
                    client.delete_tag(one.info.run_id, tag)
                elif label is not None and one.data.tags.get(tag) != label:
                    client.set_tag(one.info.run_id, tag, label)
    return logged_run(store, experiment, run.info.run_id)


def logged_merges(store: Store) -> set[str]:
    """Fingerprints of the merges whose runs are complete. Raises StorageError."""
    with clear_errors(store, "looking up merges that are logged", "Nothing was changed."), locked(store):
        client = connect(store)
        return {run.data.tags[TAG_FINGERPRINT] for run in complete_merges(client, experiment_id(client, store))}
