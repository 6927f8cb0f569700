"""The merges of an MLflow experiment, read back as tables, and the files that go with a run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ota_core.errors import OtaError
from ota_core.recipe.yaml_text import nearest
from tasks.tracking.names import EXPERIMENT
from tasks.tracking.run import SAMPLES, TAG_FINGERPRINT, TAG_SUITE_KEY, Benchmarked
from tasks.tracking.store import Store, clear_errors, connect, pages
from tasks.tracking.write import PARENT, TAG_ROLE

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclass(frozen=True)
class Experiment:
    """What an experiment holds of merges, with the columns of ``mlflow.search_runs``: ``params.…``, ``metrics.…``, ``tags.…``."""

    id: str
    name: str
    merges: pd.DataFrame
    """A row per merge, newest first."""
    models: pd.DataFrame
    """A row per model that was benchmarked with one of them: base, experts, merge."""


def read_experiment(
    store: Store, name: str = EXPERIMENT, *, filter_string: str = "", since_ms: int | None = None, last: int | None = None
) -> Experiment:
    """The merges of an experiment that pass MLflow's ``filter_string`` and were started since a time, of these the ``last`` newest.

    Raises OtaError for an experiment that is not there and a filter that MLflow does not take, StorageError when it cannot be asked.
    """
    wanted = [f"tags.`{TAG_FINGERPRINT}` LIKE '%'", *([f"attributes.start_time >= {since_ms}"] if since_ms is not None else [])]
    with clear_errors(store, f"reading the experiment {name!r}", "Nothing was written."):
        client = connect(store)
        experiment = _experiment(client, store, name)
        if filter_string.strip():
            _check_filter(client, experiment, filter_string)
            wanted.append(filter_string.strip())
        ask = partial(pages, client.search_runs, experiment_ids=[experiment])
        merges = _table(islice(ask(filter_string=" and ".join(wanted), order_by=["attributes.start_time DESC"]), last))
        models = _table(ask(filter_string=f"tags.`{TAG_ROLE}` LIKE '%'"))
    parents = set(merges["run_id"]) if len(merges) else set()
    below = f"tags.{PARENT}"
    models = models[models[below].isin(parents)] if below in models else models.iloc[:0]
    return Experiment(id=experiment, name=name, merges=merges, models=models)


def read_benchmarked(store: Store, run_id: str) -> Benchmarked | None:
    """The documents' scores that a run holds; None where it was logged without any, as older versions did.

    Raises OtaError for a file that is none, StorageError when MLflow cannot be asked.
    """
    with clear_errors(store, f"reading the documents' scores of the run {run_id}", "Nothing was written."):
        client = connect(store)
        if TAG_SUITE_KEY not in client.get_run(run_id).data.tags:
            return None
        with tempfile.TemporaryDirectory() as folder:
            try:
                return Benchmarked.from_bytes(Path(client.download_artifacts(run_id, SAMPLES, folder)).read_bytes())
            except OtaError as error:
                raise OtaError(f"run {run_id}, {SAMPLES}: {error}") from None


def _experiment(client: MlflowClient, store: Store, name: str) -> str:
    from mlflow.entities import ViewType

    found = client.get_experiment_by_name(name)
    if found is None or found.lifecycle_stage != "active":
        known = [one.name for one in client.search_experiments(view_type=ViewType.ACTIVE_ONLY)]
        raise OtaError(f"MLflow at {store.shown} has no experiment {name!r}; {nearest(name, known)}")
    return str(found.experiment_id)


def _check_filter(client: MlflowClient, experiment: str, filter_string: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.search_runs([experiment], filter_string=filter_string, max_results=1)
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise OtaError(
            f"filter {filter_string!r}: {str(error).splitlines()[0]}. MLflow's filters look like "
            "params.density = '0.4' and metrics.`score/avg` > 0.2, joined with and"
        ) from None


def _table(runs: Iterable[Run]) -> pd.DataFrame:
    """A row per run, with the columns of ``mlflow.search_runs``, which asks the process's own store alone."""
    import pandas as pd

    rows = [
        {
            **{name: getattr(run.info, name) for name in ("run_id", "experiment_id", "status")},
            "start_time": pd.to_datetime(run.info.start_time, unit="ms", utc=True),
            **{
                f"{kind}.{key}": value for kind in ("metrics", "params", "tags") for key, value in getattr(run.data, kind).items()
            },
        }
        for run in runs
    ]
    return pd.DataFrame(rows, columns=None if rows else ["run_id"])


def complete_merges(client: MlflowClient, experiment: str) -> Iterator[Run]:
    """The runs of merges that are logged to their end."""
    wanted = f"attributes.status = 'FINISHED' AND tags.`{TAG_FINGERPRINT}` LIKE '%'"
    return pages(client.search_runs, experiment_ids=[experiment], filter_string=wanted)
