"""Pickles of torch.distributed.checkpoint, read without running anything that they name.

A pickle asks for classes and functions by name. Here every name is looked up in a table: those of the checkpoint's own description become
records that hold what the pickle gives them, those that torch.save writes for tensors become a note of where the numbers lie, and any
other name is refused.
"""

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

from ota_core.files.rows import NAMED

# Storage classes of torch, by the type of their elements. UntypedStorage counts bytes.
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip
RECORDS = ("torch.distributed.checkpoint.", "torch.distributed._shard.", "pathlib")


class Record:
    """An object of a class that is not run: its arguments, and its attributes under their names."""

    state: Any = None

    def __new__(cls, *arguments: Any) -> Self:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    arguments: tuple[Any, ...]

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


@dataclass(frozen=True)
class SavedTensor:
    """A tensor in a file of torch.save: which storage record it is in, and how its elements lie there."""

    dtype: str
    storage: str
    elements: int
    """Of the whole storage."""
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in NAMED:
            return name
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch.storage" and name == "UntypedStorage":
            return STORAGES[name]
        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if module.startswith(RECORDS):
            return type(name, (Record,), {})
        raise pickle.UnpicklingError(f"it names {module}.{name}, which could run code and is not loaded")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, elements = pid
        if not (isinstance(dtype, str) and isinstance(key, str) and type(elements) is int):
            raise pickle.UnpicklingError(f"a storage is described by {pid!r:.200}")
        return dtype, key, elements


def _tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> SavedTensor:
    dtype, key, elements = storage
    made = SavedTensor(dtype, key, elements, int(offset), tuple(map(int, shape)), tuple(map(int, stride)))
    if min(made.offset, *made.shape, *made.stride, 0) < 0 or len(made.shape) != len(made.stride):
        raise pickle.UnpicklingError(f"a tensor begins at {offset} with the shape {made.shape} and the strides {made.stride}")
    return made


def _typed_tensor(storage: Any, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: str, *_: Any) -> SavedTensor:
    made = _tensor(storage, offset, shape, stride)
    return SavedTensor(dtype, made.storage, made.elements // NAMED[dtype].itemsize, made.offset, made.shape, made.stride)


def _first(value: Any, *_: Any) -> Any:
    return value


def _layout(name: Any) -> Any:
    return str(name)


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch.serialization", "_get_layout"): _layout,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *parts: ":".join(map(str, parts)),
    ("collections", "OrderedDict"): OrderedDict,
}


def unpickle(data: bytes | BinaryIO) -> Any:
    """The object that a pickle describes, its classes as records. Raises pickle.UnpicklingError for a name that is not known,
    and whatever a damaged pickle raises."""
    return _Restricted(io.BytesIO(data) if isinstance(data, bytes) else data).load()
