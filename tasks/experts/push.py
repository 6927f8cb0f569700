"""Publishing a trained checkpoint as an expert: looked at cheaply, uploaded, ``expert.json`` last. The user's folder is only read."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from ota_core.errors import MomentsError, OtaError, StorageError, raise_all
from ota_core.files.checkpoint import Checkpoint, adapter_of, read_json
from ota_core.files.place import scratch_folder
from ota_core.frozen import Frozen
from ota_core.moments import find_moments, none_found
from ota_core.moments.safetensors_file import as_beta2, as_step
from ota_core.plan.inputs import ModelInput, expert_facts
from tasks.experts.find import utc_time
from tasks.merging.architecture import expert_moments
from tasks.merging.gguf_companions import gguf_companions
from tasks.merging.inputs import MOMENTS_OF_WEIGHTS
from tasks.settings import places
from tasks.storage import models as storage
from tasks.storage.download import Progress
from tasks.storage.layout import (
    expert_manifest,
    folder_model_files,
    is_beside,
    manifest_sha256,
    model_files,
    parse_expert_json,
    read_expert_json,
)
from tasks.storage.models import EXPERT_JSON
from tasks.storage.streaming.streams import Streams

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]*")
# What training leaves beside the weights: the key of the count of steps, of β₂ and of the optimizer's name in each.
_RECORDS = {
    "training.json": {"step": "step", "beta2": "beta2", "optimizer": "optimizer"},
    "trainer_state.json": {"step": "global_step"},
    EXPERT_JSON: {"step": "step", "beta2": "beta2", "optimizer": "optimizer"},
}
SHOWN = 4
_MEMORY = 2**26


class Pushed(Frozen):
    """An expert that was published."""

    uri: str
    capability: str
    name: str
    trained_at: datetime
    was_there: bool
    """Whether it had been published before with the same content."""


def push_expert(
    folder: Path,
    prefix: str,
    *,
    capability: str,
    base_model: str,
    name: str | None = None,
    trained_at: str | None = None,
    needs_moments: bool = True,
    progress: Progress | None = None,
) -> Pushed:
    """Publish a checkpoint's folder as ``<prefix>/<capability>/<name>/``, in S3 or in a local folder.

    trained_at: an ISO date or time; by default that of an ``expert.json`` in the folder, else when the newest file of the model was written.
    name: by default ``trained_at`` in UTC, such as 2026-11-24T18-30-05. Pushing the same again changes nothing.
    Raises OtaError with all that is wrong, before anything is written: a folder that holds no readable weights, configuration or second
    moments (these unless ``needs_moments`` is False), a bad name, a complete expert of this name with other content.
    """
    facts = _examined(folder, capability, base_model, name, needs_moments)
    when = utc_time(trained_at, "trained_at") if trained_at is not None else _trained_at(folder)
    label = name or when.strftime("%Y-%m-%dT%H-%M-%S")
    manifest = expert_manifest(
        folder, capability=capability, base_model=base_model.rstrip("/"), trained_at=when.isoformat(), **facts
    )
    place = {"capability": capability, "name": label, "trained_at": when}
    if storage.is_s3(prefix):
        uri = storage.join(prefix, capability, label)
        return Pushed(uri=uri, was_there=_into_s3(folder, uri, manifest, progress), **place)
    target = Path(prefix).expanduser().absolute() / capability / label
    return Pushed(uri=str(target), was_there=_into_folder(folder, target, manifest), **place)


def _examined(folder: Path, capability: str, base_model: str, name: str | None, needs_moments: bool) -> dict[str, Any]:
    """What is known of the optimizer. Raises OtaError with all that is wrong with the folder and the names; reads headers only."""
    problems = [
        f"{what} {value!r} cannot be part of an address; expected letters, digits and . _ + = -, a letter or digit first"
        for what, value in (("capability", capability), ("name", name))
        if value is not None and not _NAME.fullmatch(value)
    ]
    facts: dict[str, Any] = {}
    try:
        if adapter_of(folder) is not None:
            _fits_base(folder, base_model)
        else:
            with closing(Checkpoint(folder)) as checkpoint:
                if not checkpoint.config:
                    problems.append(f"{folder} holds no config.json, or an empty one; copy the model's configuration there")
    except OtaError as error:
        problems += error.problems
    try:
        problems += _contradictions(folder, capability, base_model)
        facts = _optimizer_facts(folder, base_model, needs_moments)
    except OtaError as error:
        problems += error.problems
    raise_all(problems)
    return facts


def _fits_base(folder: Path, base_model: str) -> None:
    """Raise OtaError where an adapter cannot be applied to the base that it is pushed for. Headers alone are read, of a base in S3 too."""
    where = places()
    with Streams(cache=where.cache, memory=_MEMORY) as streams:
        base = streams.model(base_model) if storage.is_s3(base_model) else storage.fetch(base_model, cache=where.cache)
        under = ModelInput(
            name="base", path=base.path, source=base_model, source_of=streams.source_of, companions=gguf_companions(base.path, where.cache)
        )  # fmt: skip
        ModelInput(name="expert", path=folder, under=under).opened().close()


def _moments_in(folder: Path) -> Path | None:
    """The second moments of a folder's weights: a trainer's state beside an adapter is of its factors, from which those do not follow."""
    if adapter_of(folder) is None:
        return find_moments(folder)
    own = folder / MOMENTS_OF_WEIGHTS
    return own if own.is_file() else None


def _fetched(base_model: str) -> Path:
    return storage.fetch(base_model, cache=places().cache).path


def _optimizer_facts(folder: Path, base_model: str, needs_moments: bool) -> dict[str, Any]:
    """step, beta2 and optimizer where they are known: the optimizer's own file is believed first, then what training wrote beside it.

    Training may count steps that the optimizer skipped (an overflow in float16); for bias correction the optimizer's count is the right one.
    Raises OtaError when the second moments cannot be read, or are missing and needed.
    """
    known: dict[str, Any] = {}
    path = _moments_in(folder) if folder.is_dir() else None
    if path is not None:
        with closing(expert_moments(path, folder, partial(_fetched, base_model))) as moments:
            steps = [step for name in moments.shapes() if (step := moments.step(name)) is not None]
            known = {"step": max(steps, default=None), "beta2": moments.beta2}
    elif needs_moments and folder.is_dir() and adapter_of(folder) is not None:
        raise MomentsError(
            f"{folder} is a LoRA adapter, and holds no second moments of the weights: a trainer keeps those of its factors. Push it without "
            f"(--without-moments), or make them: ota estimate {base_model}+{folder} --out {folder / MOMENTS_OF_WEIGHTS}"
        )
    elif needs_moments and folder.is_dir():
        raise MomentsError(f"{none_found(folder)}: copy them there, or say that none are wanted (--without-moments)")
    for file, keys in _RECORDS.items():
        record = read_json(folder / file) if (folder / file).is_file() else {}
        known = {fact: record.get(key) for fact, key in keys.items()} | {k: v for k, v in known.items() if v is not None}
    readers: dict[str, Callable[[Any, str], Any]] = {"step": as_step, "beta2": as_beta2, "optimizer": lambda value, _: str(value)}
    return {fact: readers[fact](value, f"{folder}: {fact}") for fact, value in known.items() if value is not None}


def _contradictions(folder: Path, capability: str, base_model: str) -> list[str]:
    """An ``expert.json`` that is in the folder already is not sent, but what it says is somebody's word."""
    said = {"capability": capability, "base_model": base_model.rstrip("/")}
    held = {key: value.rstrip("/") for key, value in expert_facts(folder).items() if key in said and isinstance(value, str)}
    return [
        f"{folder / EXPERT_JSON} says {key} '{value}', but '{said[key]}' was given; correct one of them"
        for key, value in held.items()
        if value != said[key]
    ]


