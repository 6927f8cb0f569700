"""The experts below a prefix, ``<prefix>/<capability>/<expert>/`` with ``expert.json`` last: which there are, and which are broken.

``find_experts`` reads a listing and manifests, ``tasks.experts.check.check`` the weights. What is wrong with one expert is said of that expert; what is wrong with
the place where all of them lie is raised.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ota_core.artifact import canonical_json
from ota_core.errors import StorageError
from ota_core.frozen import Frozen
from ota_core.names import why_unsafe
from ota_core.reading import SMALL
from tasks.storage import models as storage
from tasks.storage import s3
from tasks.storage.layout import model_files, parse_expert_json, read_expert_json
from tasks.storage.models import EXPERT_JSON, S3Object
from tasks.storage.watch import identity_of_objects, identity_of_source

MANIFESTS_AT_ONCE = 16
SHOWN = 4
_NOT_WEIGHTS = ("exp_avg", "optimizer", "preconditioner")


class ExpertFound(Frozen):
    """An expert that its manifest and the listing show as complete and as trained from the wanted base."""

    uri: str
    """Its folder: ``s3://…`` or an absolute path."""
    capability: str
    name: str
    """The last part of ``uri``."""
    base_model: str
    """As ``expert.json`` spells it."""
    trained_at: datetime
    """In UTC."""
    identity: str
    """Changes when anything in the folder does: ``tasks.storage.watch.identity_of_source`` of ``uri``."""


class ExpertProblem(Frozen):
    """One thing that is wrong with one expert, which therefore no merge can take."""

    uri: str
    capability: str
    name: str
    problem: str
    """What was seen, what was expected, and what to do."""


@dataclass(frozen=True, kw_only=True)
class _Folder:
    """A folder that holds an ``expert.json``."""

    uri: str
    capability: str
    name: str
    files: Mapping[str, int]
    """Name, relative to the folder, to size in bytes."""
    objects: Mapping[str, S3Object] | None
    """The same as the server lists them; None for a folder of this machine."""

    def identity(self) -> str:
        if self.objects is not None:
            return identity_of_objects(self.uri, sorted(self.objects.values(), key=lambda one: one.uri))
        return identity_of_source(self.uri) or "unreadable"

    def manifest(self) -> dict[str, Any]:
        """Raises StorageError."""
        size, where = self.files[EXPERT_JSON], storage.join(self.uri, EXPERT_JSON)
        if size > SMALL:
            raise StorageError(f"{where} has {size:,} bytes, a manifest of at most {SMALL:,} was expected; write it again")
        if self.objects is None:
            return read_expert_json(Path(where))
        return parse_expert_json(storage.read_bytes(where, etag=self.objects[EXPERT_JSON].etag), where)


def find_experts(prefix: str, *, base_model: str) -> tuple[list[ExpertFound], list[ExpertProblem]]:
    """The experts below a prefix that were trained from ``base_model``, and what is wrong with the others, both in the order of their places.

    prefix: ``s3://bucket/prefix`` or a local folder. It is listed once; of the files only the manifests are read. A folder without
    ``expert.json`` is an upload under way and not mentioned. Raises StorageError when the prefix cannot be listed, when the server fails, or
    when it lets nobody read any of the manifests.
    """
    folders = sorted(_folders(prefix), key=lambda folder: folder.uri)
    with s3.Threads(MANIFESTS_AT_ONCE) as pool:
        manifests = list(pool.map(_manifest, folders))
    denied = [one for one in manifests if isinstance(one, StorageError) and one.reason == "denied"]
    if denied and len(denied) == len(folders):
        raise denied[0]
    found: list[ExpertFound] = []
    problems: list[ExpertProblem] = []
    for folder, manifest in zip(folders, manifests, strict=True):
        if isinstance(manifest, StorageError) and manifest.reason == "missing":
            continue  # deleted since it was listed
        texts = [str(manifest)] if isinstance(manifest, StorageError) else _problems(folder, manifest, base_model)
        place = {"uri": folder.uri, "capability": folder.capability, "name": folder.name}
        problems += [ExpertProblem(**place, problem=text) for text in texts]
        if not texts and isinstance(manifest, dict):
            facts = {"base_model": manifest["base_model"], "trained_at": utc_time(manifest["trained_at"], "trained_at")}
            found.append(ExpertFound(**place, **facts, identity=folder.identity()))
    return found, problems


def _folders(prefix: str) -> Iterator[_Folder]:
    return _folders_in_s3(prefix) if storage.is_s3(prefix) else _folders_here(Path(prefix).expanduser())


def _folders_in_s3(prefix: str) -> Iterator[_Folder]:
    root = prefix.rstrip("/")
    grouped: dict[tuple[str, str], dict[str, S3Object]] = {}
    for one in storage.list_objects(root):
        capability, _, rest = one.uri.removeprefix(root + "/").partition("/")
        name, _, file = rest.partition("/")
        if file:
            grouped.setdefault((capability, name), {})[file] = one
    for (capability, name), objects in grouped.items():
        if EXPERT_JSON in objects:
            files = {file: one.size for file, one in objects.items()}
            uri = storage.join(root, capability, name)
            yield _Folder(uri=uri, capability=capability, name=name, files=files, objects=objects)


