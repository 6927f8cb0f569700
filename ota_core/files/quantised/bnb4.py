"""bitsandbytes in 4 bits (nf4, fp4), with double quantisation or without: Dettmers et al. 2023, "QLoRA", arXiv 2305.14314, sections 3 and 4.

Beside ``W`` lie ``W.absmax`` (one number a block), ``W.quant_map`` (the 16 numbers of the codes) and ``W.quant_state.bitsandbytes__nf4``, a text in
JSON with shape, type and block size. With double quantisation ``absmax`` is codes, too: ``W.nested_quant_map``, ``W.nested_absmax``.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.files.quantised.codes import scale_flat
from ota_core.files.quantised.scaled import Misfit
from ota_core.files.quantised.stored import Coded, Stored
from ota_core.files.rows import NAMED, Dtype

STATE = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


class Bnb4(Coded):
    """One weight in blocks of codes, row after row."""

    def __init__(self, codes: Stored, state: Stored, parts: Mapping[str, Stored]) -> None:
        """``parts``: of ``PARTS`` those that are there. Raises Misfit."""
        facts = _facts(state)
        self._codes, self._parts = codes, parts
        self.kind, self.shape = str(facts["quant_type"]), tuple(facts["shape"])
        self.dtype: Dtype | None = NAMED.get(str(facts.get("dtype")))
        self._block, count = int(facts["blocksize"]), int(np.prod(self.shape, dtype=np.int64))
        lacking = [part for part in (".absmax", ".quant_map") if part not in parts]
        if facts.get("nested_blocksize"):
            lacking += [part for part in (".nested_absmax", ".nested_quant_map") if part not in parts]
        if lacking:
            raise Misfit(f"lacks {', '.join(codes.name + part for part in lacking)}")
        self._nested = int(facts.get("nested_blocksize") or 0)
        self._offset = np.float32(facts.get("nested_offset") or 0)
        held, blocks = codes.info.dtype.itemsize * int(np.prod(codes.shape)), int(np.prod(parts[".absmax"].shape))
        if held < -(-count // 2) or blocks != -(-count // self._block):
            raise Misfit(
                f"has {held} bytes of codes and {blocks} scales; its shape {list(self.shape)} in blocks of {self._block} needs "
                f"{-(-count // 2)} and {-(-count // self._block)}"
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


def _facts(state: Stored) -> dict[str, Any]:
    try:
        facts = json.loads(bytes(state.whole().held.reshape(-1)).decode("utf-8"))
        assert {"quant_type", "shape", "blocksize"} <= facts.keys()
    except (ValueError, AssertionError, AttributeError):
        raise Misfit(
            f"has a description '{state.name}' of its 4 bits by bitsandbytes that is no JSON with quant_type, shape and blocksize"
        ) from None
    return dict(facts)
