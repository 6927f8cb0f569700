"""The store of stage outputs: ``<root>/<kind>/<fingerprint>/`` with ``record.json`` last; each is computed once.

The root is a folder or ``s3://bucket/prefix``. What the bytes depend on is in the fingerprint; an output that is there is never
computed again, one whose files are damaged or gone counts as not there.
"""

import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ota_core.artifact import (
    ALGORITHM_VERSION,
    CARD,
    RECORD,
    ArtifactRef,
    Kind,
    Record,
    folder_files,
    has_size,
    missing_files,
    parse_record,
    read_record,
    write_record,
)
from ota_core.errors import ArtifactError
from ota_core.files.room import full_disk
from tasks.artifacts.processes import is_alive, start_time
from tasks.artifacts.system_metrics import sampled
from tasks.settings import Places
from tasks.storage import models as storage
from tasks.storage.cache import link_or_copy, locked, note_use, remove_tree

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)
log.propagate = False
"""Tells of every output that is computed, in no terminal, but in the log of a deployed run (PREFECT_LOGGING_EXTRA_LOGGERS, deployments/prefect.yaml)."""


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a build tells about its output besides the files; it goes into the record."""

    results: Mapping[str, Any] = field(default_factory=dict)
    """What the stage measured. Must be the same when the stage runs again."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What does not decide the bytes: device, versions, sources. Host, time, seconds and what the machine was doing
    (tasks/artifacts/system_metrics.py) are added by the store."""
    taken: Mapping[str, str] = field(default_factory=dict)
    """Files that come from other artifacts of the same root: name here → address there. Local ones become hard links (copies across file
    systems); S3 copies its own on the server."""


@dataclass(frozen=True)
class ArtifactStore:
    """A root of artifacts and the local cache that holds its locks and, for S3, the local copies."""

    root: str
    cache: Path

    def find(self, kind: Kind, fingerprint: str) -> ArtifactRef | None:
        """The artifact if its record is there and lists only files that are there with their sizes, else None.

        Nothing is written in S3. In a folder, the record's time of change notes to the hour that somebody found it. Raises StorageError
        when the root cannot be read.
        """
        uri = self._uri(kind, fingerprint)
        if storage.is_s3(uri):
            record = _remote_record(uri)
        else:
            note_use(Path(uri) / RECORD)  # before the look: who removes looks after the folder has left its place
            record = _local_record(Path(uri))
        if record is None or (record.kind, record.fingerprint) != (kind, fingerprint):
            return None
        return _ref(record, uri)

    def produce(
        self,
        kind: Kind,
        fingerprint: str,
        *,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        build: Callable[[Path], BuildResult],
    ) -> ArtifactRef:
        """The artifact, computed by ``build`` only where the store does not hold it.

        ``build`` fills an empty temporary folder. Of several threads and processes with the same cache that want the same
        artifact, one builds and the others wait for it. When ``build`` raises, nothing is left behind. Raises ArtifactError when
        ``build`` leaves no file.
        """
        found = self.find(kind, fingerprint)
        if found:
            return found
        with self._lock(kind, fingerprint):
            found = self.find(kind, fingerprint)  # another one may have built it while this one waited
            if found:
                return found
            with self._workplace(kind, fingerprint) as temporary, full_disk(temporary):
                started = time.monotonic()
                with sampled() as system:
                    result = build(temporary)
                log.info("made %s %s in %.1f s", kind, fingerprint, time.monotonic() - started)
                uri = self._uri(kind, fingerprint)
                files = dict(sorted((folder_files(temporary) | _take(result.taken, temporary)).items()))
                if not files:
                    raise ArtifactError(
                        f"the build of {kind} {fingerprint} left no file in its folder; it must write at least one"
                    )
                record = Record(
                    kind=kind,
                    fingerprint=fingerprint,
                    algorithm_version=ALGORITHM_VERSION,
                    config=dict(config),
                    inputs=dict(inputs),
                    files=files,
                    results=dict(result.results),
                    provenance={
                        **_provenance(time.monotonic() - started),
                        **({"system": system.series()} if system else {}),
                        **result.provenance,
                    },
                )
                if storage.is_s3(uri):
                    return self._publish_remote(temporary, uri, record, result.taken)
                return self._publish_local(temporary, Path(uri), record)

    def local_path(self, ref: ArtifactRef) -> Path:
        """A local folder with the artifact's files and record: the artifact itself, or its verified copy in the cache.

        Raises ArtifactError when the artifact is no longer complete.
        """
        if not storage.is_s3(ref.uri):
            read_record(Path(ref.uri))
            return Path(ref.uri)
        record = self.read_record(ref)
        copy = self._copy(ref.kind, ref.fingerprint)
        with locked(self.cache, f"copy {copy}"):
            if _local_record(copy) == record:
                note_use(copy / RECORD)
                return copy
            folder, _ = storage.download_folder(ref.uri, cache=self.cache, names=[*record.files, RECORD])
            problems = missing_files(folder, record.files)
            if problems:
                raise ArtifactError(
                    f"{ref.uri} does not hold what its {RECORD} lists: {'; '.join(problems)}. Run its stage again"
                )
        return folder

    def read_record(self, ref: ArtifactRef) -> Record:
        """The artifact's record. Raises ArtifactError when the artifact is not complete."""
        if not storage.is_s3(ref.uri):
            return read_record(Path(ref.uri))
        record = _remote_record(ref.uri)
        if record is None:
            raise ArtifactError(f"{ref.uri} holds no complete artifact any more; run its stage again")
        return record

    def annotate(self, ref: ArtifactRef, notes: Mapping[str, str]) -> None:
        """Write what became known of an artifact after it was made beside its files: the model card again, or files that its record does
        not list. Each in one step; the artifact's own bytes stay as they are. Raises ArtifactError for a name that the record lists.
        """
        taken = sorted((set(notes) - {CARD}) & {*self.read_record(ref).files, RECORD})
        if taken:
            raise ArtifactError(f"{ref.uri} holds {', '.join(taken)} as part of the artifact; a note needs another name")
        for name, text in notes.items():
            place = storage.join(ref.uri, name)
            if storage.read_note(place) != text.encode():  # what is there already is left as it is
                storage.write_note(place, text)

    def delete(self, ref: ArtifactRef, *, unless: Callable[[str], bool] | None = None) -> bool:
        """Remove the artifact, its record first, and tell whether that was done. One that is gone already is fine.

        ``unless``, asked under the artifact's lock with the place where its files lie then, spares it by True.
        """
        with self._lock(ref.kind, ref.fingerprint):
            if not storage.is_s3(ref.uri):
                asked = (lambda folder: unless(str(folder))) if unless else None
                return not Path(ref.uri).is_dir() or remove_tree(Path(ref.uri), unless=asked)
            if unless and unless(ref.uri):
                return False
            storage.delete_prefix(ref.uri, first=RECORD)
            shutil.rmtree(self._copy(ref.kind, ref.fingerprint), ignore_errors=True)
            return True

    def _uri(self, kind: Kind, fingerprint: str) -> str:
        return storage.join(storage.absolute(self.root), kind, fingerprint)

    def _copy(self, kind: Kind, fingerprint: str) -> Path:
        """Where the copy of a remote artifact lies that was built on this machine."""
        bucket_and_prefix = self.root.removeprefix("s3://").strip("/").replace("/", "+")
        return self.cache / "artifacts" / bucket_and_prefix / kind / fingerprint

    def _lock(self, kind: Kind, fingerprint: str) -> Any:
        return locked(self.cache, f"artifact {self._uri(kind, fingerprint)}")

    @contextmanager
    def _workplace(self, kind: Kind, fingerprint: str) -> Iterator[Path]:
        """An empty folder beside the place where the output will lie, removed at the end if it is still there."""
        uri = self._uri(kind, fingerprint)
        target = self._copy(kind, fingerprint) if storage.is_s3(uri) else Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        if target.exists():
            remove_tree(target)  # incomplete: find() did not take it
        temporary = target.parent / f".{fingerprint}.{_owner()}.{time.monotonic_ns()}.tmp"
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _publish_local(self, temporary: Path, target: Path, record: Record) -> ArtifactRef:
        _flush(temporary, record.files)
        write_record(temporary, record)
        try:
            os.rename(temporary, target)
        except OSError:
            # Somebody with another cache, hence another lock, was faster: theirs counts.
            found = self.find(record.kind, record.fingerprint)
            if found is None:
                raise
            return found
        _flush(target.parent, [])
        return _ref(record, str(target))

    def _publish_remote(self, temporary: Path, uri: str, record: Record, taken: Mapping[str, str]) -> ArtifactRef:
        """Blobs first, the record last and only if there is none yet: a reader never sees a record without its files."""
        found = self.find(record.kind, record.fingerprint)
        if found:  # another machine, with a lock of its own, was faster
            return found
        if storage.exists(storage.join(uri, RECORD)):
            storage.delete_prefix(uri, first=RECORD)  # a record whose files are gone
        storage.copy_objects({source: storage.join(uri, name) for name, source in taken.items()})
        if set(record.files) - set(taken):
            storage.upload_folder(temporary, uri)
        write_record(temporary, record)
        content = (temporary / RECORD).read_bytes()
        if not storage.write_bytes(storage.join(uri, RECORD), content, only_if_absent=True):
            found = self.find(record.kind, record.fingerprint)
            if found is None:
                raise ArtifactError(f"another machine published {uri} at the same time with other files; delete it and run again")
            return found
        if not taken:  # else what is here is not the whole artifact
            os.rename(temporary, self._copy(record.kind, record.fingerprint))
        return _ref(record, uri)


