"""Rank-1 second moments of a model's parameters as those of its checkpoint's tensors, where that is exact.

A part of ṽ_ij = (r_i / s) · c_j that is made of some rows and some columns, turned or not, is of rank 1 itself: with I its rows and J its
columns, r'_i = (r_i / s) · Σ_J c_j and c'_j = c_j · Σ_I r_i / s. Several matrices put together are not.
"""

from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from ota_core.errors import MomentsError
from ota_core.moments.base import Stored, View
from ota_core.moments.compression.header import Header
from ota_core.moments.compression.rank1 import RankOneMoments

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


def split(moments: RankOneMoments, stored: Mapping[str, Stored]) -> RankOneMoments:
    """The same second moments by the names of ``stored``. Raises MomentsError for a tensor that has none of rank 1."""
    shapes = {name: one.shape for name, one in stored.items()}
    tensors: dict[str, F32] = {}
    steps: dict[str, int] = {}
    for name, one in stored.items():
        tensors |= _parts(moments, name, one)
        parts = [view.parameter for view in one.views]
        step = moments.one_step(
            parts, f"the parameters that make {name!r}", "save the second moments by name as exp_avg_sq.safetensors"
        )
        if step is not None:
            steps[name] = step
    made = RankOneMoments(
        moments.path,
        Header(method="rank1", shapes=shapes, steps=steps, beta2=moments.beta2, estimated=None, unbiased=moments.unbiased),
        tensors,
    )
    made.as_trained = moments.as_trained
    return made


def _parts(moments: RankOneMoments, name: str, one: Stored) -> dict[str, F32]:
    """What ``RankOneMoments`` holds of one tensor, under its ``keys``."""
    keys = list(RankOneMoments.keys(name, one.shape))
    factored = [moments.factors(view.parameter) for view in one.views]
    if len(keys) == 1 and all(factors is None for factors in factored):  # vectors are whole
        whole = [_elements(moments, view) for view in one.views]
        return {name: np.concatenate(whole).reshape(one.shape)}
    factors, view = factored[0], _laid_out(one)
    if len(keys) == 1 or factors is None or view is None:
        raise MomentsError(
            f"{moments.path}: {name!r} of the checkpoint is put together from {len(one.views)} parts of "
            f"{', '.join(sorted({view.parameter for view in one.views}))}; Adafactor keeps the means of rows and columns of each parameter, "
            "which are none of what is put together. Train with an optimizer that keeps a full v, or measure it (ota estimate)"
        )
    share, cols = factors
    height, width = share.shape[-1], cols.shape[-1]
    share, cols = share.reshape(-1, height), cols.reshape(-1, width)
    rows_out: list[F32] = []
    cols_out: list[F32] = []
    for index in np.ndindex(one.shape[:-2]):
        first = view.offset + int(np.dot(index, view.strides[:-2]))
        matrix, rest = divmod(first, height * width)
        down, right, turned = _axes(moments, name, view, rest, height, width)
        r, c = share[matrix][down].astype(np.float64), cols[matrix][right].astype(np.float64)
        own = (r * c.sum()).astype(np.float32), (c * r.sum()).astype(np.float32)
        rows_out.append(own[turned])
        cols_out.append(own[1 - turned])
    shapes = list(RankOneMoments.keys(name, one.shape).values())
    return {
        key: np.concatenate(values).reshape(shape) for key, values, shape in zip(keys, (rows_out, cols_out), shapes, strict=True)
    }


def _elements(moments: RankOneMoments, view: View) -> F32:
    whole = moments.read(
        view.parameter, 0, moments.shapes()[view.parameter][0] if moments.shapes()[view.parameter] else 1
    ).reshape(-1)
    seen = np.lib.stride_tricks.as_strided(whole[view.offset :], view.shape, [4 * s for s in view.strides], writeable=False)
    return seen.reshape(-1).astype(np.float32)


def _laid_out(one: Stored) -> View | None:
    """The only view of a tensor, with the tensor's axes; None where there are several, or its axes are others."""
    if len(one.views) != 1:
        return None
    view = one.views[0]
    if view.shape == one.shape:
        return view
    if view.shape == (prod(one.shape),) and view.strides == (1,):
        return View(view.parameter, view.offset, one.shape, tuple(prod(one.shape[i + 1 :]) for i in range(len(one.shape))))
    return None


def _axes(moments: RankOneMoments, name: str, view: View, rest: int, height: int, width: int) -> tuple[I64, I64, int]:
    """Rows and columns of a matrix that the last two axes of a view run over, and whether the first of these runs over columns.

    rest: the matrix's element at which they begin.
    """
    (n, m), (a, b) = view.shape[-2:], view.strides[-2:]
    row, col = divmod(rest, width)
    for turned, (down, down_step), (right, right_step) in ((0, (n, a), (m, b)), (1, (m, b), (n, a))):
        fits = (down_step % width == 0 or down == 1) and col + (right - 1) * right_step < width
        if fits and row + (down - 1) * (down_step // width) < height:
            return (
                row + np.arange(down, dtype=np.int64) * (down_step // width),
                col + np.arange(right, dtype=np.int64) * right_step,
                turned,
            )
    raise MomentsError(
        f"{moments.path}: {name!r} of the checkpoint runs over {view.parameter!r} in neither its rows nor its columns, and Adafactor keeps "
        "the means of these alone. Train with an optimizer that keeps a full v, or measure it (ota estimate)"
    )
