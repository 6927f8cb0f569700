"""Pickles of torch.save and torch.distributed.checkpoint, read without running anything that they name, and without torch.

A pickle asks for classes and functions by name. Here every name is looked up in a table: plain containers, what torch writes for tensors,
which become notes of where the numbers lie, and classes that the caller takes as records, which hold what the pickle gives them and do
nothing. Any other name is refused.
"""

import io
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Self

from ota_core.files.rows import NAMED, Dtype
from ota_core.reading import MAX_AXES, quoted

# Storage classes of torch, by the type of their elements. UntypedStorage counts bytes.
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip
# What else torch names when it saves tensors: types of elements, of storages and of tensors, which are kept as their names.
_NAMES = re.compile(r"(?:q?u?int|float|bfloat|complex|bits|bool|per_)\w*|\w*Storage|\w*Tensor|Parameter|Buffer")
_MODULES = frozenset({"torch", "torch.cuda", "torch.sparse", "torch.cuda.sparse", "torch.storage", "torch.nn.parameter"})
# Tensor subclasses whose parts are read; torchao moved them in 0.11.
PARTS = {
    f"{module}.subclass_{file}.{kind}"
    for module in ("torchao.optim", "torchao.prototype.low_bit_optim")
    for file, kind in (("8bit", "OptimState8bit"), ("4bit", "OptimState4bit"), ("fp8", "OptimStateFp8"))
}


class Refused(pickle.UnpicklingError):
    """A pickle names a class or a function that is not known: ``name``, as ``module.name``."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it names {name}, which could run code and is not loaded")
        self.name = name


class Record:
    """An object of a class that is not run: its arguments, and its attributes under their names."""

    state: Any = None
    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any) -> Self:
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _Fixed:
    """What a pickle cannot change once it is made: whatever is checked when it is made stays true."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it would change a {type(self).__name__}, which no file of torch.save does")


@dataclass(frozen=True)
class SavedTensor(_Fixed):
    """A tensor in a file of torch.save: which storage record it is in, and how its elements lie there."""

    dtype: str
    storage: str
    elements: int
    """Of the whole storage; −1 where the type of the elements is not known."""
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def known(self) -> Dtype | None:
        """The type of the elements; None where it is none that is read."""
        return NAMED.get(self.dtype)

    @property
    def is_floating_point(self) -> bool:
        return self.known is not None and self.known.is_floating_point

    @property
    def numel(self) -> int:
        """Elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def span(self) -> int:
        """Elements of the storage from the first to the last one; 0 without any."""
        if not self.numel:
            return 0
        return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))

    def without(self, axis: int) -> "SavedTensor":
        """The same elements without an axis of length 1."""
        keep = [i for i in range(len(self.shape)) if i != axis % len(self.shape)]
        shape, stride = tuple(self.shape[i] for i in keep), tuple(self.stride[i] for i in keep)
        return SavedTensor(self.dtype, self.storage, self.elements, self.offset, shape, stride)

    @property
    def contiguous(self) -> bool:
        """Whether the elements follow one another in the order of their indices."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return not self.numel
            expected *= size
        return True


@dataclass(frozen=True)
class SavedParts(_Fixed):
    """A tensor of a subclass that is made of others: the name of its class, its outer shape, and its parts by name."""

    kind: str
    shape: tuple[int, ...]
    parts: dict[str, Any]


class OtherTensor(Record):
    """A sparse, quantised or nested tensor, which is not read."""


