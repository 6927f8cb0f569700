"""Where an expert's second moments lie, and the reader for what is found there: a registry with one entry per format.

A format is added by one entry in ``FORMATS``. Its functions must work without torch, ``open`` excepted, and import readers inside.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from ota_core.errors import MomentsError
from ota_core.files.byte_source import SourceOf
from ota_core.files.pickled.torch_file import ZIP
from ota_core.files.safetensors_io import FORMAT_KEY, MAX_HEADER
from ota_core.moments.base import Moments
from ota_core.moments.dcp import dcp_files, find_dcp, is_dcp, open_dcp
from ota_core.moments.deepspeed import find_deepspeed, is_deepspeed, open_deepspeed, rank_files
from ota_core.moments.fit import Once, fitted
from ota_core.moments.match import Layout
from ota_core.moments.nanotron import find_nanotron, is_nanotron, nanotron_files, open_nanotron
from ota_core.moments.safetensors_file import SHARD_NAME, SafetensorsMoments, check_shard_set, index_files, open_file
from ota_core.moments.steps import Choice, choose

SINGLE = "exp_avg_sq.safetensors"
SHARDS = "exp_avg_sq*.safetensors"
INDEXES = "exp_avg_sq*.index.json"
TUNE = "recipe_state.pt"
OPTIMIZERS = ("optimizer.pt", "optimizer.bin")  # the Trainer's names, the second under FSDP


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format of second moments: how it is found, told by its content, covered by a digest, and opened."""

    names: str
    """What is looked for, as messages say it."""
    find: Callable[[Path], Sequence[Path]]
    """The second moments of this format that lie in a folder, which may be one itself: files, or folders of many files."""
    reads: Callable[[Path], bool]
    """Whether an existing file or folder, found or named by the user, is of this format. The first format that says so opens it."""
    files: Callable[[Path], list[Path]]
    """Every file that v is read from: what a digest of these second moments covers."""
    open: Callable[[Path, Layout, SourceOf | None], Moments]
    """The reader. Raises MomentsError for what is missing, damaged or cannot be matched to names."""
    in_checkpoints: bool = True
    """Whether it is looked for in the subfolders checkpoint-* as well, where the Trainer writes."""


def none_found(where: object) -> str:
    """The beginning of the message where second moments are missing. where: the folder or address that was looked in."""
    return f"{where} holds no second moments; expected {', '.join(one.names for one in FORMATS)}"


def find_moments(folder: Path) -> Path | None:
    """The second moments in an expert's folder: a file, an index of shards, or a folder that holds them in many files.

    Looks for every format, in the order of ``FORMATS``. Of several checkpoint-* it takes the newest that fits the weights in the folder,
    and of none of them where the folder itself holds some (``choice_in``). None when there are none; MomentsError when it is unclear which.
    """
    hits, _ = _chosen(folder)
    if len(hits) > 1:
        raise MomentsError(
            f"{folder} holds several second moments: {', '.join(str(hit.relative_to(folder)) for hit in hits)}; one was "
            "expected: set preconditioner_path to the one that belongs to the weights"
        )
    return hits[0] if hits else None


def choice_in(folder: Path) -> Choice | None:
    """Which of several checkpoint-* ``find_moments`` takes in this folder, and why; None where there is nothing to choose."""
    return _chosen(folder)[1]


def _chosen(folder: Path) -> tuple[list[Path], Choice | None]:
    return choose(folder, _hits(folder))


def _hits(folder: Path) -> list[Path]:
    hits = [hit for one in FORMATS for hit in one.find(folder)]
    for checkpoint in sorted(path for path in folder.glob("checkpoint-*") if path.is_dir()):
        hits += [hit for one in FORMATS if one.in_checkpoints for hit in one.find(checkpoint)]
    # One file under two names (a link) is one hit.
    return [hit for i, hit in enumerate(hits) if not any(hit.samefile(before) for before in hits[:i])]


def moments_files(path: Path) -> list[Path]:
    """Every file that ``open_moments(path)`` reads v from: what a digest of these second moments has to cover."""
    form, path = _located(path)
    return form.files(path)


def open_moments(
    path: Path, *, layout: Layout = None, source_of: SourceOf | None = None, tensors: Collection[str] | None = None
) -> Moments:
    """The reader for a file, an index or a folder of second moments, chosen by content, not by name.

    layout: the model's parameters, or a function that builds it when it is needed: for optimizer states that number them, and for
    names of the model that are not those of its checkpoint.
    source_of: where the bytes of v come from, if not from the files themselves.
    tensors: the names of the weights and of what is tied to them (``vocabulary.tensor_names``), which v then has, too.
    Raises MomentsError for what is missing, damaged or cannot be matched to names.
    """
    form, path = _located(path)
    once = Once(layout)
    return fitted(form.open(path, once if once.given else None, source_of), once, tensors)


