"""Codes of 8 or 4 bits with a scale for the whole tensor, each row, or each block: FP8 of DeepSeek, compressed-tensors, modelopt, FBGEMM, MXFP8;
8-bit integers of compressed-tensors and bitsandbytes; packed FP4 (MXFP4, NVFP4)."""

from math import prod

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.files.quantised.codes import E2M1, TABLES, scale_codes, to_float32
from ota_core.files.quantised.stored import Coded, Stored

NONE = np.empty((0, 0), np.float32)


class Misfit(ValueError):
    """Scales that do not fit their codes; the message goes on from the tensor's name."""


class Grid:
    """Which scale belongs to which row and column of a weight (…, R, C)."""

    def __init__(self, scales: Stored, shape: tuple[int, ...], block: tuple[int, int] | None = None) -> None:
        """``block``: rows and columns that share a scale, where the configuration says so. Raises Misfit."""
        if len(shape) < 2 or 0 in shape:
            raise Misfit(f"has the shape {list(shape)}, expected a matrix or a stack of matrices")
        self.stored = scales
        (self._height, self._columns), leads = shape[-2:], int(np.prod(shape[:-2], dtype=np.int64))
        seen = scales.shape
        if int(np.prod(seen, dtype=np.int64)) == 1:
            grid, self._stacked = (1, 1), False
        elif len(shape) == 2 and len(seen) == 1 and seen[0] == self._height:
            grid, self._stacked = (seen[0], 1), False
        elif len(shape) > 2 and seen == shape[:-2]:
            grid, self._stacked = (1, 1), True
        elif len(seen) == len(shape) and (seen[:-2] == shape[:-2] or set(seen[:-2]) == {1}):
            grid, self._stacked = (seen[-2], seen[-1]), seen[:-2] == shape[:-2] and leads > 1
        else:
            raise Misfit(f"has the shape {list(shape)}, its scales '{scales.name}' have {list(seen)}")
        self._tall = grid[0]
        self._block = self._sizes(grid, block, shape)

    def _sizes(self, grid: tuple[int, int], block: tuple[int, int] | None, shape: tuple[int, ...]) -> tuple[int, int]:
        axes = []
        for axis, (count, size) in enumerate(zip(grid, (self._height, self._columns), strict=True)):
            stated = block[axis] if block else 0
            if stated and -(-size // stated) == count:
                axes.append(stated)
            elif count and size % count == 0:
                axes.append(size // count)
            else:
                raise Misfit(
                    f"has the shape {list(shape)}, its scales '{self.stored.name}' have {list(self.stored.shape)}: {size} do not fall into "
                    f"{count} equal blocks" + (f", nor into blocks of {stated}" if stated else "")
                )
        return axes[0], axes[1]

    def fits(self, other: "Grid") -> bool:
        """Whether both give the same rows and columns the same place."""
        return (self._tall, self._block, self._stacked) == (other._tall, other._block, other._stacked)

    @property
    def width(self) -> int:
        """Columns that share a scale."""
        return self._block[1]

    def rows(self, start: int, stop: int) -> NDArray[np.int64]:
        """For each row of the weight's matrix, the row of its scales."""
        row = np.arange(start, stop)
        inside = (row % self._height) // self._block[0]
        return inside + (row // self._height) * self._tall if self._stacked else inside

    def values(self, first: int, last: int) -> NDArray[np.float32]:
        """Rows first … last of the scales, float32 (n, c)."""
        return to_float32(self.stored.rows(first, last + 1))


class Scaled(Coded):
    """(code − zero) · scale, and times a factor where there is one."""

    def __init__(
        self, kind: str, codes: Stored, grid: Grid, *, zeros: Grid | None = None, packed: bool = False, factor: Stored | None = None,
        inverse: bool = False, post: float = 1.0,
    ) -> None:  # fmt: skip
        """``packed``: two codes of FP4 in a byte, the low half first. ``factor``: of the scales, one number or one for each matrix; divided by where
        ``inverse``. ``post``: what the product is multiplied with at last."""
        self.kind, self._codes, self._grid, self._zeros, self._packed = kind, codes, grid, zeros, packed
        self._factor, self._inverse, self._post = factor, inverse, np.float32(post)
        self.shape = unpacked(codes.shape) if packed else codes.shape
        if zeros is not None and not zeros.fits(grid):
            raise Misfit(
                f"has scales '{grid.stored.name}' of the shape {list(grid.stored.shape)} and zero points '{zeros.stored.name}' of {list(zeros.stored.shape)}"
            )
        if factor is not None and prod(factor.shape) not in {1, prod(self.shape[:-2])}:
            raise Misfit(f"has the shape {list(self.shape)}, the factor of its scales '{factor.name}' has {list(factor.shape)}")
        self._table = E2M1 if packed else TABLES[codes.code]

    def values(self, start: int, stop: int) -> NDArray[np.float32]:
        rows = self._grid.rows(start, stop)
        if stop == start:
            return np.empty((0, matrix_shape(self.shape)[1]), np.float32)
        first, last = int(rows.min()), int(rows.max())
        scales = np.ascontiguousarray(self._grid.values(first, last))
        zeros = np.ascontiguousarray(self._zeros.values(first, last)) if self._zeros else NONE
        if self._factor is not None:
            scales = self._times(scales, start, stop, rows - first)
        codes = self._codes.bytes(start, stop)
        if self._packed:
            codes = unpack(codes)
        out = np.empty(codes.shape, np.float32)
        scale_codes(codes, self._table, scales, zeros, rows - first, self._grid.width, out)
        return out if self._post == 1 else out * self._post

    def _times(self, scales: NDArray[np.float32], start: int, stop: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The scales with the factor of their matrix."""
        assert self._factor is not None
        factors = to_float32(self._factor.whole()).reshape(-1)
        of_row = np.zeros(scales.shape[0], np.int64)
        if factors.size > 1:
            of_row[rows] = np.arange(start, stop) // self.shape[-2]
        factor = factors[of_row][:, None]
        return scales / factor if self._inverse else scales * factor

    def prefetch(self, start: int, stop: int) -> None:
        self._codes.file.prefetch(self._codes.name, start, stop)


def unpacked(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what is packed two to a byte in the last axis. Raises Misfit."""
    if not shape:
        raise Misfit("is one number, expected a matrix")
    return (*shape[:-1], 2 * shape[-1])


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, C / 2) bytes as (n, C) codes of 4 bits, the low half first."""
    codes = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    return codes
