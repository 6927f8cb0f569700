"""Adafactor's state: v was never more than the means of its rows and columns, which are rank-1 second moments as they are.

Shazeer & Stern 2018, arXiv 1804.04235, algorithm 4. The means are turned into sums, which is what ``RankOneMoments`` holds: r = C · row,
c = R · col. Nothing of the size of the parameters is formed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape
from ota_core.errors import MomentsError
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import SavedTensor
from ota_core.moments.check import checked
from ota_core.moments.compression.header import Header
from ota_core.moments.compression.rank1 import RankOneMoments
from ota_core.moments.safetensors_file import as_beta2
from ota_core.moments.trainer.facts import beta2_of, decay_of, is_unbiased
from ota_core.moments.trainer.kinds import Factors
from ota_core.moments.trainer.moments import step_of
from ota_core.moments.trainer.stored import Stored

F32 = NDArray[np.float32]


def adafactor_moments(
    path: Path,
    file: TorchFile,
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
    parts: Mapping[Any, tuple[str, Stored | Factors]],
) -> RankOneMoments:
    """Rank-1 second moments from an Adafactor state, in memory; the file is closed.

    parts: key in the state to parameter name and where its v lies, vectors in full. Raises MomentsError for what is negative, not finite or too large.
    """
    group_of = {key: group for group in groups for key in group["params"]}
    steps = {
        name: step
        for key, (name, _) in parts.items()
        if (step := step_of(path, file, name, state[key], group_of[key])) is not None
    }
    stored: dict[str, F32] = {}
    for name, one in parts.values():
        stored |= _sums(path, file, name, one)
    header = Header(
        method="rank1",
        shapes={name: one.shape for name, one in parts.values()},
        steps=steps,
        beta2=_beta2(path, groups, steps),
        unbiased=is_unbiased(path, groups),
    )
    file.close()
    moments = RankOneMoments(path, header, stored)
    moments.as_trained = True
    return moments


def _sums(path: Path, file: TorchFile, name: str, one: Stored | Factors) -> dict[str, F32]:
    """What ``RankOneMoments`` holds of one parameter, under the keys of ``RankOneMoments.keys``."""
    shape = one.shape
    keys = RankOneMoments.keys(name, shape)
    if not isinstance(one, Factors):
        if len(keys) != 1:
            raise MomentsError(
                f"{path}: {name!r} of the shape {list(shape)} has a full second moment while others have row and column means; Adafactor "
                "keeps vectors in full and nothing else: is this the state of one optimizer?"
            )
        whole = one.read(file, 0, shape[0] if shape else 1)
        return {name: checked(whole, path=path, name=name, shape=shape, start=0).reshape(shape).copy()}
    found = {}
    for (key, form), mean, count in zip(keys.items(), (one.row, one.col), (shape[-1], shape[-2]), strict=True):
        with np.errstate(over="ignore"):
            sums = (_whole(file, mean).astype(np.float64) * count).astype(np.float32).reshape(form)
        checked(sums.reshape(-1, 1), path=path, name=key, shape=(sums.size,), start=0)
        found[key] = sums
    return found


def _whole(file: TorchFile, tensor: SavedTensor) -> F32:
    rows, _ = matrix_shape(tensor.shape)
    return file.read_rows(tensor, 0, rows).to_float32()


def _beta2(path: Path, groups: Sequence[Mapping[str, Any]], steps: Mapping[str, int]) -> float | None:
    """β₂ of the last step taken, 1 − t^d; one that is constant (CAME) where the groups give it."""
    decay = decay_of(path, groups)
    if decay is None:
        return beta2_of(path, groups)
    return as_beta2(1 - max(steps.values()) ** decay, f"{path}: β₂ from the decay {decay}") if steps else None