def _located(path: Path) -> tuple[Format, Path]:
    """The format, and what ``find_moments`` finds in a folder; a file or an index is itself."""
    if path.is_dir():
        found = find_moments(path)
        if found is None:
            raise MomentsError(f"{none_found(path)}: save them there or set preconditioner_path")
        path = found
    elif not path.is_file():
        raise MomentsError(f"{path} does not exist; a file of second moments was expected there: check preconditioner_path")
    return next(one for one in FORMATS if one.reads(path)), path


def _starts(path: Path) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(8)
    except OSError as error:
        raise MomentsError(f"{path} cannot be opened ({error.strerror}): check its permissions") from None


def _find_safetensors(folder: Path) -> list[Path]:
    indexes = sorted(folder.glob(INDEXES))
    listed = {file for index in indexes for file in index_files(index)}
    alone = [file for file in _loose_shards(folder) if file not in listed]
    hits = [folder / SINGLE] if (folder / SINGLE).is_file() and folder / SINGLE not in listed else []
    hits += indexes
    if alone:
        hits.append(alone[0] if len(alone) == 1 and not SHARD_NAME.fullmatch(alone[0].name) else folder)
    return hits


def _loose_shards(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob(SHARDS) if file.name != SINGLE and file.is_file())


def _is_safetensors(path: Path) -> bool:
    return bool(_loose_shards(path)) if path.is_dir() else not _is_torch_file(path)


def _safetensors_files(path: Path) -> list[Path]:
    if path.is_dir():
        shards = _loose_shards(path)
        check_shard_set(shards)
        return shards
    return [path, *index_files(path)] if _starts(path).startswith(b"{") else [path]


def _open_safetensors(path: Path, layout: Layout, source_of: SourceOf | None) -> Moments:
    files = _safetensors_files(path)
    if path.is_dir():
        return SafetensorsMoments(path, files, source_of)
    if len(files) > 1:
        return SafetensorsMoments(path, files[1:], source_of)
    shard = SHARD_NAME.fullmatch(path.name)
    if shard and int(shard["count"]) > 1:
        raise MomentsError(f"{path} is one shard of {int(shard['count'])}; name their index or folder instead: {path.parent}")
    with open_file(path, source_of) as file:
        compressed = FORMAT_KEY in file.metadata
    if not compressed:
        return SafetensorsMoments(path, files, source_of)
    from ota_core.moments.compression import open_compressed  # it imports this package

    return open_compressed(path, source_of)


def _find_tune(folder: Path) -> list[Path]:
    return [path for path in (folder / TUNE, folder / "recipe_state" / TUNE) if path.is_file()]


def _open_tune(path: Path, layout: Layout, source_of: SourceOf | None) -> Moments:
    from ota_core.moments.foreign.tune import open_tune

    return open_tune(path, layout, source_of)


def _find_optimizer(folder: Path) -> list[Path]:
    return [folder / name for name in OPTIMIZERS if (folder / name).is_file()]


def _is_torch_file(path: Path) -> bool:
    first = b"" if path.is_dir() else _starts(path)
    # A safetensors file begins with the length of its header, which could by chance begin with the byte of a pickle.
    return first.startswith(ZIP) or (first.startswith(b"\x80") and int.from_bytes(first, "little") > MAX_HEADER)


def _open_optimizer(path: Path, layout: Layout, source_of: SourceOf | None) -> Moments:
    from ota_core.moments.trainer import open_optimizer

    return open_optimizer(path, layout, source_of)


FORMATS: tuple[Format, ...] = (
    Format(
        names=f"{SINGLE}, {SHARDS} (shards)",
        find=_find_safetensors, reads=_is_safetensors, files=_safetensors_files, open=_open_safetensors, in_checkpoints=False,
    ),
    Format(
        names="global_step*/ of DeepSpeed",
        find=find_deepspeed, reads=is_deepspeed, files=rank_files, open=open_deepspeed,
    ),
    Format(
        names="optimizer_0/ of FSDP",
        find=find_dcp, reads=is_dcp, files=dcp_files, open=open_dcp,
    ),
    Format(
        names=f"{TUNE} of torchtune",
        find=_find_tune, reads=lambda path: path.name == TUNE and _is_torch_file(path), files=lambda path: [path], open=_open_tune,
    ),
    Format(
        names="optimizer/ of nanotron",
        find=find_nanotron, reads=is_nanotron, files=nanotron_files, open=open_nanotron,
    ),
    Format(
        names=f"{', '.join(OPTIMIZERS)} (also in checkpoint-*)",
        find=_find_optimizer, reads=_is_torch_file, files=lambda path: [path], open=_open_optimizer,
    ),
)  # fmt: skip
"""Every format, in the order in which it is looked for and named in messages."""
