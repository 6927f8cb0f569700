"""Files of a run that a repeat replaces as a whole: what is no longer made is taken away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient


def replace_artifacts(client: MlflowClient, run_id: str, folder: Path) -> None:
    """Log a folder's files among a run's artifacts, and delete those of an earlier folder that this one has no longer.

    Uploaded first, so that a failure in between leaves too many files rather than too few. What lies beside the folder's own
    top-level names is left alone.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client.log_artifacts(run_id, str(folder))
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for top in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        for stale in sorted(set(_files(client, run_id, top)) - kept):
            # The client has no way to delete one; the repositories of folders, of S3 and of MLflow's own server have.
            uri = client.get_run(run_id).info.artifact_uri
            get_artifact_repository(uri, tracking_uri=client.tracking_uri).delete_artifacts(stale)


def _files(client: MlflowClient, run_id: str, path: str) -> Iterator[str]:
    for one in client.list_artifacts(run_id, path):
        if one.is_dir:
            yield from _files(client, run_id, one.path)
        else:
            yield one.path
