"""``.metadata`` of a DCP folder: which tensors there are, in which boxes they are cut, and where each box lies in which file."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ota_core.errors import CheckpointError
from ota_core.files.pickled.unpickle import unpickle
from ota_core.files.rows import NAMED, Dtype
from ota_core.reading import read_file

METADATA = ".metadata"
AGAIN = "fetch or save the checkpoint again"
RECORDS = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "pathlib.")
"""Classes of the description, of which only the attributes are read."""


@dataclass(frozen=True)
class Place:
    """A file of torch.save within a larger file: bytes offset:offset+length."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """One box of a tensor: where it begins, how large it is, and where its numbers lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class DcpTensor:
    """One tensor, cut into boxes that cover it."""

    dtype: Dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Listing:
    """What a folder holds by its metadata."""

    tensors: dict[str, DcpTensor]
    objects: dict[str, Place]
    """Whatever is no tensor: pickled objects, such as numbers and tuples of an optimizer's settings."""
    paths: dict[str, tuple[Any, ...]]
    """Name to the keys of the nested dictionaries that it stands for, where the writer noted them."""


def read_metadata(folder: Path) -> Listing:
    """Raises CheckpointError, naming the file, when it is missing, damaged, names code, or does not describe whole tensors."""
    path = folder / METADATA
    try:
        saved = unpickle(read_file(path), RECORDS)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a folder of torch.distributed.checkpoint needs it: fetch it") from None
    except Exception as error:  # a damaged or hostile pickle can raise anything; nothing of it has been executed
        raise CheckpointError(
            f"{path} cannot be read: {type(error).__name__}: {error!s:.300}. It is truncated, damaged, or was not written by "
            f"torch.distributed.checkpoint; {AGAIN}"
        ) from None
    try:
        stored = {(index.fqn, getattr(index, "offset", None)): _place(info) for index, info in saved.storage_data.items()}
        tensors, objects = {}, {}
        for name, entry in saved.state_dict_metadata.items():
            if type(entry).__name__ == "TensorStorageMetadata":
                tensors[name] = _tensor(name, entry, stored)
            else:
                objects[name] = stored[name, None]
        paths = getattr(saved, "planner_data", None) or {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not built as torch.distributed.checkpoint builds it ({type(error).__name__}: {error!s:.200}); {AGAIN}"
        ) from None
    return Listing(tensors, objects, {key: tuple(way) for key, way in paths.items() if isinstance(way, tuple)})


def _place(info: Any) -> Place:
    if getattr(info, "transform_descriptors", None):
        raise ValueError(f"its files are transformed by {info.transform_descriptors}, plain files are read")
    if Path(info.relative_path).name != info.relative_path:
        raise ValueError(f"it names the file {info.relative_path!r}, one beside it was expected")
    if int(info.offset) < 0 or int(info.length) < 0:
        raise ValueError(f"{info.relative_path} is said to hold {info.length} bytes at byte {info.offset}")
    return Place(info.relative_path, int(info.offset), int(info.length))


def _tensor(name: str, entry: Any, stored: Mapping[tuple[str, Any], Place]) -> DcpTensor:
    # TensorProperties pickle as a tuple that begins with the dtype; old ones as attributes.
    properties = entry.properties
    dtype = properties.state[0] if properties.state is not None else properties.dtype
    shape = tuple(map(int, entry.size))
    chunks = []
    for chunk in entry.chunks:
        offsets, sizes = tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes))
        if not prod(sizes):
            continue
        key = (name, offsets) if (name, offsets) in stored else (name, None)
        chunks.append(Chunk(offsets, sizes, stored[key]))
        if len(offsets) != len(shape) or any(o < 0 or o + s > n for o, s, n in zip(offsets, sizes, shape, strict=True)):
            raise ValueError(f"{name!r} of the shape {list(shape)} has a part {list(sizes)} at {list(offsets)}")
    if len({chunk.offsets for chunk in chunks}) != len(chunks) or sum(prod(chunk.sizes) for chunk in chunks) != prod(shape):
        raise ValueError(f"the parts of {name!r} do not cover its shape {list(shape)}, each element once")
    return DcpTensor(NAMED[dtype], shape, tuple(sorted(chunks, key=lambda chunk: chunk.offsets)))
