"""What MLflow refers to: the registered versions and the recent runs. Nothing here changes MLflow but the tag of deleted weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from ota_core.errors import StorageError
from tasks.tracking.names import EXPERIMENT, REGISTERED_MODEL
from tasks.tracking.registered import CHAMPION, TAG_DIGEST, TAG_REPLACED, TAG_SOURCE, TAG_WEIGHTS_DELETED
from tasks.tracking.run import TAG_FINGERPRINT
from tasks.tracking.store import clear_errors, connect, pages, resolve_store

if TYPE_CHECKING:
    from mlflow import MlflowClient


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Version(_Frozen):
    """One version of a registered model."""

    model: str
    number: str
    fingerprint: str | None
    """Of the recipe, which is the name of the merged artifact."""
    uri: str | None
    digest: str | None
    wanted: str | None
    """Why it must stay: its aliases, or that the champion replaced it. None where nothing says so."""
    inputs: frozenset[str] = frozenset()
    """Digests of base and experts; looked up for wanted versions only."""
    weights_deleted: bool


class Run(_Frozen):
    """One recent run of a merge."""

    fingerprint: str
    digest: str | None
    inputs: frozenset[str]
    """Digests of base and experts."""


class References(_Frozen):
    """Everything that MLflow says of artifacts."""

    versions: tuple[Version, ...]
    runs: tuple[Run, ...]
    problems: tuple[str, ...] = ()
    """References that lead nowhere."""


class Tracking:
    """MLflow, read for its references."""

    def __init__(self, *, tracking_uri: str | None, root: Path) -> None:
        """The store as ``resolve_store`` finds it. Raises StorageError where an embedded database should be and is not."""
        self._store = resolve_store(tracking_uri=tracking_uri, root=root)
        database = self._store.uri.removeprefix("sqlite:///")
        if database != self._store.uri and not Path(database).is_file():
            raise StorageError(
                f"there is no MLflow database {database}, so nothing tells which artifacts are in use, and nothing was deleted. "
                "Name the server with --tracking-uri or MLFLOW_TRACKING_URI, or the folder of the database with --home"
            )

    @property
    def shown(self) -> str:
        return self._store.shown

    def references(self, since: datetime) -> References:
        """Versions with an alias, the one that the champion replaced, and runs that were started or ended ``since``.

        Raises StorageError when MLflow cannot be asked.
        """
        with self._asked("reading what is in use") as client:
            versions, problems = _versions(client)
            return References(versions=versions, runs=_runs(client, since), problems=problems)

    def mark_deleted(self, version: Version, deleted: bool) -> None:
        """Set, or take back, the tag that says that a version's weights are gone. Raises StorageError."""
        with self._asked(f"marking version {version.number} of {version.model}") as client:
            if deleted:
                now = datetime.now(UTC).isoformat(timespec="seconds")
                client.set_model_version_tag(version.model, version.number, TAG_WEIGHTS_DELETED, now)
            else:
                client.delete_model_version_tag(version.model, version.number, TAG_WEIGHTS_DELETED)

    @contextmanager
    def _asked(self, doing: str) -> Iterator[MlflowClient]:
        safe = "No artifact is deleted while MLflow does not say what is in use."
        with clear_errors(self._store, doing, safe):
            yield connect(self._store)


def _versions(client: MlflowClient) -> tuple[tuple[Version, ...], tuple[str, ...]]:
    """The versions of every registered model that this tool registers merges in: nights may have names of their own."""
    by_model: dict[str, dict[str, Any]] = {}
    for one in pages(client.search_model_versions):
        by_model.setdefault(one.name, {})[str(one.version)] = one
    versions: list[Version] = []
    problems: list[str] = []
    for model, found in sorted(by_model.items()):
        # What others registered says nothing of the artifacts here.
        if model == REGISTERED_MODEL or any(TAG_FINGERPRINT in one.tags for one in found.values()):
            of_model, wrong = _versions_of(client, model, found)
            versions += of_model
            problems += wrong
    return tuple(versions), tuple(problems)


def _versions_of(client: MlflowClient, model: str, found: dict[str, Any]) -> tuple[list[Version], list[str]]:
    aliases = dict(client.get_registered_model(model).aliases)
    wanted: dict[str, list[str]] = {}
    for alias, number in sorted(aliases.items()):
        wanted.setdefault(str(number), []).append(alias)
    problems = [
        f"the alias {', '.join(names)} names version {n}, which is not there" for n, names in wanted.items() if n not in found
    ]
    champion = found.get(str(aliases.get(CHAMPION)))
    replaced = champion.tags.get(TAG_REPLACED) if champion is not None else None
    if replaced in found:
        wanted.setdefault(replaced, []).append("replaced by the champion")
    elif replaced:
        problems.append(f"the champion replaced version {replaced}, which is not there: no rollback is possible")
    versions = [
        Version(
            model=model, number=number, fingerprint=one.tags.get(TAG_FINGERPRINT), uri=one.tags.get(TAG_SOURCE) or one.source,
            digest=one.tags.get(TAG_DIGEST), wanted=_first(wanted.get(number)), weights_deleted=TAG_WEIGHTS_DELETED in one.tags,
            inputs=_inputs_of(client, one.run_id) if number in wanted else frozenset(),
        )
        for number, one in sorted(found.items(), key=lambda item: int(item[0]))
    ]  # fmt: skip
    return versions, problems


def _first(names: list[str] | None) -> str | None:
    """One reason of several, the champion's first."""
    return min(names, key=lambda name: (name != CHAMPION, names.index(name))) if names else None


def _runs(client: MlflowClient, since: datetime) -> tuple[Run, ...]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return ()
    start = int(since.timestamp() * 1000)
    found: dict[str, Any] = {}
    for time in ("start_time", "end_time"):
        asked = f"attributes.{time} >= {start} and tags.`{TAG_FINGERPRINT}` LIKE '%'"
        for run in pages(client.search_runs, experiment_ids=[experiment.experiment_id], filter_string=asked):
            found[run.info.run_id] = run
    return tuple(
        Run(
            fingerprint=run.data.tags[TAG_FINGERPRINT],
            digest=run.data.tags.get(TAG_DIGEST),
            inputs=_inputs(run),
        )
        for _, run in sorted(found.items())
    )


def _inputs_of(client: MlflowClient, run_id: str | None) -> frozenset[str]:
    """Of the run that registered a version; nothing where there is no such run any more."""
    from mlflow.exceptions import MlflowException

    try:
        return _inputs(client.get_run(run_id)) if run_id else frozenset()
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return frozenset()


def _inputs(run: Any) -> frozenset[str]:
    return frozenset(filter(None, (_digest(one.dataset.source) for one in run.inputs.dataset_inputs)))


def _digest(source: str) -> str | None:
    """The whole digest of an input, as ``log_merge`` notes it; MLflow's own field holds its beginning."""
    try:
        noted = json.loads(source)
    except ValueError:
        return None
    return noted.get("digest") if isinstance(noted, dict) else None
