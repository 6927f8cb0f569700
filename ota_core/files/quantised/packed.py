"""Integers of fewer than 8 bits, packed into words of 32: compressed-tensors' ``pack-quantized`` (W4A16 and its like).

``W_packed`` int32 (…, R, ⌈C · bits / 32⌉) holds code + 2^(bits − 1), the lowest bits first; ``W_shape`` the shape (…, R, C); ``W_scale`` (R, G), (R, 1)
or (1); ``W_zero_point``, where zero is not code 0, is packed likewise but down the columns: int32 (…, ⌈R · bits / 32⌉, G). ``W_g_idx`` (C,) says which
group a column is of, where they are not in order. W = (code − zero) · scale (``compressors/pack_quantized`` of that package).
"""

from math import prod

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.files.quantised.codes import scale_codes
from ota_core.files.quantised.scaled import NONE, Grid, Misfit
from ota_core.files.quantised.stored import Coded, Stored

BITS = (1, 2, 4, 8)
"""Widths whose codes never lie across two words: of others, versions of the package pack in different ways."""
_WHOLE = {"I32", "I64"}


class Packed(Coded):
    """One weight, or a stack of them."""

    def __init__(
        self, codes: Stored, shape: Stored | None, scales: Stored, zeros: Stored | None, order: Stored | None, *, bits: tuple[int, ...], group: int | None
    ) -> None:  # fmt: skip
        """``bits``: those that the configuration speaks of; ``group``: columns that share a scale, by the configuration. Raises Misfit."""
        if len(codes.shape) < 2 or 0 in codes.shape:
            raise Misfit(f"has the shape {list(codes.shape)}, expected a matrix or a stack of matrices")
        words = codes.shape[-1]
        self.shape = _size(codes, shape, bits)
        fitting = [one for one in bits if -(-self.shape[-1] * one // 32) == words]
        if len(fitting) != 1 or fitting[0] not in BITS:
            raise Misfit(
                f"packs rows of {self.shape[-1]} codes into {words} words of 32 bits; codes of {', '.join(str(one) for one in BITS)} bits are read, and "
                f"the configuration says {' or '.join(str(one) for one in bits)}: write it as plain weights with compressed-tensors' "
                "CompressedTensorsDequantizer"
            )
        self._bits = fitting[0]
        self.kind = f"int{self._bits}"
        self._codes, self._zeros, self._order = codes, zeros, order
        self._grid = Grid(scales, self.shape, (1, group) if group and scales.shape[-1:] > (1,) else None)
        self._groups = scales.shape[-1] if len(scales.shape) > 1 else 1
        if order is not None and (order.shape != self.shape[-1:] or order.code not in _WHOLE or not self._places(order)):
            raise Misfit(
                f"has rows of {self.shape[-1]} codes in {self._groups} groups, '{order.name}' of the shape {list(order.shape)} does not say a group of each"
            )
        if (
            zeros is not None
            and zeros.code == "I32"
            and zeros.shape != (*self.shape[:-2], -(-self.shape[-2] * self._bits // 32), self._groups)
        ):
            raise Misfit(f"has the shape {list(self.shape)}, its packed zero points '{zeros.name}' have {list(zeros.shape)}")
        self._table = (np.arange(2**self._bits) - 2 ** (self._bits - 1)).astype(np.float32)
        self._plain_zeros = (
            Grid(zeros, self.shape, (1, group) if group else None) if zeros is not None and zeros.code != "I32" else None
        )
        if self._plain_zeros is not None and zeros is not None and not self._plain_zeros.fits(self._grid):
            raise Misfit(f"has scales of the shape {list(scales.shape)} and zero points '{zeros.name}' of {list(zeros.shape)}")

    def _places(self, order: Stored) -> bool:
        held = order.whole().held
        return int(held.min()) >= -1 and int(held.max()) < max(self._groups, 1)

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        columns = matrix_shape(self.shape)[1]
        out = np.empty((stop - start, columns), np.float32)
        if stop == start:
            return out
        codes = _unpacked(self._codes.bytes(start, stop), self._bits)[:, :columns]
        rows, width = self._grid.rows(start, stop), self._grid.width
        first, last = int(rows.min()), int(rows.max())
        scales = np.ascontiguousarray(self._grid.values(first, last))
        zeros = self._zero_points(start, stop)
        if zeros.size:  # one row of zeros for each row, as the scales are then
            scales, rows, first = np.ascontiguousarray(scales[rows - first]), np.arange(stop - start), 0
        if self._order is not None and scales.shape[1] > 1:
            group = self._order.whole().held.reshape(-1).astype(np.int64)
            if (group >= 0).all():  # −1 throughout: in order
                scales, width = np.ascontiguousarray(scales[:, group]), 1
                zeros = np.ascontiguousarray(zeros[:, group]) if zeros.size else zeros
        scale_codes(np.ascontiguousarray(codes), self._table, scales, zeros, rows - first, width, out)
        return out

    def _zero_points(self, start: int, stop: int) -> NDArray[np.float32]:
        """Of each row and group, (stop − start, G); of size 0 where zero is code 0."""
        if self._plain_zeros is not None:
            rows = self._plain_zeros.rows(start, stop)
            return np.ascontiguousarray(self._plain_zeros.values(int(rows.min()), int(rows.max()))[rows - int(rows.min())])
        if self._zeros is None:
            return NONE
        height, tall = self.shape[-2], self._zeros.shape[-2]
        stack, row = np.divmod(np.arange(start, stop), height)
        word, place = np.divmod(row, 32 // self._bits)
        at = stack * tall + word
        held = self._zeros.rows(int(at.min()), int(at.max()) + 1).held.view(np.uint32)[at - at.min()]
        codes = (held >> (place * self._bits).astype(np.uint32)[:, None]) & np.uint32(2**self._bits - 1)
        found: NDArray[np.float32] = self._table[codes]
        return found

    def prefetch(self, start: int, stop: int) -> None:
        self._codes.file.prefetch(self._codes.name, start, stop)


def _size(codes: Stored, shape: Stored | None, bits: tuple[int, ...]) -> tuple[int, ...]:
    """The weight's shape, as it is stored beside its codes."""
    if shape is None:
        if bits[0] not in BITS:
            raise Misfit(f"packs codes of {bits[0]} bits, by the configuration; {', '.join(map(str, BITS))} are read")
        return (*codes.shape[:-1], codes.shape[-1] * 32 // bits[0])
    if shape.code not in _WHOLE or prod(shape.shape) != len(codes.shape):
        raise Misfit(
            f"has the shape {list(codes.shape)}, '{shape.name}' does not say its weight's, one whole number for each axis"
        )
    found = tuple(int(size) for size in shape.whole().held.reshape(-1))
    if len(found) != len(codes.shape) or found[:-1] != codes.shape[:-1] or prod(found) < 1:
        raise Misfit(f"has the shape {list(codes.shape)}, '{shape.name}' says that its weight has {list(found)}")
    return found


def _unpacked(held: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """(n, bytes) as codes, the lowest bits of a byte first: (n, bytes · 8 / bits)."""
    if bits == 8:
        return held
    out = np.empty((*held.shape, 8 // bits), np.uint8)
    for i in range(8 // bits):
        out[..., i] = (held >> np.uint8(i * bits)) & np.uint8(2**bits - 1)
    return out.reshape(held.shape[0], -1)
