"""Where checkpoints come from and go to: ``s3://bucket/prefix``, a folder, or a Hugging Face id ``org/name@revision``."""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ota_core.addresses import without_secrets
from ota_core.artifact import EXPERT_JSON, write_text_atomic
from ota_core.errors import StorageError
from ota_core.files.checkpoint import GGUF
from ota_core.frozen import Frozen
from ota_core.reading import read_file
from tasks.settings import allow_path
from tasks.storage.cache import FileInfo, combined_digest, digest_file, digest_files, link_folder, locked, note_use
from tasks.storage.download import PART_SIZE, Progress, Ticker, download
from tasks.storage.found import FoundModel as FoundModel
from tasks.storage.found import check_one_gguf, find_model, gguf_model, no_expert_json, nothing_there
from tasks.storage.hub import said
from tasks.storage.layout import (
    BESIDE,
    CODE,
    MODEL_FILES,
    NOT_MODEL_FILES,
    check_sizes,
    folder_model_files,
    is_beside,
    model_files,
    read_expert_json,
    sha256_file,
)
from tasks.storage.s3 import (
    S3Object,
    delete_prefix,
    exists,
    head,
    is_s3,
    join,
    list_objects,
    objects_below,
    read_bytes,
    write_bytes,
)
from tasks.storage.states import Taken, checkpoint_of, taken_of
from tasks.storage.transfers import ABANDONED, copy_objects, end_unfinished, upload_files

__all__ = [
    "EXPERT_JSON", "Fetched", "FileInfo", "S3Object", "absolute", "copy_objects", "delete_prefix", "digest_file", "digest_folder", "download_folder",
    "end_unfinished", "exists", "fetch", "find_model", "find_objects", "head", "is_beside", "is_hub_id", "is_s3", "join", "list_objects", "objects_below", "read_bytes", "upload_folder",
    "write_bytes",
]  # fmt: skip

log = logging.getLogger(__name__)

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def absolute(root: str) -> str:
    """A root as it reads from any working directory: ``s3://…`` as it is, a folder by its whole path."""
    return root if is_s3(root) else str(Path(root).expanduser().absolute())


def read_note(uri: str) -> bytes | None:
    """A small file here or in S3, None where there is none. Raises StorageError when the server refuses, or it is no file that can be read."""
    try:
        return read_bytes(uri) if is_s3(uri) else read_file(Path(uri))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{uri} cannot be read ({error.strerror or error})") from None
    except StorageError as error:
        if error.reason != "missing":
            raise
        return None


def write_note(uri: str, text: str) -> None:
    """Write, or replace, a small file here or in S3 in one step: a reader sees the old or the new one, whole."""
    if is_s3(uri):
        write_bytes(uri, text.encode())
        return
    Path(uri).parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(Path(uri), text)


class Fetched(Frozen):
    """A checkpoint that lies in a local folder, and where it came from."""

    source: str
    """As it was asked for."""
    resolved: str
    """The S3 address, the absolute folder, or ``org/name@commit``."""
    path: Path
    """The local folder. It belongs to the cache or to the user: read only."""
    digest: str
    """Identity of the content: over name, size and digest of the model's files. The same wherever the files lie.

    ``xxh3:`` where the contents were hashed; ``sha256-listing:`` or ``etag-listing:`` of a streamed model (``tasks.storage.streaming.streams``)."""
    files: dict[str, FileInfo]
    """The model's files by their name relative to the folder."""
    expert: dict[str, Any] | None = None
    """Content of ``expert.json``, which is no part of the digest."""
    under: "Fetched | None" = None
    """What this is an adapter of; ``digest`` is then of both, and ``files`` the adapter's alone."""
    own_digest: str | None = None
    """Of the adapter alone, where it is one."""


def is_hub_id(source: str) -> bool:
    """Whether a source reads as a Hugging Face id, org/name or org/name@revision."""
    return _HUB_ID.fullmatch(source) is not None


def fetch(
    source: str,
    *,
    cache: Path,
    require_expert_json: bool = False,
    threads: int = 8,
    part_size: int = PART_SIZE,
    progress: Progress | None = None,
) -> Fetched:
    """Bring a checkpoint to this machine and identify it.

    What is there already is not downloaded again; a break is resumed by the next call. Raises StorageError when the source does
    not exist, cannot be reached, holds no model files, fails verification, or lacks ``expert.json`` where that is required.
    """
    cache = cache.absolute()
    if is_s3(source):
        return _fetch_s3(source, cache, require_expert_json, threads, part_size, progress)
    folder = Path(source).expanduser()
    if folder.is_file() and folder.suffix == GGUF:
        return _fetch_gguf(source, folder.resolve(), cache)
    if folder.exists():
        return _fetch_folder(source, folder, cache, require_expert_json)
    hub_id = _HUB_ID.fullmatch(source)
    if hub_id is None:
        expected = "a checkpoint folder, s3://bucket/prefix, or a Hugging Face id org/name@revision"
        raise StorageError(f"{without_secrets(source)!r} does not exist; expected {expected}")
    return _fetch_hub(source, hub_id["repo"], hub_id["revision"], cache, require_expert_json)