def store_of(places: Places) -> ArtifactStore:
    """The store of this installation's artifacts."""
    return ArtifactStore(places.artifacts, places.cache)


def record_at(uri: str) -> Record | None:
    """The record of the complete output in a folder or below a prefix in S3; None where there is none, or some of its files are gone.

    Raises StorageError when S3 cannot be read.
    """
    return _remote_record(uri) if storage.is_s3(uri) else _local_record(Path(uri))


def _take(taken: Mapping[str, str], folder: Path) -> dict[str, int]:
    """Link files of other artifacts into the folder; those in S3 stay there for now. Returns their sizes. Raises ArtifactError."""
    sizes: dict[str, int] = {}
    for name, source in taken.items():
        if storage.is_s3(source):
            answer = storage.head(source)
            if answer is None:
                raise ArtifactError(f"{source} is not there any more; run its stage again")
            sizes[name] = int(answer["ContentLength"])
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            link_or_copy(Path(source), folder / name)
        except FileNotFoundError:
            raise ArtifactError(f"{source} is not there any more; run its stage again") from None
        sizes[name] = (folder / name).stat().st_size
    return sizes


def _ref(record: Record, uri: str) -> ArtifactRef:
    return ArtifactRef(kind=record.kind, fingerprint=record.fingerprint, uri=uri, bytes=sum(record.files.values()))


