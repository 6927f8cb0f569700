"""Outlines of models in S3: configuration, tokenizer and headers whole, tensors as holes in sparse files of the right size.

<cache>/outlines/<key>/outline.json    what is filled in, with a digest of it; written before the folder takes its name
<cache>/outlines/<key>/files/…         the model's files

The key is made of endpoint, names, ETags and sizes: an object that is replaced gets another outline.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from ota_core.artifact import canonical_json, write_text_atomic
from ota_core.errors import StorageError
from ota_core.files.checkpoint import CONFIG_FILES, TOKENIZER_PATTERNS
from ota_core.files.pickled.torch_file import ZIP
from ota_core.files.safetensors_io import MAX_HEADER
from tasks.storage import s3
from tasks.storage.cache import appearing, hash_file, locked, note_use, remove_tree
from tasks.storage.s3_body import read_exactly
from tasks.storage.streaming.torch_outline import zip_ranges

VERSION = 2  # of the outlines' content: another version does not use this one's
MANIFEST = "outline.json"
_FILES_AT_ONCE, _RANGES_AT_ONCE = 4, 16
_FIRST_GUESS = 64 * 1024  # most headers of safetensors files are shorter
_LARGE = 64 * s3.MIB
_TORCH = (".pt", ".pth", ".bin", ".distcp")
_ALWAYS_WHOLE = ("*.json", *CONFIG_FILES, *TOKENIZER_PATTERNS)

Extent = tuple[int, int]


class OutlineFile(BaseModel):
    """One file of an outline."""

    model_config = ConfigDict(frozen=True)

    size: int
    etag: str
    extents: tuple[Extent, ...]
    """Ranges of bytes that the file holds; everything else in it is a hole."""
    cuts: tuple[int, ...] = ()
    """Where large tensors of a torch file begin and end, to fetch no more than those that are asked for."""
    sums: tuple[int, ...] = ()
    """The CRC-32 of each pair of ``cuts``, as the file holds it; 0 where it was written without."""
    readable: bool = True
    """Whether a reader that takes tensors by ranges can be opened on it: not on a torch file that is no zip."""
    digest: str
    """XXH3-128 of the bytes in the extents."""

    @property
    def whole(self) -> bool:
        return self.extents == ((0, self.size),) or self.size == 0


class Outline(BaseModel):
    """The manifest of an outline."""

    model_config = ConfigDict(frozen=True)

    files: dict[str, OutlineFile]


def outline(objects: Mapping[str, s3.S3Object], *, cache: Path) -> tuple[Path, Outline]:
    """The folder with outlines of these objects, by the names that they have in it, and what is filled in.

    One that is in the cache is used where it is complete and undamaged. Raises StorageError when an object cannot be read.
    """
    endpoint = str(s3.client().meta.endpoint_url)
    listing = [VERSION, endpoint, [(name, one.uri, one.etag, one.size) for name, one in sorted(objects.items())]]
    folder = cache / "outlines" / hashlib.sha256(canonical_json(listing).encode()).hexdigest()[:32]
    with locked(cache, f"outline {folder.name}"):
        known = _known(folder)
        note_use(folder)
        if known is None:
            if folder.exists():
                remove_tree(folder)
            known = _make(objects, folder)
    return folder / "files", known


def _known(folder: Path) -> Outline | None:
    """The manifest of a finished outline whose filled ranges are what they were; None where there is no such outline."""
    try:
        known = Outline.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
        intact = all(_digest(folder / "files" / name, file.extents) == file.digest for name, file in known.files.items())
        sizes = all((folder / "files" / name).stat().st_size == file.size for name, file in known.files.items())
    except (OSError, ValueError, ValidationError):
        return None
    return known if intact and sizes else None


def _make(objects: Mapping[str, s3.S3Object], folder: Path) -> Outline:
    with appearing(folder) as temporary:
        with s3.Threads(_RANGES_AT_ONCE) as ranges, s3.Threads(_FILES_AT_ONCE) as files:
            filled = files.map(lambda name: _fill(objects[name], name, temporary / "files" / name, ranges), objects)
            made = Outline(files=dict(zip(objects, filled, strict=True)))
        write_text_atomic(temporary / MANIFEST, json.dumps(made.model_dump(mode="json"), indent=1))
    return made


def _fill(one: s3.S3Object, name: str, path: Path, pool: ThreadPoolExecutor) -> OutlineFile:
    """Write the outline of one object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    client = s3.client(patient=True)

    def fetch(extent: Extent) -> None:
        os.pwrite(file, read_exactly(client, one, *extent), extent[0])

    def fetch_all(extents: Sequence[Extent]) -> None:
        list(pool.map(fetch, extents))

    try:
        os.ftruncate(file, one.size)
        extents, facts = _ranges(one, name, client, fetch_all, file)
        os.fsync(file)
    finally:
        os.close(file)
    if extents == ((0, one.size),):
        _check_whole(one, path)
    return OutlineFile(size=one.size, etag=one.etag, extents=extents, digest=_digest(path, extents), **facts)


def _check_whole(one: s3.S3Object, path: Path) -> None:
    """Raise StorageError where a file that is here whole is not what was stored, as far as the server tells."""
    for kind, stated in s3.expected_checksums(s3.head(one.uri) or {}).items():
        seen = hash_file(path, also=[kind])[kind]
        if seen != stated:
            raise StorageError(
                f"{one.uri} is damaged or was replaced: it was stored with {kind} {stated}, what was read has {kind} {seen}; run again, or "
                "upload it again"
            )


def _ranges(
    one: s3.S3Object, name: str, client: Any, fetch_all: Callable[[Sequence[Extent]], None], file: int
) -> tuple[tuple[Extent, ...], dict[str, Any]]:
    """Fill in what an outline of this object holds; the ranges, and the other facts of ``OutlineFile``."""
    base, suffix = Path(name).name, Path(name).suffix
    whole = any(fnmatchcase(base, pattern) for pattern in _ALWAYS_WHOLE)
    if not whole and suffix == ".safetensors" and one.size >= 8:
        head = min(one.size, _FIRST_GUESS)
        fetch_all([(0, head)])
        length = int.from_bytes(os.pread(file, 8, 0), "little")
        stop = min(one.size, 8 + length) if length <= MAX_HEADER else head
        if stop > head:
            fetch_all([(head, stop)])
        return ((0, max(stop, head)),), {}
    if not whole and (suffix in _TORCH or one.size > _LARGE) and one.size > len(ZIP):
        head = min(one.size, 16)
        fetch_all([(0, head)])
        if os.pread(file, len(ZIP), 0) == ZIP:
            found = zip_ranges(client, one, fetch_all, file)
            if found is not None:
                return found[0], {"cuts": found[1], "sums": found[2]}
        return ((0, head),), {"readable": False}
    if one.size:
        fetch_all([(start, min(start + _LARGE // 8, one.size)) for start in range(0, one.size, _LARGE // 8)])
    return ((0, one.size),) if one.size else (), {}


def _digest(path: Path, extents: Sequence[Extent]) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as stream:
        for start, stop in extents:
            digest.update(f"{start}-{stop}:".encode())
            digest.update(os.pread(stream.fileno(), stop - start, start))
    return digest.hexdigest()
