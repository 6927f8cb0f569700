"""The summary of a study in MLflow: one run with its tables and figures, found again by its tag."""

from collections.abc import Mapping
from pathlib import Path

from tasks.tracking_run import TAG_FINGERPRINT, LoggedRun
from tasks.tracking_store import clear_errors, connect, experiment_id, locked, page_url, resolve_store
from tasks.tracking_write import TAG_ROLE, find_or_create, in_progress, log_values

TAG_STUDY = "study"
ROLE = "study"


def log_study(
    name: str, folder: Path, *, params: Mapping[str, str | int], metrics: Mapping[str, float], tracking_uri: str | None = None,
    root: Path | None = None,
) -> LoggedRun:  # fmt: skip
    """Log a study's folder as the artifacts of one run, known by the study's name; a repeated study replaces them. Raises StorageError."""
    store = resolve_store(tracking_uri=tracking_uri, root=root)
    with clear_errors(store, f"logging the study {name!r}", f"Its tables and figures lie in {folder}."), locked(store):
        client = connect(store)
        experiment = experiment_id(client, store)
        run = find_or_create(client, experiment, {TAG_ROLE: ROLE, TAG_STUDY: name}, f"study {name}")
        with in_progress(client, run):
            log_values(client, run, params, metrics, {})
            client.log_artifacts(run.info.run_id, str(folder))
    url = page_url(store.shown, experiment, run.info.run_id) if store.is_server else None
    return LoggedRun(run_id=run.info.run_id, experiment_id=experiment, url=url, model_version=None)


def logged_merges(*, tracking_uri: str | None = None, root: Path | None = None) -> set[str]:
    """Fingerprints of the merges whose runs are complete. Raises StorageError."""
    store = resolve_store(tracking_uri=tracking_uri, root=root)
    found: set[str] = set()
    with clear_errors(store, "looking up merges that are logged", "Nothing was changed."), locked(store):
        client = connect(store)
        experiments, token = [experiment_id(client, store)], None
        wanted = f"attributes.status = 'FINISHED' AND tags.`{TAG_FINGERPRINT}` LIKE '%'"
        while True:
            page = client.search_runs(experiments, filter_string=wanted, max_results=1000, page_token=token)
            found |= {run.data.tags[TAG_FINGERPRINT] for run in page}
            token = page.token
            if not token:
                return found
