"""Models and second moments in S3 as inputs of a merge without downloading them: outlines here, tensors by ranges."""

import hashlib
import os
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from ota_core.errors import StorageError
from ota_core.files.byte_source import ByteSource, MappedFile
from ota_core.files.checkpoint import GGUF
from tasks.storage import models as storage
from tasks.storage import s3
from tasks.storage.cache import FileInfo, blob_path, combined_digest, find_object, link_or_copy, locked
from tasks.storage.download import Progress, download
from tasks.storage.models import Fetched
from tasks.storage.streaming.chunk_cache import ChunkCache
from tasks.storage.streaming.outline import MANIFEST, OutlineFile, outline
from tasks.storage.streaming.remote_file import RemoteFile
from tasks.storage.streaming.verify import Room, Verifier

_HEADS_AT_ONCE = 16
# Of the chunks' memory again this part, for chunks that wait until those before them are checked.
WAITING = 8
# Working memory of the blocks takes another quarter, mapped pages of local inputs a third one.
SHARE = 4


@dataclass(frozen=True)
class _Streamed:
    """One object of which an outline is here."""

    one: s3.S3Object
    file: OutlineFile
    info: FileInfo
    """Its size, and what identifies its content: the manifest's SHA-256 or the ETag."""
    sha256: str | None
    client: Any
    """Of boto3, as it was when the object was found: files are opened in any thread."""