def _trained_at(folder: Path) -> datetime:
    said = expert_facts(folder).get("trained_at")
    if said is not None:
        return utc_time(said, f"{folder / EXPERT_JSON}: trained_at")
    newest = max((folder / name).stat().st_mtime for name in folder_model_files(folder))
    return datetime.fromtimestamp(int(newest), UTC)


def _into_s3(folder: Path, uri: str, manifest: Mapping[str, Any], progress: Progress | None) -> bool:
    """Upload, the manifest last. Returns whether the expert was there before. Raises StorageError."""
    there = {one.uri.removeprefix(uri + "/"): one.size for one in storage.list_objects(uri)}
    complete = EXPERT_JSON in there
    if complete:
        _check_same(_remote_manifest(uri), manifest, uri)
    strays = sorted(set(model_files(there)) - set(manifest["files"]))
    if strays:
        raise StorageError(
            f"{uri} holds files of another model, of an upload that never finished ({', '.join(strays[:SHOWN])}); delete them, or choose "
            "another --name"
        )
    storage.upload_folder(folder, uri, files=manifest_sha256(manifest, EXPERT_JSON), progress=progress)
    for file in _beside(folder):
        storage.write_bytes(storage.join(uri, file.name), file.read_bytes())
    content = (json.dumps(manifest, indent=2) + "\n").encode()
    if not complete and not storage.write_bytes(storage.join(uri, EXPERT_JSON), content, only_if_absent=True):
        _check_same(_remote_manifest(uri), manifest, uri)  # somebody pushed to this name at the same time
        return True
    return complete


def _beside(folder: Path) -> list[Path]:
    """What goes with the expert and is no part of it: its card, whose licence a merge's own card goes by, and code that it brings along."""
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != EXPERT_JSON and is_beside(path.name)]


def _remote_manifest(uri: str) -> dict[str, Any]:
    where = storage.join(uri, EXPERT_JSON)
    return parse_expert_json(storage.read_bytes(where), where)


def _into_folder(folder: Path, target: Path, manifest: Mapping[str, Any]) -> bool:
    """The same for a local prefix: copied beside its place and renamed, so that nobody sees half of it."""
    if (target / EXPERT_JSON).is_file():
        _check_same(read_expert_json(target / EXPERT_JSON), manifest, str(target))
        return True
    if target.exists():
        raise StorageError(f"{target} exists, and is no expert (it holds no {EXPERT_JSON}); delete it, or choose another --name")
    with scratch_folder(target) as temporary:
        for name in [*manifest["files"], *(file.name for file in _beside(folder))]:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, temporary / name)
        (temporary / EXPERT_JSON).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        temporary.rename(target)
    return False


def _check_same(there: Mapping[str, Any], wanted: Mapping[str, Any], uri: str) -> None:
    """Raises StorageError unless the expert that is there is the one that is pushed: the same files, and the same facts about them."""
    differing = sorted(key for key, value in _facts_of(wanted, uri).items() if _facts_of(there, uri)[key] != value)
    old, new = manifest_sha256(there, uri), manifest_sha256(wanted, uri)
    differing += sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if differing:
        more = ", …" if len(differing) > SHOWN else ""
        raise StorageError(
            f"{uri} holds a complete expert already, with other content ({', '.join(differing[:SHOWN])}{more}); experts are never replaced: "
            "choose another --name"
        )


def _facts_of(manifest: Mapping[str, Any], uri: str) -> dict[str, Any]:
    """What two spellings of the same expert share."""
    return {
        "capability": manifest["capability"],
        "base_model": str(manifest["base_model"]).rstrip("/"),
        "trained_at": utc_time(manifest["trained_at"], f"{uri}/{EXPERT_JSON}: trained_at"),
    }
