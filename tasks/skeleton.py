"""Checkpoints without their weights, for planning: the headers of remote files, in sparse files of the right size."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from ota_core.errors import OtaError, StorageError, raise_all
from ota_core.recipe import NEEDS_MOMENTS, MergeRecipe
from ota_core.safetensors_io import MAX_HEADER
from tasks import s3, storage
from tasks.inputs import model_sources
from tasks.storage import Fetched
from tasks.storage_cache import FileInfo, temporary_sibling
from tasks.storage_layout import EXPERT_JSON, model_files, parse_expert_json
from tasks.watch import identity_of_source

_SMALL = 64 * 2**20


@dataclass(frozen=True)
class Skeleton:
    """A model as far as planning needs it."""

    fetched: Fetched
    remote: bool
    pending_moments: bool
    """Second moments whose names cannot be known before they are fetched (an optimizer state in S3)."""


def skeletons(recipe: MergeRecipe, *, cache: Path, recipe_dir: Path | None) -> tuple[list[Skeleton], list[str]]:
    """Every model of a recipe, base first, and notes. Raises StorageError with every model that cannot be had."""
    found, problems = [], []
    for source in model_sources(recipe, recipe_dir):
        try:
            found.append(skeleton(source, cache))
        except OtaError as error:
            problems.append(str(error))
    raise_all(problems, StorageError)
    notes = []
    if recipe.merge_method in NEEDS_MOMENTS:
        notes = [f"{s.fetched.source}: its optimizer state is checked when it is fetched" for s in found if s.pending_moments]
    return found, notes


def skeleton(source: str, cache: Path) -> Skeleton:
    """One model. Raises StorageError when it cannot be had."""
    if not storage.is_s3(source):
        return Skeleton(_local(source, cache), remote=False, pending_moments=False)
    uri = source.rstrip("/")
    objects = {one.uri.removeprefix(uri + "/"): one for one in storage.list_objects(uri)}
    names = model_files(objects)
    if not names:
        raise StorageError(f"{source} holds no model files (config.json, *.safetensors, *.bin); check the prefix")
    identity = identity_of_source(source)
    folder = cache / "skeletons" / str(identity)
    if not folder.is_dir():
        temporary = temporary_sibling(folder)
        try:
            for name in [*names, *([EXPERT_JSON] if EXPERT_JSON in objects else [])]:
                _outline(objects[name], temporary / name)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    expert = parse_expert_json((folder / EXPERT_JSON).read_bytes(), uri) if EXPERT_JSON in objects else None
    files = {name: FileInfo(size=objects[name].size, digest=f"etag:{objects[name].etag}") for name in names}
    fetched = Fetched(source=source, resolved=uri, path=folder, digest=f"listing:{identity}", files=files, expert=expert)
    pending = any(name.endswith(("optimizer.pt", "optimizer.bin")) for name in names) and not any(
        name.startswith("exp_avg_sq") for name in names
    )
    return Skeleton(fetched, remote=True, pending_moments=pending)


def _outline(one: storage.S3Object, path: Path) -> None:
    """A safetensors file's header in a sparse file of its size; other small files whole; large others only by their size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    client = s3.client()
    with open(path, "wb") as stream:
        if path.suffix == ".safetensors" and one.size >= 8:
            length = int.from_bytes(s3.read_range(client, one, 0, 8).read(), "little")
            stop = min(one.size, 8 + min(length, MAX_HEADER))
            stream.write(s3.read_range(client, one, 0, stop).read())
        elif one.size <= _SMALL and path.suffix not in {".pt", ".bin"}:
            stream.write(s3.read_bytes(one.uri, etag=one.etag))
        stream.truncate(one.size)


def _local(source: str, cache: Path) -> Fetched:
    """A local folder without hashing it; a Hugging Face id is fetched, its cache is the user's own."""
    folder = Path(source)
    if not folder.is_dir():
        return storage.fetch(source, cache=cache)
    names = model_files(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {name: FileInfo(size=(folder / name).stat().st_size, digest="not computed") for name in names}
    expert = parse_expert_json((folder / EXPERT_JSON).read_bytes(), str(folder)) if (folder / EXPERT_JSON).is_file() else None
    return Fetched(source=source, resolved=str(folder.resolve()), path=folder, digest="not computed", files=files, expert=expert)
