"""What makes a checkpoint below a prefix in S3, and which files are one GGUF model."""

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from ota_core.addresses import without_secrets
from ota_core.artifact import CARD, EXPERT_JSON
from ota_core.errors import StorageError
from ota_core.files.checkpoint import GGUF
from ota_core.files.gguf.sets import model_of, only_model
from tasks.storage import s3
from tasks.storage.layout import BESIDE, check_sizes, is_beside, manifest_sha256, model_files, parse_expert_json
from tasks.storage.s3 import S3Object, join, objects_below, read_bytes
from tasks.storage.states import taken_of


def no_expert_json(where: str) -> StorageError:
    """The error of a folder or prefix that is no expert."""
    hint = f"upload it again, {EXPERT_JSON} last"
    return StorageError(f"{where} holds no {EXPERT_JSON}: it is no expert, or its upload never finished; {hint}")


class FoundModel(BaseModel):
    """A checkpoint in S3 as it is listed."""

    model_config = ConfigDict(frozen=True)

    uri: str
    objects: dict[str, S3Object]
    """The model's files, ``expert.json`` and the model card, by their names below ``uri``."""
    expert: dict[str, Any] | None
    sha256: dict[str, str]
    """By name, what ``expert.json`` says."""


def find_model(source: str, *, require_expert_json: bool = False) -> FoundModel:
    """What makes the checkpoint below a prefix in S3. Raises StorageError where there is none, or ``expert.json`` lists what is not there."""
    uri = source.rstrip("/")
    if uri.endswith(GGUF) and not require_expert_json:
        return _find_gguf(uri)
    found = objects_below(uri)
    if not found:
        raise nothing_there(uri)
    contents = {name: f"{one.size}:{one.etag}" for name, one in found.items()}
    names = model_files(found, taken_of(contents, lambda name: read_bytes(found[name].uri, etag=found[name].etag)))
    if not names:
        folders = sorted({name.split("/")[0] for name in found if "/" in name})[:8]
        hint = f"name one of the folders below it: {', '.join(folders)}" if folders else "check the prefix"
        raise StorageError(f"{source} holds {len(found)} objects but no model files (config.json, *.safetensors, *.bin); {hint}")
    check_one_gguf(source, names, f"name the one that is meant, {join(uri, '{name}')}")
    check_sizes({name: found[name].size for name in {*names, *BESIDE} & found.keys()}, uri)
    wanted, expert, sums = {name: found[name] for name in names}, None, {}
    wanted |= {name: one for name, one in found.items() if is_beside(name) and name not in BESIDE}
    if CARD in found:
        wanted[CARD] = found[CARD]
    if EXPERT_JSON in found:
        wanted[EXPERT_JSON] = found[EXPERT_JSON]
        expert = parse_expert_json(read_bytes(found[EXPERT_JSON].uri, etag=found[EXPERT_JSON].etag), join(uri, EXPERT_JSON))
        sums = manifest_sha256(expert, join(uri, EXPERT_JSON))
        lost = ", ".join(sorted(name for name in sums if name not in found))
        if lost:
            raise StorageError(f"{source}: {EXPERT_JSON} lists {lost}, which the prefix does not hold; upload the folder again")
    elif require_expert_json:
        raise no_expert_json(source)
    return FoundModel(uri=uri, objects=wanted, expert=expert, sha256=sums)


def check_one_gguf(source: str, names: Iterable[str], hint: str) -> None:
    """Raises StorageError where several GGUF models are all the weights there are, or parts of one are missing, before one is downloaded."""
    try:
        only_model(source, names, hint)
    except ValueError as error:
        raise StorageError(str(error)) from None


def gguf_model(source: str, name: str, names: Iterable[str]) -> list[str]:
    """The files of the GGUF model that one file is named for. Raises StorageError where parts are missing."""
    try:
        return model_of(name, names)
    except ValueError as error:
        raise StorageError(f"{source}: {error}") from None


def _find_gguf(uri: str) -> FoundModel:
    """One GGUF model of a prefix in S3, by one of its files. Raises StorageError where it is not there, or not whole."""
    parent, _, name = uri.rpartition("/")
    found = objects_below(parent)
    if name not in found:
        raise nothing_there(uri)
    names = gguf_model(uri, name, (one for one in found if "/" not in one))
    return FoundModel(uri=uri, objects={one: found[one] for one in names}, expert=None, sha256={})


def nothing_there(uri: str) -> StorageError:
    """The error of a key or prefix that does not exist, with where it was looked for."""
    bucket, key = s3.split_uri(uri)
    where = f"endpoint {without_secrets(s3.client().meta.endpoint_url)}, bucket {bucket!r}, prefix {key!r}"
    return StorageError(
        f"{uri}: there is no such key or prefix ({where}); check the spelling, or list the bucket", reason="missing"
    )