def _local_record(folder: Path) -> Record | None:
    """The record of a complete folder, None for one that is not complete: that is what it means to be not there."""
    if not (folder / RECORD).is_file():
        return None
    try:
        return read_record(folder)
    except ArtifactError:
        return None


def _remote_record(uri: str) -> Record | None:
    """As ``_local_record``, from one listing."""
    listed = storage.objects_below(uri)
    if RECORD not in listed:
        return None
    try:
        record = parse_record(storage.read_bytes(listed[RECORD].uri))
    except ValueError:
        return None
    if any(name not in listed or not has_size(name, listed[name].size, size) for name, size in record.files.items()):
        return None
    return record


def _provenance(seconds: float) -> dict[str, Any]:
    return {
        "produced_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "python": platform.python_version(),
        "seconds": round(seconds, 3),
        **({"work_pool": os.environ["OTA_WORK_POOL"]} if os.environ.get("OTA_WORK_POOL") else {}),
    }


def _flush(folder: Path, files: Mapping[str, int] | list[str]) -> None:
    """Have the system put the files and the folder itself on the disk: no power failure may leave a record over holes."""
    for path in (*(folder / name for name in files), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _owner() -> str:
    """This process, in a form that outlives it: host, process id, start time."""
    return f"{platform.node()}.{os.getpid()}.{int(start_time(os.getpid()))}"


def _remove_stale(folder: Path) -> None:
    """Remove the temporaries of processes of this host that are dead. Others may be in use."""
    for path in folder.glob(f".*.{platform.node()}.*.*.*.tmp"):
        pid, created = path.name.split(".")[-4:-2]
        if not is_alive(int(pid), float(created)):
            shutil.rmtree(path)
