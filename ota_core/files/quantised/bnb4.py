"""bitsandbytes in 4 bits (nf4, fp4), with double quantisation or without: Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, sections 3 and 4.

Beside ``W`` lie ``W.absmax`` (one number a block), ``W.quant_map`` (the 16 numbers of the codes) and ``W.quant_state.bitsandbytes__nf4``, a text in
JSON with shape, type and block size. With double quantisation ``absmax`` is codes, too: ``W.nested_quant_map``, ``W.nested_absmax``.
"""

from collections.abc import Mapping
from math import prod
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from ota_core.compute.blocks import matrix_shape
from ota_core.files.quantised.codes import scale_flat
from ota_core.files.quantised.scaled import Misfit
from ota_core.files.quantised.stored import Coded, Stored
from ota_core.files.rows import NAMED, Dtype
from ota_core.reading import MAX_AXES, json_value

STATE = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_LONGEST = 2**16
"""Bytes of a description; the library's have some 200."""
_Size = Annotated[int, Field(strict=True, ge=1, le=2**40)]


class _Facts(BaseModel):
    """What the description says that is needed here."""

    quant_type: Literal["nf4", "fp4"]
    shape: Annotated[tuple[_Size, ...], Field(min_length=1, max_length=MAX_AXES)]
    blocksize: _Size
    dtype: str | None = None
    nested_blocksize: Annotated[int, Field(strict=True, ge=0, le=2**40)] | None = None
    nested_offset: Annotated[float, Field(ge=-3e38, le=3e38)] | None = None


class Bnb4(Coded):
    """One weight in blocks of codes, row after row."""

    def __init__(self, codes: Stored, state: Stored, parts: Mapping[str, Stored]) -> None:
        """``parts``: of ``PARTS`` those that are there. Raises Misfit."""
        facts = _facts(state)
        self._codes, self._parts = codes, parts
        self.kind, self.shape, self._block = facts.quant_type, facts.shape, facts.blocksize
        self.dtype: Dtype | None = NAMED.get(facts.dtype or "")
        self._nested, self._offset = facts.nested_blocksize or 0, np.float32(facts.nested_offset or 0)
        count = prod(self.shape)
        blocks = -(-count // self._block)
        least = {".absmax": blocks, ".quant_map": 16}
        if self._nested:
            least |= {".nested_absmax": -(-blocks // self._nested), ".nested_quant_map": 256}
        if lacking := [part for part in least if part not in parts]:
            raise Misfit(f"lacks {', '.join(codes.name + part for part in lacking)}")
        held = codes.info.dtype.itemsize * prod(codes.shape)
        if held < -(-count // 2) or parts[".absmax"].shape != (blocks,):
            raise Misfit(
                f"has {held} bytes of codes and scales of the shape {list(parts['.absmax'].shape)}; its shape {list(self.shape)} in blocks of "
                f"{self._block} needs {-(-count // 2)} bytes and {blocks} scales"
            )
        if small := [part for part, needed in least.items() if prod(parts[part].shape) < needed]:
            raise Misfit(
                f"has too few numbers in {', '.join(f'{codes.name}{one} ({prod(parts[one].shape)} of {least[one]})' for one in small)}"
            )
        if self._nested and parts[".absmax"].code != "U8":
            raise Misfit(
                f"has scales '{parts['.absmax'].name}' in {parts['.absmax'].code}, expected codes (U8), as they are quantised themselves"
            )

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        columns = matrix_shape(self.shape)[1]
        first, last = start * columns, stop * columns
        out = np.empty(last - first, np.float32)
        if out.size:
            low, high = first // self._block, -(-last // self._block)
            packed = self._bytes(first // 2, -(-last // 2))
            table = self._parts[".quant_map"].whole().to_float32().reshape(-1)
            scale_flat(packed, first % 2, table, self._absmax(low, high), first - low * self._block, self._block, out)
        return out.reshape(stop - start, columns)

    def _absmax(self, low: int, high: int) -> NDArray[np.float32]:
        """Scales of blocks low:high."""
        held = self._parts[".absmax"].rows(low, high)
        if not self._nested:
            return held.to_float32().reshape(-1)
        table = self._parts[".nested_quant_map"].whole().to_float32().reshape(-1)
        nested = self._parts[".nested_absmax"].whole().to_float32().reshape(-1)
        found: NDArray[np.float32] = table[held.held.reshape(-1)] * nested[np.arange(low, high) // self._nested] + self._offset
        return found

    def _bytes(self, start: int, stop: int) -> NDArray[np.uint8]:
        size, columns = self._codes.info.dtype.itemsize, matrix_shape(self._codes.shape)[1]
        width = size * columns
        held = self._codes.bytes(start // width, -(-stop // width)).reshape(-1)
        skipped = start - start // width * width
        return held[skipped : skipped + stop - start]

    def prefetch(self, start: int, stop: int) -> None:
        columns = matrix_shape(self.shape)[1]
        width = 2 * self._codes.info.dtype.itemsize * matrix_shape(self._codes.shape)[1]
        self._codes.file.prefetch(self._codes.name, start * columns // width, -(-stop * columns // width))


def _facts(state: Stored) -> _Facts:
    try:
        if prod(state.shape) > _LONGEST:
            raise ValueError
        return _Facts.model_validate(json_value(state.bytes(0, matrix_shape(state.shape)[0]).tobytes()))
    except ValueError:
        raise Misfit(
            f"has a description '{state.name}' of its 4 bits by bitsandbytes that is no JSON with quant_type (nf4 or fp4), shape and blocksize"
        ) from None
