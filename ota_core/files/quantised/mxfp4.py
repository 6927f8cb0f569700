"""MXFP4 of gpt-oss: ``…_blocks`` uint8 (E, O, G, 16), two codes a byte, the low half first, and ``…_scales`` uint8 (E, O, G), exponents of two.

The model's weight is (E, 32 · G, O): transformers turns every expert's matrix round as it dequantises it (``integrations/mxfp4.py``).
"""

import numpy as np
from numpy.typing import NDArray

from ota_core.files.quantised.codes import E2M1, TABLES
from ota_core.files.quantised.scaled import Misfit, unpack
from ota_core.files.quantised.stored import Coded, Stored


class Mxfp4(Coded):
    """A stack of matrices, one for each expert."""

    kind = "mxfp4"

    def __init__(self, blocks: Stored, scales: Stored) -> None:
        """Raises Misfit."""
        if (
            len(blocks.shape) != 4
            or 0 in blocks.shape
            or blocks.shape[:-1] != scales.shape
            or scales.code not in {"U8", "F8_E8M0"}
        ):
            raise Misfit(
                f"has blocks of the shape {list(blocks.shape)} and scales of {list(scales.shape)} in {scales.code}, expected U8"
            )
        self._blocks, self._scales = blocks, scales
        self._experts, self._out, self._groups, half = blocks.shape
        self._group = 2 * half
        self.shape = (self._experts, self._groups * self._group, self._out)

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        height, parts = self.shape[1], [np.empty((0, self._out), np.float32)]
        while start < stop:
            expert, first = divmod(start, height)
            last = min(height, first + stop - start)
            parts.append(self._columns(expert, first, last))
            start += last - first
        return np.concatenate(parts)

    def _columns(self, expert: int, first: int, last: int) -> NDArray[np.float32]:
        """Columns of a stored matrix as rows: float32 (last − first, O)."""
        low, high = first // self._group, -(-last // self._group)
        per = self._out * self._groups
        stored = self._blocks.bytes(expert * per, (expert + 1) * per).reshape(self._out, self._groups, -1)[:, low:high]
        codes = unpack(np.ascontiguousarray(stored).reshape(self._out * (high - low), -1))
        scales = self._scales.bytes(expert * self._out, (expert + 1) * self._out)[:, low:high]
        values = E2M1[codes].reshape(self._out, high - low, -1) * TABLES["F8_E8M0"][scales][:, :, None]
        return np.ascontiguousarray(values.reshape(self._out, -1).T[first - low * self._group : last - low * self._group])

    def prefetch(self, start: int, stop: int) -> None:
        per = self._out * self._groups
        for expert in range(start // self.shape[1], -(-stop // self.shape[1])):
            self._blocks.file.prefetch(self._blocks.name, expert * per, (expert + 1) * per)
