"""Numbers as files store them: their types, named as in the header of safetensors, and rows of a tensor in memory, held by numpy.

torch knows every one of these types, numpy does not: of those that it lacks it holds the bits. torch itself takes long to import and is
loaded by ``tensor`` alone, for what is not compiled.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dtype:
    """A storage type."""

    code: str
    """As the header of safetensors has it."""
    name: str
    """As torch, recipes and messages have it."""
    held: Any
    """The numpy type that holds it: its own, or unsigned integers of its size."""
    is_floating_point: bool = True

    @property
    def held_itself(self) -> bool:
        """Whether numpy has this type, and ``held`` is no more than the bits of another."""
        return bool(np.dtype(self.held).name == self.name)

    @property
    def itemsize(self) -> int:
        return int(np.dtype(self.held).itemsize)

    def __str__(self) -> str:
        return self.name


F64 = Dtype("F64", "float64", np.float64)
F32 = Dtype("F32", "float32", np.float32)
F16 = Dtype("F16", "float16", np.float16)
BF16 = Dtype("BF16", "bfloat16", np.uint16)
I64 = Dtype("I64", "int64", np.int64, False)
U8 = Dtype("U8", "uint8", np.uint8, False)
DTYPES: dict[str, Dtype] = {
    dtype.code: dtype
    for dtype in (
        F64, F32, F16, BF16, I64, Dtype("I32", "int32", np.int32, False), Dtype("I16", "int16", np.int16, False),
        Dtype("I8", "int8", np.int8, False), U8, Dtype("BOOL", "bool", np.bool_, False),
        Dtype("U16", "uint16", np.uint16, False), Dtype("U32", "uint32", np.uint32, False), Dtype("U64", "uint64", np.uint64, False),
        Dtype("F8_E4M3", "float8_e4m3fn", np.uint8), Dtype("F8_E5M2", "float8_e5m2", np.uint8),
        Dtype("F8_E8M0", "float8_e8m0fnu", np.uint8),
    )
}  # fmt: skip
NUMBERS = (F64, F32, F16, BF16)
"""Types whose numbers mean what they say, everywhere: 8 bits and integers may be codes with scales of their own."""
NAMED = {dtype.name: dtype for dtype in DTYPES.values()}


def dtype_of(tensor: "torch.Tensor") -> Dtype:
    """The type of a tensor."""
    return NAMED[str(tensor.dtype).removeprefix("torch.")]


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a tensor, seen as the matrix of ``blocks.matrix_shape``; read-only by agreement where they come from a file."""

    dtype: Dtype
    held: NDArray[Any]
    """(n, C), of the type ``dtype.held``, contiguous."""
    _tensor: "torch.Tensor | None" = None
    """What lies in the same memory, where that was a tensor first."""
    watch: NDArray[np.int64] | None = None
    """Where a compiled pass notes that one of the numbers is not finite, int64 (1,); None where nobody asks."""
    present: NDArray[np.bool_] | None = None
    """Which rows the model has, bool (n,): the others are zeros, of tokens that its vocabulary lacks. None: all."""

    @classmethod
    def of(cls, tensor: "torch.Tensor") -> "Rows":
        """A tensor's memory on the CPU, (n, C); a copy of it where it is not contiguous."""
        import torch

        dtype, tensor = dtype_of(tensor), tensor.contiguous()
        return cls(dtype, tensor.view(getattr(torch, np.dtype(dtype.held).name)).numpy(), tensor)

    @classmethod
    def float32(cls, values: NDArray[np.float32]) -> "Rows":
        """Rows of float32, (n, C)."""
        return cls(F32, values)

    @property
    def size(self) -> int:
        """Elements."""
        return self.held.size

    @property
    def nbytes(self) -> int:
        return self.held.nbytes

    @property
    def address(self) -> int:
        """Of the first element; valid as long as these rows live."""
        return int(self.held.ctypes.data)

    def tensor(self) -> "torch.Tensor":
        """The same memory as a tensor."""
        import torch

        if self._tensor is not None:
            return self._tensor
        return torch.from_numpy(self.held).view(getattr(torch, self.dtype.name))

    def to_float32(self) -> NDArray[np.float32]:
        """The numbers as float32, (n, C): the rows themselves where they are float32 already."""
        if self.dtype == BF16:
            return (self.held.astype(np.uint32) << 16).view(np.float32)
        if self.dtype.held_itself:
            return self.held.astype(np.float32, copy=False)
        found: NDArray[np.float32] = self.tensor().float().numpy()
        return found
