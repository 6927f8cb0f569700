"""Publishing: a merged model copied to ``<root>/<name>/<version>/``, its record last, and ``latest.json`` that points to one of them.

A reader who follows ``latest.json`` finds a complete model, whatever was interrupted. A version once published never changes, and
nothing is ever deleted here.
"""

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from ota_core.artifact import RECORD, Record
from ota_core.errors import StorageError
from ota_core.frozen import Frozen
from tasks.artifacts.store import record_at
from tasks.registry.promotion import PromotionError, current
from tasks.storage import models as storage
from tasks.storage.cache import appearing, locked
from tasks.storage.s3 import expected_checksums
from tasks.tracking.names import REGISTERED_MODEL
from tasks.tracking.registered import CHAMPION
from tasks.tracking.run import REPORT

LATEST = "latest.json"


class Latest(Frozen):
    """``latest.json``."""

    name: str
    version: str
    uri: str
    """The version's folder."""
    digest: str
    published_at: str
    """UTC, ISO 8601."""
    mlflow_run: str | None = None


def publish(source_uri: str, *, root: str, name: str, version: str, cache: Path) -> int:
    """Copy a merged model, an artifact in S3 or in a folder, to ``<root>/<name>/<version>/``; within S3 on the server.

    What is there already is not copied again, and a half-made copy is completed. In S3 the record is written last, after every
    copied object was compared with its source; in a folder everything appears in one step. ``cache`` holds the lock and, from
    S3 to a folder, the download. Returns how many files were copied, the record among them.

    Raises StorageError for a source that is not complete, another model under the same version, files that the model does not have, and a
    copy that does not equal its source.
    """
    target = version_uri(root, name, version)
    record = record_at(source_uri)
    if record is None:
        raise StorageError(
            f"{source_uri} holds no complete model ({RECORD} or a file that it lists is missing); merge its recipe again, then publish"
        )
    with locked(cache.absolute(), f"publish {target}"):
        if _is_published(record, target):
            return 0
        copied = _to_s3(source_uri, target, record) if storage.is_s3(target) else _to_folder(source_uri, target, record, cache)
        if not _is_published(record, target):
            raise StorageError(f"{target} is not complete after it was written; see what else writes there, then publish again")
        return copied


def point_latest(root: str, name: str, version: str, digest: str, *, mlflow_run: str | None = None) -> Latest:
    """Have ``<root>/<name>/latest.json`` name this version, in one write; where it does already, it stays as it is.

    Raises StorageError when the version is not completely there.
    """
    uri = version_uri(root, name, version)
    if record_at(uri) is None:
        raise StorageError(f"{uri} holds no complete model for {LATEST} to point to; publish version {version} first")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    latest = Latest(name=name, version=version, uri=uri, digest=digest, published_at=now, mlflow_run=mlflow_run)
    held = read_latest(root, name)
    if held is not None and held.model_copy(update={"published_at": now}) == latest:
        return held
    storage.write_note(_latest_uri(root, name), latest.model_dump_json(indent=2) + "\n")
    return latest


def read_latest(root: str, name: str) -> Latest | None:
    """What ``latest.json`` says, None where there is none. Raises StorageError when it is damaged or the root cannot be read."""
    place = _latest_uri(root, name)
    content = storage.read_note(place)
    try:
        return None if content is None else Latest.model_validate_json(content)
    except ValueError as error:
        raise StorageError(
            f"{place} cannot be read as a pointer to a version ({error}); move it away, then publish again"
        ) from None


def publish_champion(
    root: str, *, cache: Path, tracking_uri: str | None = None, tracking: Path | None = None, name: str = REGISTERED_MODEL
) -> Latest:
    """Publish the registered model's champion and have ``latest.json`` point to it; again is fine, and finishes what was interrupted.

    ``tracking`` is the folder of the embedded MLflow. When the champion changes meanwhile, the new one is published too. Raises
    PromotionError when there is no champion, StorageError.
    """
    while True:
        champion = current(CHAMPION, tracking_uri=tracking_uri, root=tracking, name=name)
        if champion is None:
            raise PromotionError(f"{name!r} has no champion to publish; make one with: ota promote VERSION")
        publish(champion.source_uri, root=root, name=name, version=champion.version, cache=cache)
        latest = point_latest(root, name, champion.version, champion.digest, mlflow_run=champion.run_id)
        after = current(CHAMPION, tracking_uri=tracking_uri, root=tracking, name=name)
        if after is not None and after.version == champion.version:
            return latest


