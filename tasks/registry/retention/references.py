"""What MLflow refers to: the registered versions and the recent runs. Nothing here changes MLflow but the tag of deleted weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ota_core.errors import StorageError
from ota_core.frozen import Frozen
from tasks.tracking.names import EXPERIMENT, REGISTERED_MODEL
from tasks.tracking.registered import CHAMPION, TAG_DIGEST, TAG_REPLACED, TAG_SOURCE, TAG_WEIGHTS_DELETED
from tasks.tracking.run import TAG_FINGERPRINT, TAG_LOGGED
from tasks.tracking.store import clear_errors, connect, pages, resolve_store

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Version(Frozen):
    """One version of a registered model."""

    model: str
    number: str
    fingerprint: str | None
    """Of the recipe, which is the name of the merged artifact."""
    uri: str | None
    wanted: str | None
    """Why it must stay: its aliases, or that the champion replaced it. None where nothing says so."""
    weights_deleted: bool


class References(Frozen):
    """Everything that MLflow says of artifacts."""

    versions: tuple[Version, ...]
    merges: frozenset[str]
    """Recipe fingerprints of the merges that recent runs logged."""
    digests: frozenset[str]
    """Of every model that a recent run or a wanted version names: what it made, base and experts."""
    models: Mapping[str, str]
    """Recipe fingerprint to the digest of the merged model, of all runs and versions."""
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
        """Versions with an alias, the one that the champion replaced, and runs that were started, ended or logged again ``since``.

        Raises StorageError when MLflow cannot be asked.
        """
        with self._asked("reading what is in use") as client:
            found = _Found()
            _versions(client, found, _runs(client, since, found))
            return References(**vars(found))

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


class _Found:
    """``References`` as they are gathered."""

    def __init__(self) -> None:
        self.versions: list[Version] = []
        self.merges: set[str] = set()
        self.digests: set[str] = set()
        self.models: dict[str, str] = {}
        self.problems: list[str] = []

    def note(self, tags: Mapping[str, str]) -> None:
        """Which model is that of a recipe."""
        if TAG_FINGERPRINT in tags and TAG_DIGEST in tags:
            self.models[tags[TAG_FINGERPRINT]] = tags[TAG_DIGEST]


def _runs(client: MlflowClient, since: datetime, found: _Found) -> dict[str, Any]:
    """Every run of the experiment by its id; what the recent ones name is noted."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = pages(client.search_runs, experiment_ids=[experiment.experiment_id]) if experiment else ()
    by_id: dict[str, Any] = {}
    for run in runs:
        by_id[run.info.run_id] = run
        found.note(run.data.tags)
        last = max(run.info.start_time, run.info.end_time or 0) / 1000
        # The day that a run was logged again is a tag; all of that day counts.
        if last >= since.timestamp() or run.data.tags.get(TAG_LOGGED, "") >= since.date().isoformat():
            found.merges |= {run.data.tags[TAG_FINGERPRINT]} if TAG_FINGERPRINT in run.data.tags else set()
            found.digests |= _named(run)
    return by_id


def _versions(client: MlflowClient, found: _Found, runs: Mapping[str, Any]) -> None:
    """The versions of every registered model that this tool registers merges in: nights may have names of their own."""
    by_model: dict[str, dict[str, Any]] = {}
    for one in pages(client.search_model_versions):
        by_model.setdefault(one.name, {})[str(one.version)] = one
    for model, versions in sorted(by_model.items()):
        # What others registered says nothing of the artifacts here.
        if model != REGISTERED_MODEL and not any(TAG_FINGERPRINT in one.tags for one in versions.values()):
            continue
        wanted = _wanted(client, model, versions, found.problems)
        for number, one in sorted(versions.items(), key=lambda item: int(item[0])):
            found.note(one.tags)
            found.versions.append(
                Version(
                    model=model, number=number, fingerprint=one.tags.get(TAG_FINGERPRINT), uri=one.tags.get(TAG_SOURCE) or one.source,
                    wanted=wanted.get(number), weights_deleted=TAG_WEIGHTS_DELETED in one.tags,
                )
            )  # fmt: skip
            if number in wanted:
                found.digests |= {one.tags[TAG_DIGEST]} if TAG_DIGEST in one.tags else set()
                found.digests |= _named(runs[one.run_id]) if one.run_id in runs else set()


def _wanted(client: MlflowClient, model: str, versions: Mapping[str, Any], problems: list[str]) -> dict[str, str]:
    """Why each version that must stay does, by its number; the champion's reason before others."""
    aliases = {alias: str(number) for alias, number in client.get_registered_model(model).aliases.items()}
    wanted: dict[str, str] = {}
    for alias, number in sorted(aliases.items(), key=lambda item: (item[0] != CHAMPION, item)):
        if number in versions:
            wanted.setdefault(number, alias)
        else:
            problems.append(f"the alias {alias} names version {number}, which is not there")
    champion = versions.get(aliases.get(CHAMPION, ""))
    replaced = champion.tags.get(TAG_REPLACED) if champion is not None else None
    if replaced and replaced in versions:
        wanted.setdefault(replaced, "replaced by the champion")
    elif replaced:
        problems.append(f"the champion replaced version {replaced}, which is not there: no rollback is possible")
    return wanted


def _named(run: Any) -> set[str]:
    """Digests that a run names: of the model that it made or scored, and of its inputs, as ``log_merge`` notes them."""
    digests = {run.data.tags.get(TAG_DIGEST)}
    for one in run.inputs.dataset_inputs:
        try:
            noted = json.loads(one.dataset.source)  # MLflow's own field holds the digest's beginning alone
        except ValueError:
            continue
        digests.add(noted.get("digest") if isinstance(noted, dict) else None)
    return {digest for digest in digests if digest}