def _folders_here(root: Path) -> Iterator[_Folder]:
    if not root.is_dir():
        seen = "is a file" if root.exists() else "does not exist"
        raise StorageError(
            f"{root} {seen}; expected s3://bucket/prefix or a folder with <capability>/<expert>/{EXPERT_JSON}", reason="missing"
        )
    for manifest in root.absolute().glob(f"*/*/{EXPERT_JSON}"):
        folder = manifest.parent
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        yield _Folder(uri=str(folder), capability=folder.parent.name, name=folder.name, files=files, objects=None)


def _manifest(folder: _Folder) -> dict[str, Any] | StorageError:
    """The manifest, or what is wrong with it. Raises StorageError when the server fails."""
    try:
        return folder.manifest()
    except StorageError as error:
        if error.reason == "unavailable":
            raise
        return error


def _problems(folder: _Folder, manifest: Mapping[str, Any], base_model: str) -> list[str]:
    problems = [
        f"the key {name[:80]!r} is refused: {why}; remove that object"
        for name in (folder.capability, folder.name, *folder.files)
        if (why := why_unsafe(name))
    ]
    capability, base, trained_at = (manifest[key] for key in ("capability", "base_model", "trained_at"))
    if capability != folder.capability:
        problems.append(
            f"{EXPERT_JSON} says capability {capability!r}, but the folder lies below '{folder.capability}'; push it again below its own"
        )
    if not isinstance(base, str) or base.rstrip("/") != base_model.rstrip("/"):
        problems.append(
            f"trained from another base: {EXPERT_JSON} says base_model {base!r}, {base_model!r} was expected; train it from that one, "
            "or correct the address"
        )
    try:
        utc_time(trained_at, f"{EXPERT_JSON}: trained_at")
    except StorageError as error:
        problems.append(str(error))
    return [*problems, *_file_problems(folder, manifest)]


def _file_problems(folder: _Folder, manifest: Mapping[str, Any]) -> list[str]:
    """What the listing lacks of what the manifest lists, and of what a model needs."""
    listed = {name: entry.get("size") if isinstance(entry, dict) else None for name, entry in manifest.get("files", {}).items()}
    lost = [f"{name} is missing" for name in sorted(listed) if name not in folder.files]
    lost += [
        f"{name} has {folder.files[name]:,} bytes instead of {size:,}"
        for name, size in sorted(listed.items())
        if isinstance(size, int) and name in folder.files and folder.files[name] != size
    ]
    problems = []
    if lost:
        more = f", and {len(lost) - SHOWN} more files" if len(lost) > SHOWN else ""
        problems.append(
            f"the folder does not hold what {EXPERT_JSON} lists: {', '.join(lost[:SHOWN])}{more}; push the expert again"
        )
    models = model_files(folder.files)
    if not models:
        problems.append("holds no model files; expected config.json and *.safetensors: push the checkpoint's folder again")
    elif not any(_is_weights(name) for name in models):
        problems.append(f"holds no weights (only {', '.join(models[:SHOWN])}); expected *.safetensors or *.bin: push it again")
    return problems


def _is_weights(name: str) -> bool:
    return "/" not in name and name.endswith((".safetensors", ".bin")) and not name.startswith(_NOT_WEIGHTS)


def utc_time(value: object, what: str) -> datetime:
    """A date or time in ISO 8601 as a time in UTC; without a time zone it is taken as UTC. Raises StorageError."""
    try:
        if not isinstance(value, str):
            raise ValueError
        parsed = datetime.fromisoformat(value)
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        raise StorageError(f"{what} is {value!r}, expected a date or time such as 2026-11-24T18:30:05Z; write it so") from None


def lineup(found: Sequence[ExpertFound], capabilities: Sequence[str] | None = None) -> dict[str, list[ExpertFound]]:
    """The experts of each capability, the newest first: by ``trained_at``, then by ``uri``, of which the later one counts as newer.

    capabilities: the wanted ones, in the order of the result; one without an expert has an empty list. None: all there are, sorted.
    """
    wanted = sorted({one.capability for one in found}) if capabilities is None else list(dict.fromkeys(capabilities))
    newest_first = sorted(found, key=lambda one: (one.trained_at, one.uri), reverse=True)
    return {capability: [one for one in newest_first if one.capability == capability] for capability in wanted}


def identity_of_lineup(base_uri: str, chosen: Mapping[str, ExpertFound]) -> str:
    """32 hex digits that change when another expert is chosen for a capability, or when anything in the chosen or in the base changes.

    The base is looked at, but not read. The order of the capabilities does not matter.
    """
    base = [base_uri.rstrip("/"), identity_of_source(base_uri.rstrip("/"))]
    experts = {capability: [one.uri, one.identity] for capability, one in chosen.items()}
    return hashlib.sha256(canonical_json({"base": base, "experts": experts}).encode()).hexdigest()[:32]
