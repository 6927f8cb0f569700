"""How the passes of a compression are cut. The cut is part of the algorithm: it depends on a tensor's shape alone, never on memory or threads."""

import math
from collections.abc import Callable, Sequence
from threading import Lock
from typing import NoReturn

from ota_core.compute.blocks import row_blocks
from ota_core.moments.base import Moments

# Elements of a chunk: 16 MiB of float32, long against the cost of starting a job, short against the memory budget.
CHUNK = 1 << 22
# Elements that share a range in the code of log8.
BLOCK = 256


def matrices(shape: Sequence[int]) -> tuple[int, int, int]:
    """(S, R, C) of a tensor with at least two axes: S matrices of R rows and C columns, one for each leading index."""
    return math.prod(shape[:-2]), shape[-2], shape[-1]


class InOrder:
    """Adds parts to a sum in the order of their indices, whatever the order in which threads bring them."""

    def __init__(self, add: Callable[..., None]) -> None:
        self._add, self._next, self._lock = add, 0, Lock()
        self._waiting: dict[int, tuple[object, ...]] = {}

    def put(self, index: int, *part: object) -> None:
        """Bring part ``index``; it is added now, or as soon as all parts before it have been."""
        with self._lock:
            self._waiting[index] = part
            while self._next in self._waiting:
                self._add(*self._waiting.pop(self._next))
                self._next += 1


def refuse(moments: Moments, name: str, start: int, stop: int) -> NoReturn:
    """Raise MomentsError that names the bad entry which a compiled loop met in these rows."""
    shape = moments.shapes()[name]
    width = shape[-1] if len(shape) > 1 else 1
    for a, b in row_blocks((stop - start, width), 1 << 16):
        moments.read(name, start + a, start + b)
    raise AssertionError(f"{moments.path}: '{name}' changed while it was read")
