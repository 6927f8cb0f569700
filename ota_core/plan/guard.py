"""Watches every block that a merge reads and writes for infinite numbers and NaN, in the pass that works on it.

A block that goes through a compiled pass brings a cell, into which ``fused.memory.load`` writes when it meets such a number; one that becomes a
tensor is looked at by its bits, on a GPU by the GPU. ``settle`` says what was met, once the block is done.
"""

from collections.abc import Callable
from threading import local
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape, row_blocks
from ota_core.errors import CheckpointError, OtaError
from ota_core.files.checkpoint import Checkpoint
from ota_core.files.rows import Rows

if TYPE_CHECKING:
    import torch

ALLOW = "To merge such numbers all the same, pass --allow-nonfinite (in a recipe: allow_nonfinite: true)"
_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028e38}
_BLOCK = 1 << 20


class Guard:
    """What the threads of one merge have met and not reported yet."""

    def __init__(self) -> None:
        self._own = local()

    def cell(self, complain: Callable[[], OtaError]) -> NDArray[np.int64]:
        """Where a compiled pass notes that a block holds a number that is not finite: int64 (1,). ``complain``: the error to raise then."""
        found = np.zeros(1, np.int64)
        self._met().append((found, complain))
        return found

    def on_device(self, values: "torch.Tensor", complain: Callable[[], OtaError]) -> None:
        """Look at a tensor on a GPU; what is found is asked for when the block is done, so that nothing waits for it here."""
        self._met().append((values.isfinite().all().logical_not(), complain))

    def settle(self) -> None:
        """Raise the error of the first block of this thread, since the last time, that held a number that is not finite."""
        met, self._own.met = self._met(), []
        for flag, complain in met:
            if bool(flag):
                raise complain()

    def _met(self) -> list[tuple[Any, Callable[[], OtaError]]]:
        if not hasattr(self._own, "met"):
            self._own.met = []
        met: list[tuple[Any, Callable[[], OtaError]]] = self._own.met
        return met


def not_finite(rows: Rows) -> int:
    """How many numbers of these rows are infinite or NaN."""
    from ota_core.fused.finite import count_not_finite  # with it comes numba, which a plan does without

    return count_not_finite(rows)


def unfit_input(model: str, checkpoint: Checkpoint, tensor: str) -> OtaError:
    """The error that names a tensor with numbers that are not finite, and counts them: the tensor alone is read again for it."""
    from ota_core.fused.finite import kinds_not_finite

    shape, counts = checkpoint.info(tensor).shape, {"NaN": 0, "infinite": 0}
    for start, stop in row_blocks(shape, _BLOCK):
        for kind, count in kinds_not_finite(checkpoint.read_rows(tensor, start, stop)).items():
            counts[kind] += count
    rows, columns = matrix_shape(shape)
    return CheckpointError(
        f"{checkpoint.path} ({model}): tensor '{tensor}' holds {_said(counts)} of {rows * columns:,} numbers: training diverged, float16 overflowed, or the "
        f"file is damaged. Take an earlier checkpoint of {model}, or save this one again in bfloat16 or float32. {ALLOW}"
    )


def unfit_output(tensor: str, start: int, rows: Rows) -> OtaError:
    """The error for merged rows, from ``start`` on, that are not finite, though everything they were made of is."""
    from ota_core.fused.finite import kinds_not_finite

    counts = kinds_not_finite(rows)
    name, largest = rows.dtype.name, _LARGEST.get(rows.dtype.name)
    advice = "smaller weights, scaling_factor or lambda keep them finite"
    if name == "float16":
        advice = "write bfloat16 or float32, which reach further (dtype in the recipe)"
    limit = f" ({name} ends at {largest:g})" if largest else ""
    return OtaError(
        f"tensor '{tensor}' of the merged model: {_said(counts)} of {rows.size:,} numbers from row {start} on, though those of all models are finite: "
        f"the merged numbers are too large for {name}{limit}. {advice[0].upper()}{advice[1:]}. {ALLOW}"
    )


def _said(counts: dict[str, int]) -> str:
    return " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
