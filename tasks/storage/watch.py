"""Whether a source, or what was fetched from it, is still what it was: cheap looks that read no weights."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ota_core.artifact import canonical_json
from ota_core.errors import StorageError
from tasks.storage import models as storage
from tasks.storage.cache import note_use
from tasks.storage.layout import folder_model_files
from tasks.storage.models import EXPERT_JSON, Fetched


def identity_of_source(source: str) -> str | None:
    """A digest that changes when anything at the source does: names, sizes, ETags or times of change. None where no cheap look tells
    (a Hugging Face id, whose revision may move) or where the source cannot be read; the fetch then says what is wrong."""
    try:
        if storage.is_s3(source):
            objects = storage.list_objects(source)
            return identity_of_objects(source, objects) if objects else None
        folder = Path(source)
        if not folder.is_dir():
            return None
        names = [*folder_model_files(folder), *([EXPERT_JSON] if (folder / EXPERT_JSON).is_file() else [])]
        states = [(name, (folder / name).stat()) for name in names]
        return _digest(
            [str(folder.resolve()), [(name, state.st_size, state.st_mtime_ns, state.st_ino) for name, state in states]]
        )
    except StorageError:
        return None


def identity_of_objects(source: str, objects: Sequence[storage.S3Object]) -> str:
    """``identity_of_source`` of what was listed already. objects: all that lie below ``source``, in the order of their names."""
    return _digest([source, [(one.uri, one.etag, one.size) for one in objects]])


def _digest(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:32]


def is_intact(fetched: Fetched) -> bool:
    """Whether every file of a fetched checkpoint is there with its size, and ``expert.json`` where there was one.

    Who asks is about to use it: a folder of the cache is noted as in use.
    """
    if storage.is_s3(fetched.source):
        note_use(fetched.path)
    if fetched.expert is not None and not (fetched.path / EXPERT_JSON).is_file():
        return False
    return all(
        (fetched.path / name).is_file() and (fetched.path / name).stat().st_size == info.size
        for name, info in fetched.files.items()
    )
