"""Values from the codes of 8-bit and 4-bit optimizers, as compiled loops: one product for each element, as the optimizers form it."""

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]


@compiled
def decode(codes: U8, table: F32, scale: F32, block: int, skip: int, out: F32) -> None:
    """out[i] = table[codes[i]] · scale of its block. codes, out: (n,); the first lies ``skip`` elements behind the start of the first block.

    table: (256,); scale: one for each block that is touched.
    """
    start = 0
    for b in range(scale.shape[0]):
        stop = min((b + 1) * block - skip, codes.shape[0])
        for i in range(start, stop):
            out[i] = table[codes[i]] * scale[b]
        start = stop


@compiled
def decode_halves(codes: U8, odd: int, table: F32, scale: F32, block: int, skip: int, out: F32) -> None:
    """The same from two codes a byte, the first in the high half. odd: 1 where the first element is the low half of the first byte.

    table: (16,).
    """
    start = 0
    for b in range(scale.shape[0]):
        stop = min((b + 1) * block - skip, out.shape[0])
        for i in range(start, stop):
            byte = codes[(i + odd) >> 1]
            code = np.uint8(byte & 15) if (i + odd) & 1 else np.uint8(byte >> 4)
            out[i] = table[code] * scale[b]
        start = stop