def digest_folder(folder: Path, *, cache: Path) -> tuple[str, dict[str, FileInfo]]:
    """(digest, files) of the model's files in a folder. Raises StorageError when there are none."""
    names = folder_model_files(folder)
    if not names:
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f". Folders in it do: {', '.join(inside[:5])}; name one of them" if inside else ""
        raise StorageError(f"{folder} holds no model files; expected a checkpoint: config.json and *.safetensors or *.bin{hint}")
    check_sizes({name: (folder / name).stat().st_size for name in names}, str(folder))
    files = digest_files(folder, names, cache=cache)
    return combined_digest(files), files


def _fetch_folder(source: str, folder: Path, cache: Path, require_expert_json: bool) -> Fetched:
    if not folder.is_dir():
        raise StorageError(f"{folder} is a file; name the checkpoint's folder")
    folder = folder.resolve()
    allow_path(folder, "the model")
    expert = _local_expert(folder, str(folder), require_expert_json)
    digest, files = digest_folder(folder, cache=cache)
    return Fetched(source=source, resolved=str(folder), path=folder, digest=digest, files=files, expert=expert)


def _fetch_gguf(source: str, file: Path, cache: Path) -> Fetched:
    """One GGUF model of a folder: a folder of the cache that holds nothing but links to its files."""
    allow_path(file, "the model")
    folder = cache / "gguf" / hashlib.sha256(str(file).encode()).hexdigest()[:32]
    names = gguf_model(source, file.name, (path.name for path in file.parent.glob(f"*{GGUF}")))
    with locked(cache, f"gguf links {folder.name}"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if not (folder / name).is_symlink():
                (folder / name).symlink_to(file.parent / name)
        note_use(folder)
    digest, files = digest_folder(folder, cache=cache)
    return Fetched(source=source, resolved=str(file), path=folder, digest=digest, files=files)


def _local_expert(folder: Path, where: str, required: bool) -> dict[str, Any] | None:
    path = folder / EXPERT_JSON
    if path.is_file():
        return read_expert_json(path)
    if required:
        raise no_expert_json(where)
    return None


def _fetch_s3(
    source: str, cache: Path, require_expert_json: bool, threads: int, part_size: int, progress: Progress | None
) -> Fetched:
    found = find_model(source, require_expert_json=require_expert_json)
    expected = {found.objects[name].uri: value for name, value in found.sha256.items() if name in found.objects}
    path, all_files = _bring(found.objects, expected, cache, threads, part_size, progress)
    files = {name: info for name, info in all_files.items() if not is_beside(name)}
    return Fetched(source=source, resolved=found.uri, path=path, digest=combined_digest(files), files=files, expert=found.expert)


def _bring(
    wanted: dict[str, S3Object], expected: dict[str, str], cache: Path, threads: int, part_size: int, progress: Progress | None
) -> tuple[Path, dict[str, FileInfo]]:
    """Download these objects and link them into a folder that is named after all its files, the manifest included."""
    known = download(list(wanted.values()), cache=cache, sha256=expected, threads=threads, part_size=part_size, progress=progress)
    files = {name: FileInfo(size=one.size, digest=known[one.uri].digest) for name, one in wanted.items()}
    name = combined_digest(files).removeprefix("xxh3:")
    return link_folder(cache, cache / "checkpoints" / name, files), files


def find_objects(uri: str, names: Sequence[str] | None = None) -> dict[str, S3Object]:
    """The objects of these names below a prefix (all of them by default). Raises StorageError when there is none, or one is missing."""
    found = objects_below(uri)
    if not found:
        raise nothing_there(uri)
    if names is not None:
        lost = ", ".join(sorted(set(names) - set(found)))
        if lost:
            raise StorageError(f"{uri} does not hold {lost}; make it again")
        found = {name: found[name] for name in names}
    return found


def download_folder(
    uri: str,
    *,
    cache: Path,
    names: Sequence[str] | None = None,
    threads: int = 8,
    part_size: int = PART_SIZE,
    progress: Progress | None = None,
) -> tuple[Path, dict[str, FileInfo]]:
    """The objects of these names below a prefix (all of them by default), whatever they are, as a folder of the cache.

    Raises StorageError when there is none, or not every one that is named.
    """
    found = find_objects(uri, names)
    return _bring(found, {}, cache.absolute(), threads, part_size, progress)


def _fetch_hub(source: str, repo: str, revision: str | None, cache: Path, require_expert_json: bool) -> Fetched:
    """A snapshot in the user's ordinary Hugging Face cache, which is shared with every other tool."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=15)
    except (HfHubHTTPError, HFValidationError) as error:
        raise _hub_error(source, repo, revision, error) from error
    except Exception as error:  # no answer at all; which class says so depends on the hub's HTTP library
        try:
            # The hub's library refuses a snapshot that lacks one of the files asked for.
            ignored = [*NOT_MODEL_FILES, "pytorch_model*.bin*", "*/*"]
            folder = Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    allow_patterns=[*MODEL_FILES, *BESIDE, CODE],
                    ignore_patterns=ignored,
                    local_files_only=True,
                )
            )
        except LocalEntryNotFoundError:
            raise _hub_error(source, repo, revision, error) from error
        # A branch may have moved on since; who merges from a copy of unknown age has to know.
        log.warning(
            "%s: the hub does not answer (%s); the snapshot %s in the local cache is used", source, said(error), folder.name
        )
    else:
        listed = [sibling.rfilename for sibling in info.siblings or []]
        wanted = [
            *model_files(listed, _taken_on_hub(repo, info.sha, listed)),
            *BESIDE,
            *(name for name in listed if is_beside(name) and name not in BESIDE),
        ]
        check_one_gguf(
            source, wanted, f"download the one that is meant (hf download {repo} {{name}} --local-dir .), and name that file"
        )
        try:
            folder = Path(snapshot_download(repo, revision=info.sha, allow_patterns=wanted))
        except Exception as error:  # the hub, its store of large files, the disk: each fails with classes of its own
            raise _hub_error(source, repo, revision, error) from error
    names = folder_model_files(folder)
    if not names:
        raise StorageError(f"{source!r}: the repository holds no model files (config.json, *.safetensors, *.bin)")
    files = digest_files(folder, names, cache=cache)
    return Fetched(
        source=source, resolved=f"{repo}@{folder.name}", path=folder, digest=combined_digest(files), files=files,
        expert=_local_expert(folder, source, require_expert_json),
    )  # fmt: skip


def _taken_on_hub(repo: str, revision: str | None, listed: list[str]) -> Taken:
    """The checkpoint-* that fits the weights, where a repository holds several: the hub knows the digest of every large file."""
    if len({one for name in listed if (one := checkpoint_of(name))}) < 2:
        return None
    from huggingface_hub import HfApi, hf_hub_download

    siblings = HfApi().model_info(repo, revision=revision, timeout=15, files_metadata=True).siblings or []
    contents = {one.rfilename: str(one.lfs.sha256 if one.lfs else one.blob_id) for one in siblings}
    return taken_of(contents, lambda name: Path(hf_hub_download(repo, name, revision=revision)).read_bytes())


def _hub_error(source: str, repo: str, revision: str | None, error: Exception) -> StorageError:
    return StorageError(
        f"{source!r} is no folder here, and as a Hugging Face id ({repo}, revision {revision or 'main'}) "
        f"it could not be downloaded: {said(error)}. Check the spelling, the network and the token, "
        "or name a local folder"
    )


def upload_folder(
    folder: Path,
    uri: str,
    *,
    last: str | None = None,
    files: Mapping[str, str] | None = None,
    threads: int = 8,
    part_size: int = PART_SIZE,
    progress: Progress | None = None,
) -> list[str]:
    """Upload every file of a folder below a prefix, ``last`` (a manifest or record) after all others. Returns the names sent.

    ``files``: only these, by name their SHA-256 in hex, which then is not computed here. An object that is there already with the same size and SHA-256 is not sent again. Objects that the folder lacks stay.
    Uploads of somebody else below the prefix that were given up are ended, after a day.
    Raises StorageError when ``last`` is not in the folder or the server refuses.
    """
    names = sorted(files or (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()))
    if not names:
        raise StorageError(f"{folder} holds no files to upload to {uri}")
    if last is not None and last not in names:
        raise StorageError(f"{folder} holds no {last}, which would be uploaded last to {uri}; write it first")
    sizes = {name: (folder / name).stat().st_size for name in names}
    end_unfinished(uri, before=datetime.now(UTC) - ABANDONED)
    there = {one.uri: one for one in list_objects(uri)}
    tick = Ticker(progress, sum(sizes.values()))
    sent: list[str] = []

    def missing(some: Iterable[str]) -> Iterator[tuple[Path, str, str]]:
        """What must be sent of these; each is hashed while those before it are under way."""
        for name in some:
            target, digest = join(uri, name), files[name] if files else sha256_file(folder / name)
            old = there.get(target)
            if old and old.size == sizes[name] and (head(target) or {}).get("Metadata", {}).get("sha256") == digest:
                tick(sizes[name])
                continue
            sent.append(name)
            yield folder / name, target, digest

    upload_files(missing(name for name in names if name != last), part_size=part_size, threads=threads, callback=tick)
    if last is not None:
        upload_files(missing([last]), part_size=part_size, threads=threads, callback=tick)
    return sent
