"""What identifies a stage's output: fingerprints, typed references, and the record that makes an output complete.

A fingerprint is the digest of what decides the bytes (parameters, input digests, algorithm version). Paths, devices and worker
counts never enter it.
"""

import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from ota_core.errors import ArtifactError
from ota_core.frozen import Frozen
from ota_core.held import hold, remove_abandoned
from ota_core.names import why_unsafe
from ota_core.reading import cut, json_value, quoted, read_file

# Raise the number of a stage when a change to its code changes the bytes that it writes: every cached output of that stage
# then counts as stale. "formats" stands for what all stages share.
ALGORITHM_VERSION: dict[str, int] = {
    "formats": 1, "moments": 2, "masks": 1, "merged": 2, "scores": 1, "checkpoint": 1, "data": 1, "surveys": 1, "facts": 1, "shards": 1, "scales": 1,
    "checks": 1, "analysis": 2, "adapter": 1,
}  # fmt: skip

# Stages whose algorithm also decides a stage's bytes: a merge contains compression and masks, whether fused or staged.
_DEPENDS_ON: dict[str, tuple[str, ...]] = {
    "masks": ("moments",),
    "merged": ("moments", "masks"),
    "analysis": ("moments", "masks"),
}
# surveys, facts and shards are parts of one merge and name it by its fingerprint, which holds the versions of all of its stages.

RECORD = "record.json"
CARD = "README.md"
"""The model card of a checkpoint."""
EXPERT_JSON = "expert.json"
_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")
"""The manifest that makes a folder or a prefix an expert."""

Kind = Literal[
    "checkpoint", "data", "moments", "masks", "merged", "scores", "surveys", "facts", "shards", "checks", "analysis", "scales",
    "adapter",
]  # fmt: skip


class ArtifactRef(Frozen):
    """A stage's output as tasks pass it on: where it lies and what it is, never the bytes themselves."""

    kind: Kind
    fingerprint: str
    uri: str
    """The folder that holds the files: a local path or ``s3://…``."""
    bytes: int = 0
    """Size of all files together."""


def canonical_json(value: Any) -> str:
    """JSON with one spelling per value: sorted keys, no spaces, shortest floats. Raises TypeError on what has no stable spelling."""
    return json.dumps(_stable(value, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _stable(value: Any, where: str) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where}: {value!r} has no canonical JSON form; leave it out or spell it as a string")
        # 1.0 and 1 describe the same option; they must not give two fingerprints.
        return int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, BaseModel):
        return _stable(value.model_dump(mode="json"), where)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is a {type(key).__name__}; canonical JSON needs string keys")
        return {key: _stable(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_stable(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where}: a {type(value).__name__} has no canonical JSON form; pass strings, numbers, lists or mappings")


def fingerprint(kind: Kind, params: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The identity of a stage's output: 32 hex digits over kind, algorithm version, parameters and input digests."""
    identity = {
        "kind": kind,
        "version": [ALGORITHM_VERSION[part] for part in ("formats", *_DEPENDS_ON.get(kind, ()), kind)],
        "params": params,
        "inputs": inputs,
    }
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:32]


class Record(Frozen):
    """``record.json``: what an output is made of. It is written last, so that its presence means that the output is complete."""

    kind: Kind
    fingerprint: str
    algorithm_version: dict[str, int]
    config: dict[str, Any]
    """The parameters that decided the bytes."""
    inputs: dict[str, str]
    """Input name to digest."""
    files: dict[str, int]
    """File name, relative to the folder, to its size in bytes."""
    provenance: dict[str, Any] = Field(default_factory=dict)
    """What does not decide the bytes: host, device, seconds, versions, sources."""
    results: dict[str, Any] = Field(default_factory=dict)
    """What the stage measured: densities, thresholds, compression errors, scores."""

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, int]) -> dict[str, int]:
        """They are joined to a folder, and the record may be anybody's."""
        for name in files:
            if why := why_unsafe(name):
                raise ValueError(f"the file name {name[:80]!r} is refused: {why}")
        return files


def folder_files(folder: Path) -> dict[str, int]:
    """Every file below the folder but the record, with its size in bytes, in the order of their names."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / RECORD)
    return {p.relative_to(folder).as_posix(): p.stat().st_size for p in paths}


def write_record(folder: Path, record: Record) -> None:
    """Write the record through a temporary sibling, flushed to the disk before it takes its name."""
    write_text_atomic(folder / RECORD, record.model_dump_json(indent=2) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a file in one step; a reader sees the old text or the new, never a part. What killed processes left in the folder by this goes."""
    for left in path.parent.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(left.name):
            remove_abandoned(left)
    while True:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
        with open(temporary, "w", encoding="utf-8") as stream:
            if not hold(stream.fileno(), temporary):
                continue
            try:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            return


def read_record(folder: Path) -> Record:
    """The record of a complete output. Raises ArtifactError when it is missing, unreadable or contradicts the files."""
    path = folder / RECORD
    try:
        record = parse_record(read_file(path))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no {RECORD}: the output was never completed; run its stage again") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as a record ({error}); delete the folder and run its stage again") from None
    problems = missing_files(folder, record.files)
    if problems:
        raise ArtifactError(
            f"{folder} does not hold what its {RECORD} lists: {'; '.join(problems)}. Delete the folder and run its stage again"
        )
    return record


def parse_record(content: bytes) -> Record:
    """A record from its file's bytes. Raises ValueError, which quotes nothing of what is none."""
    try:
        return Record.model_validate(json_value(content))
    except ValidationError as error:
        for one in error.errors():
            if one["type"] == "value_error":  # a check of our own, which says what it saw
                raise ValueError(cut(one["msg"].removeprefix("Value error, "))) from None
        wrong = ", ".join(quoted(".".join(map(str, one["loc"])), 80) for one in error.errors()[:5])
        raise ValueError(f"it is no record, by {wrong or 'its form'}") from None


def has_size(name: str, size: int, expected: int) -> bool:
    """Whether a file has the size that its record lists. A model card is written again when more is known of the model, such as its scores."""
    return size == expected or name == CARD


def missing_files(folder: Path, files: Mapping[str, int]) -> Sequence[str]:
    """What the folder lacks of the files that a record lists, one phrase per file."""
    problems = []
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif not has_size(name, path.stat().st_size, size):
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {size}")
    return problems
