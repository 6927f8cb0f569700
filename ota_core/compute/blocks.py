"""How a tensor is cut into blocks. Every tensor is seen as a matrix of whole rows, so that a block never splits a row.

R rows: the product of all axes but the last. C columns: the last axis. A vector of N elements is N rows of one column.
"""

from collections.abc import Iterator, Sequence
from math import prod


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(R, C) of the matrix that stands for a tensor of this shape. A scalar is (1, 1)."""
    if len(shape) >= 2:
        return prod(shape[:-1]), shape[-1]
    return (shape[0], 1) if len(shape) == 1 else (1, 1)


def row_blocks(shape: Sequence[int], max_elements: int) -> Iterator[tuple[int, int]]:
    """Half-open row ranges that cover the tensor, each of at most ``max_elements`` elements, or one row where a row is longer."""
    rows, cols = matrix_shape(shape)
    step = max(1, max_elements // max(cols, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