class Streams:
    """The inputs of one merge that lie in S3. ``source_of`` belongs into ``ModelInput``; close it after the merge."""

    def __init__(self, *, cache: Path, memory: int, may_download: bool = True, sums: Sequence[Path] = ()) -> None:
        """``memory``: the budget of the merge, of which chunks take a quarter. ``may_download``: what cannot be read by ranges.

        ``sums``: folders that ``check_whole`` filled, on any machine: what is read of their files is compared with that.
        """
        self.notes: list[str] = []
        """What the user should know: which files had to be downloaded, or, without ``may_download``, would have to be."""
        self.unread: list[Path] = []
        """Outlines of files that are needed, cannot be read by ranges, and were not downloaded."""
        self._cache, self._may_download = cache.absolute(), may_download
        self._chunks = ChunkCache(memory // SHARE)
        self._room, self._verifiers = Room(max(self._chunks.limit // WAITING, self._chunks.chunk)), dict[Path, Verifier]()
        self._known: dict[Path, _Streamed] = {}
        self._sums = sums
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the transfers that are under way and let go of the memory."""
        self._chunks.close()

    def model(self, source: str) -> Fetched:
        """A checkpoint in S3, as outlines. Its digest is over (name, size, SHA-256 by ``expert.json`` or else ETag) and says which.

        Raises StorageError as ``storage.fetch``.
        """
        found = storage.find_model(source)
        _check_manifest(found)
        folder = self._outlined(found.objects, found.sha256)
        names = [name for name in found.objects if not storage.is_beside(name)]
        files = {name: self._known[(folder / name).resolve()].info for name in names}
        return Fetched(
            source=source, resolved=found.uri, path=folder, digest=_listing_digest(files), files=files, expert=found.expert
        )

    def files(self, uri: str, names: Sequence[str]) -> Path:
        """The folder with outlines of the objects of these names below a prefix. Raises StorageError when one is not there."""
        return self._outlined(storage.find_objects(uri, names), {})

    def source_of(self, path: Path) -> ByteSource | None:
        """Where the bytes of an outline lie: in the cache of downloads where the object is complete there, else in S3.

        None for files that are none of these outlines, or whole.
        """
        known = self._known.get(path.resolve())
        if known is None or known.file.whole:
            return None
        endpoint = str(known.client.meta.endpoint_url)
        local = find_object(self._cache, endpoint, known.one.uri, known.one.etag, known.one.size)
        if local is not None:
            _check_sha256(known.one, known.sha256, local.sha256)
            return MappedFile(blob_path(self._cache, local.digest))
        return RemoteFile(
            known.one, self._chunks, client=known.client, outline=path, extents=known.file.extents, cuts=known.file.cuts,
            passed=self._verifier(path, known).passed,
        )  # fmt: skip

    def _verifier(self, path: Path, known: _Streamed) -> Verifier:
        with self._lock:
            return self._verifiers.setdefault(path.resolve(), self._new_verifier(path, known))

    def _new_verifier(self, path: Path, known: _Streamed) -> Verifier:
        own = _ledger(path)
        brought = [folder / _sums_name(known.one) for folder in self._sums]
        ledger = own if own is not None and own.is_file() else next((one for one in brought if one.is_file()), own)
        return Verifier(
            known.one, known.client, outline=path, extents=known.file.extents, cuts=known.file.cuts, sums=known.file.sums,
            chunk=self._chunks.chunk, room=self._room, sha256=known.sha256, ledger=ledger,
        )  # fmt: skip

    def verify(self) -> None:
        """Raise StorageError where the bytes that were read are not those that were stored; what could not be checked is noted.

        To be called when everything is read, and before anything that was made of it is published.
        """
        with self._lock:
            verifiers = [self._verifiers.pop(path) for path in list(self._verifiers)]
        self.notes += [note for one in verifiers if (note := one.finish())]

    def check_whole(self, paths: Sequence[Path], folder: Path) -> None:
        """Read these files from their begin to their end, where that is not known of them, and leave the digests of their blocks in a folder.

        For machines that each read a part of them, and so cannot tell whether the whole is what was stored. Files of torch have a digest of each
        tensor, so that every part can be checked alone: they are left out. Raises StorageError for a file that is damaged; notes what nobody
        keeps a digest of.
        """
        for path in paths:
            known = self._known.get(path.resolve())
            if known is None or known.file.whole or known.file.sums or not known.file.readable:
                continue
            if note := self._new_verifier(path, known).finish(whole=True):
                self.notes.append(note)
            if (ledger := _ledger(path)) is not None and ledger.is_file():
                link_or_copy(ledger, folder / _sums_name(known.one))

    def settle(self, paths: Sequence[Path], progress: Progress | None = None) -> None:
        """Make these files readable: download those of which no reader can take ranges, and note it."""
        for path in paths:
            known = self._known.get(path.resolve())
            if known is None or known.file.readable or known.file.whole:
                continue
            what = f"{known.one.uri} cannot be read by ranges ({_why_whole(path)})"
            if not self._may_download:
                self.unread.append(path)
                self.notes.append(f"{what}: a merge downloads it, {known.one.size:,} bytes; it is not checked here")
                continue
            sums = {known.one.uri: known.sha256} if known.sha256 else {}
            brought = download([known.one], cache=self._cache, sha256=sums, progress=progress)[known.one.uri]
            self._put_whole(path, blob_path(self._cache, brought.digest))
            self._known[path.resolve()] = replace(known, file=known.file.model_copy(update={"extents": ((0, known.one.size),)}))
            self.notes.append(f"{what}: downloaded, {known.one.size:,} bytes in {self._cache}")

    def digest(self, paths: Sequence[Path], folder: Path) -> str | None:
        """The digest of files below a folder by the listing that they were found in; None where one of them is not from S3."""
        infos = {}
        for path in paths:
            known = self._known.get(path.resolve())
            if known is None:
                return None
            infos[path.relative_to(folder).as_posix()] = known.info
        return _listing_digest(infos)

    def _outlined(self, objects: dict[str, s3.S3Object], sha256: dict[str, str]) -> Path:
        folder, made = outline(objects, cache=self._cache)
        client = s3.client(patient=True)
        covered = all(name in sha256 for name in objects if not storage.is_beside(name))
        for name, one in objects.items():
            digest = f"sha256:{sha256[name]}" if covered and name in sha256 else f"etag:{one.etag}"
            info = FileInfo(size=one.size, digest=digest)
            self._known[(folder / name).resolve()] = _Streamed(one, made.files[name], info, sha256.get(name), client)
        return folder

    def _put_whole(self, path: Path, blob: Path) -> None:
        """Put the whole file in the place of its outline, in one step; the outline's own ranges are the same bytes."""
        with locked(self._cache, f"outline file {path}"):
            if path.samefile(blob):
                return
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                link_or_copy(blob, temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)


def _why_whole(path: Path) -> str:
    return "it is a GGUF file, whose reader takes it whole" if path.suffix == GGUF else "it is no zip file of torch.save"


def _ledger(outline: Path) -> Path | None:
    """Where digests of a checked file's blocks are kept, beside its outline."""
    for folder in outline.resolve().parents:
        if (folder / MANIFEST).is_file():
            return folder / "sums" / hashlib.sha256(str(outline.resolve().relative_to(folder)).encode()).hexdigest()[:16]
    return None


def _sums_name(one: s3.S3Object) -> str:
    """Of the file with the digests of an object's blocks."""
    return hashlib.sha256(f"{one.uri}\n{one.etag}\n{one.size}".encode()).hexdigest()[:32] + ".sums"


def _listing_digest(files: dict[str, FileInfo]) -> str:
    """A digest that says what it is made of: ``sha256-listing:…`` or ``etag-listing:…``."""
    kind = "etag" if any(info.digest.startswith("etag:") for info in files.values()) else "sha256"
    return f"{kind}-listing:{combined_digest(files).removeprefix('xxh3:')}"


def _check_manifest(found: storage.FoundModel) -> None:
    """A streamed file is never hashed as a whole, but the SHA-256 that its uploader stored with it must be the manifest's."""

    def check(name: str) -> None:
        one = found.objects[name]
        _check_sha256(one, found.sha256[name], s3.expected_checksums(s3.head(one.uri) or {}).get("sha256"))

    with s3.Threads(_HEADS_AT_ONCE) as pool:
        list(pool.map(check, (name for name in found.sha256 if name in found.objects)))


def _check_sha256(one: s3.S3Object, expected: str | None, seen: str | None) -> None:
    if expected is not None and seen is not None and expected != seen:
        raise StorageError(
            f"{one.uri} is damaged or was replaced: its manifest expert.json says sha256 {expected}, but it is known to have "
            f"sha256 {seen}; upload the file and its manifest again"
        )
