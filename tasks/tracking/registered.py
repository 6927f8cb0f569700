"""The registered model: versions that point at weights where they lie, one per digest, never a copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ota_core.errors import OtaError
from ota_core.reading import printable
from tasks.tracking.names import REGISTERED_MODEL
from tasks.tracking.run import REFERENCE
from tasks.tracking.store import NAME_LENGTH, Store, quoted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
TAG_DIGEST = "model_digest"
TAG_SOURCE = "source_uri"
TAG_DECISION = "gate/decision"
"""Which alias the gate gave a version: ``champion`` or ``challenger``."""
TAG_REPLACED = "replaced_champion"
"""Of a champion: the number of the version that it replaced, to which a rollback returns."""
TAG_WEIGHTS_DELETED = "weights_deleted"
"""When ``ota gc`` deleted the weights of a version (UTC); such a version must not be promoted."""
# Set once the alias has been dealt with, so that a later call for the same digest never moves it again.
_ANNOUNCED = "announced"


def register_version(
    client: MlflowClient,
    store: Store,
    *,
    run_id: str,
    uri: str,
    digest: str,
    tags: Mapping[str, str],
    description: str,
    name: str = REGISTERED_MODEL,
) -> str:
    """The version of the registered model that has this digest, made when there is none; its number as a string.

    A new version, or one that an interrupted call had left without it, gets the alias ``challenger`` if it is the newest, unless the
    gate has named another one: merges by hand never take its place. A version that was there already is left as it is, aliases
    included: promotion is decided elsewhere.
    """
    _ensure_model(client, name)
    version = find_version(client, digest, name=name)
    if version is None:
        client.create_model_version(
            name,
            source=_source(store, uri, run_id),
            run_id=run_id,
            tags={**tags, TAG_DIGEST: digest, TAG_SOURCE: uri},
            description=description,
            await_creation_for=0,
        )
        # Two clients may have registered the same digest at once: the older version stands, for both.
        same = _versions(client, digest, name=name)
        version = same[0]
        for extra in same[1:]:
            if extra.run_id == run_id:
                client.delete_model_version(name, extra.version)
    if TAG_WEIGHTS_DELETED in version.tags:  # they were computed again
        client.delete_model_version_tag(name, version.version, TAG_WEIGHTS_DELETED)
    if version.tags.get(_ANNOUNCED) != "true":
        newest = max(int(v.version) for v in client.search_model_versions(f"name='{name}'", order_by=["version_number DESC"]))
        if int(version.version) == newest and not _judged_challenger(client, name):
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        set_announced(client, version.version, name=name)
    return str(version.version)


def _judged_challenger(client: MlflowClient, name: str) -> bool:
    number = client.get_registered_model(name).aliases.get(CHALLENGER)
    return number is not None and TAG_DECISION in client.get_model_version(name, str(number)).tags


def set_announced(client: MlflowClient, version: str, *, name: str = REGISTERED_MODEL) -> None:
    """Note that the version's alias has been decided on: registering its digest again leaves the aliases alone."""
    client.set_model_version_tag(name, version, _ANNOUNCED, "true")


def find_version(client: MlflowClient, digest: str, *, name: str = REGISTERED_MODEL) -> ModelVersion | None:
    """The version with this digest, the oldest where there are several, or None."""
    found = _versions(client, digest, name=name)
    return found[0] if found else None


def _versions(client: MlflowClient, digest: str, *, name: str) -> list[ModelVersion]:
    found = client.search_model_versions(f"name='{name}' and {quoted({TAG_DIGEST: digest})}")
    return sorted(found, key=lambda v: int(v.version))


def check_model_name(name: str) -> None:
    """Raise OtaError for what MLflow does not take, or cannot look for, as the name of a registered model."""
    if not name or len(name) > NAME_LENGTH or set(name) & set("/:'\"`%") or name != printable(name):
        raise OtaError(
            f"registered_model: got {name[:80]!r}, expected a name of at most {NAME_LENGTH} characters without slashes, colons and quotes"
        )


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Merged models, by reference: the weights lie at each version's source.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _source(store: Store, uri: str, run_id: str) -> str:
    """What MLflow records as the version's source: the weights' own place where MLflow allows it.

    A tracking server refuses local paths outside the run's artifacts, so for those the source is the reference among the
    artifacts, and the tag ``source_uri`` holds the path.
    """
    remote = "://" in uri and not uri.startswith("file:")
    return uri if remote or not store.is_server else f"runs:/{run_id}/{REFERENCE}"