class _Restricted(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, records: Sequence[str]) -> None:
        super().__init__(stream)
        self._records = tuple(records)
        self.storages: dict[str, tuple[str, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        known = _KNOWN.get((module, name))
        if known is not None:
            return _Call(known)
        full = f"{module}.{name}"
        if full in PARTS:
            return _PartsName(name)
        if full == "torch._tensor.Tensor" or (module in _MODULES and _NAMES.fullmatch(name)):
            return _Name(name)
        if self._records and full.startswith(self._records):
            return type(name, (Record,), {})
        raise Refused(full)

    def persistent_load(self, pid: Any) -> Any:
        # ('storage', class, key, device, elements); torch's old format adds a note of storages that are part of others.
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or any(part is not None for part in pid[5:]):
            raise pickle.UnpicklingError(f"a storage is described by {quoted(pid)}")
        kind, key, elements = pid[1], pid[2], pid[4]
        if not (isinstance(kind, _Name) and isinstance(key, str) and type(elements) is int and elements >= 0):
            raise pickle.UnpicklingError(f"a storage is described by {quoted(pid)}")
        self.storages[key] = STORAGES.get(kind, str(kind)), elements
        return _Storage(self.storages[key][0], key, elements)


class _Call(_Fixed):
    """One of the functions below. A pickle may call it, and no more."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _Name(str):
    """The name of a type."""

    __slots__ = ()


class _PartsName(_Name):
    """The name of a tensor subclass of ``PARTS``."""

    __slots__ = ()


@dataclass(frozen=True)
class _Storage(_Fixed):
    dtype: str
    key: str
    elements: int


def _tensor(storage: Any, offset: int, shape: Any, stride: Any, *_: Any) -> SavedTensor:
    if len(shape) > MAX_AXES:
        raise pickle.UnpicklingError(f"a tensor has {len(shape)} axes, at most {MAX_AXES} are read")
    made = SavedTensor(
        storage.dtype, storage.key, storage.elements if storage.dtype in NAMED else -1, int(offset), tuple(map(int, shape)),
        tuple(map(int, stride)),
    )  # fmt: skip
    if min(made.offset, *made.shape, *made.stride, 0) < 0 or len(made.shape) != len(made.stride):
        raise pickle.UnpicklingError(
            f"a tensor begins at {quoted(offset)} with the shape {quoted(made.shape)} and the strides {quoted(made.stride)}"
        )
    return made


def _typed_tensor(storage: Any, offset: int, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: str, *_: Any) -> SavedTensor:
    made = _tensor(storage, offset, shape, stride)
    elements = made.elements // NAMED[dtype].itemsize if dtype in NAMED else -1
    return SavedTensor(str(dtype), made.storage, elements, made.offset, made.shape, made.stride)


def _of_parts(kind: str, dtype: Any, shape: Any, *_: Any) -> SavedParts | OtherTensor:
    return SavedParts(str(kind), tuple(map(int, shape)), {}) if isinstance(kind, _PartsName) else OtherTensor(kind)


def _of_type(rebuild: Callable[..., Any], kind: Any, arguments: Any, state: Any) -> Any:
    """A tensor with attributes of its own, which count for subclasses that are made of parts."""
    made = rebuild(*arguments)
    if isinstance(made, SavedParts):
        state = state[0] if isinstance(state, tuple) and state else state
        made.parts.update(state if isinstance(state, dict) else {})
    return made


def _first(value: Any, *_: Any) -> Any:
    return value


def _text(value: Any, encoding: str = "latin1") -> bytes:
    if not isinstance(value, str) or encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes are described by {quoted(value, 80)} in {quoted(encoding, 80)}")
    return value.encode("latin1")


def _bytes(value: Any = b"", *_: Any) -> bytes:
    if not isinstance(value, (bytes, bytearray)):  # a number would ask for as much memory
        raise pickle.UnpicklingError(f"bytes are described by {quoted(value, 80)}")
    return bytes(value)


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _first,
    ("torch._utils", "_rebuild_wrapper_subclass"): _of_parts,
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    **{
        ("torch._utils", f"_rebuild_{kind}"): OtherTensor
        for kind in ("sparse_tensor", "qtensor", "nested_tensor", "meta_tensor_no_storage", "device_tensor_from_numpy")
    },
    ("torch.serialization", "_get_layout"): str,
    ("torch", "Size"): tuple,
    ("torch", "device"): lambda *parts: ":".join(map(str, parts)),
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    **{(module, name): made for module in ("builtins", "__builtin__") for name, made in (("set", set), ("bytearray", _bytes))},
    ("builtins", "complex"): complex,
    ("_codecs", "encode"): _text,
}


def unpickle(data: bytes | BinaryIO, records: Sequence[str] = ()) -> Any:
    """The object that a pickle describes. A stream is left behind the pickle.

    records: how the full names of classes begin that become records. Raises Refused for a name that is not known, and whatever a damaged
    pickle raises.
    """
    return _Restricted(io.BytesIO(data) if isinstance(data, bytes) else data, records).load()


def unpickle_with_storages(stream: BinaryIO, records: Sequence[str] = ()) -> tuple[Any, dict[str, tuple[str, int]]]:
    """The same, and the storages that it asks for: key to the type and the number of their elements."""
    restricted = _Restricted(stream, records)
    return restricted.load(), restricted.storages