def version_uri(root: str, name: str, version: str) -> str:
    """The folder of a published version."""
    return storage.join(storage.absolute(root), name, version)


def _latest_uri(root: str, name: str) -> str:
    return storage.join(storage.absolute(root), name, LATEST)


def _is_published(record: Record, target: str) -> bool:
    """Whether this model lies there, complete. Raises StorageError when another one does."""
    there = record_at(target)
    if there is None:
        return False
    if (there.kind, there.fingerprint, there.files) != (record.kind, record.fingerprint, record.files):
        raise StorageError(
            f"{target} holds another model ({there.kind} {there.fingerprint}, not {record.kind} {record.fingerprint}); "
            "a published version never changes: publish under another name or root"
        )
    return True


def _to_s3(source: str, target: str, record: Record) -> int:
    """Copy what is missing or different, compare, and write the record last. Returns how many objects were written."""
    there = {one.uri.removeprefix(f"{target}/") for one in storage.list_objects(target)}
    if RECORD in there:
        raise StorageError(
            f"{target} holds a {RECORD}, but not the files that it lists: somebody removed or replaced them; "
            "delete what is left there, then publish again"
        )
    strangers = sorted(there - {*record.files, REPORT})
    if strangers:  # a loader would take them for parts of the model
        raise StorageError(f"{target} holds {', '.join(strangers[:5])}, no file of the model; delete it, or publish elsewhere")
    if not storage.is_s3(source):
        return len(storage.upload_folder(Path(source), target, last=RECORD))
    names = [*record.files, *_report(source)]
    pairs = {storage.join(source, name): storage.join(target, name) for name in names}
    missing = {one: copy for one, copy in pairs.items() if not _equal(one, copy, surely=True)}
    storage.copy_objects(missing)
    wrong = [copy for one, copy in missing.items() if not _equal(one, copy, surely=False)]
    if wrong:
        raise StorageError(f"{', '.join(wrong[:5])}: the copy differs from {source}; publish again")
    storage.write_bytes(storage.join(target, RECORD), storage.read_bytes(storage.join(source, RECORD)), only_if_absent=True)
    return len(missing) + 1


def _report(source: str) -> list[str]:
    """The report beside a model, which is published with it; none for a merge that was not benchmarked."""
    place = storage.join(source, REPORT)
    return [REPORT] if (storage.exists(place) if storage.is_s3(place) else Path(place).is_file()) else []


def _equal(one: str, other: str, *, surely: bool) -> bool:
    """Whether two objects have one size and one checksum; without a common kind of checksum only if need not be ``surely``."""
    first, second = storage.head(one), storage.head(other)
    if first is None or second is None or first["ContentLength"] != second["ContentLength"]:
        return False
    a, b = expected_checksums(first), expected_checksums(second)
    common = a.keys() & b.keys()
    return all(a[kind] == b[kind] for kind in common) and bool(common or not surely)


def _to_folder(source: str, target: str, record: Record, cache: Path) -> int:
    """Copy into a temporary sibling, the record last, and rename. Copies, not links: nobody's edit may reach the artifact."""
    place = Path(target)
    if place.exists():
        raise StorageError(f"{target} exists, but holds no complete model; move it away, then publish again")
    names = [*record.files, *_report(source), RECORD]
    folder = storage.download_folder(source, cache=cache, names=names)[0] if storage.is_s3(source) else Path(source)
    with appearing(place) as temporary:
        for name in names:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, temporary / name)
            with open(temporary / name, "rb") as stream:
                os.fsync(stream.fileno())  # no power failure may leave a published folder with holes
    return len(names)
