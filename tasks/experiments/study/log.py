"""A study in MLflow: one run with its tables and figures, found again by its tag, and a tag on the run of every merge of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tasks.evaluation.scores import mlflow_metric_name
from tasks.tracking.experiment import complete_merges
from tasks.tracking.kept_run import KeptRun, Labels
from tasks.tracking.run import TAG_FINGERPRINT
from tasks.tracking.store import Store, clear_errors, connect, experiment_id, locked
from tasks.tracking.write import TAG_ROLE

TAG_STUDY = "study"
ROLE = "study"
CONFIG = "study.json"
"""The study as it was run, among the run's artifacts."""


def study_tag(name: str) -> str:
    """The tag by which the merges of a study are found, such as ``study.demo``; a merge may be in several. Its value is the cell's label."""
    return mlflow_metric_name(f"{TAG_STUDY}.{name}")


def study_run(
    name: str, folder: Path, *, config: str, tags: Mapping[str, str], metrics: Mapping[str, float], merges: Mapping[str, str]
) -> KeptRun:
    """A study's folder as the artifacts of one run, known by the study's name; a repeated study replaces them.

    ``config``: the study as JSON, among the artifacts; ``tags``: what is to be seen of it at once. Not params, which MLflow never changes:
    a study that grew would for ever be described as it first was. ``merges``: fingerprint to the cell's label; their runs get the study's
    tag, and those of merges that the study has no longer lose it.
    """
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    return KeptRun(
        name=f"study {name}", identity={TAG_ROLE: ROLE, TAG_STUDY: name}, tags=dict(tags), points={0: dict(metrics)},
        files=files | {CONFIG: config.encode()}, labels=Labels(tag=study_tag(name), merges=dict(merges)),
        safe=f"Its tables and figures lie in {folder}.",
    )  # fmt: skip


def logged_merges(store: Store) -> set[str]:
    """Fingerprints of the merges whose runs are complete. Raises StorageError."""
    with clear_errors(store, "looking up merges that are logged", "Nothing was changed."), locked(store):
        client = connect(store)
        return {run.data.tags[TAG_FINGERPRINT] for run in complete_merges(client, experiment_id(client, store))}
