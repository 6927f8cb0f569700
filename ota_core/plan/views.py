"""Checkpoints, second moments and masks as the output sees them: its names, its rows, float64 weights, bias-corrected curvature."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape, row_blocks
from ota_core.errors import MomentsError, OtaError
from ota_core.files.checkpoint import Checkpoint
from ota_core.files.layouts.relayout import Relayout
from ota_core.files.rows import F64, Dtype, Rows
from ota_core.fused.sources import VSource, rank1_source, source_of
from ota_core.moments import Moments
from ota_core.moments.compression import RankOneMoments
from ota_core.plan.guard import Guard, not_finite, unfit_input
from ota_core.plan.masks import MaskFile
from ota_core.plan.vocabulary.filled import Filled
from ota_core.plan.vocabulary.match import is_vocabulary_tensor

if TYPE_CHECKING:
    import torch

ReadRows = Callable[[str, int, int], NDArray[Any]]


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the output."""

    name: str
    canonical: str
    """The tensor it is tied to, or itself: curvature, masks and random numbers go by this name."""
    shape: tuple[int, ...]
    dtype: Dtype
    copy: bool
    """Copied, never merged: not a floating-point tensor, or one that stands in one model alone."""
    alone: bool = False
    """Held by the model whose configuration the output takes, and maybe by no other: its own is copied."""

    @property
    def rows(self) -> int:
        return matrix_shape(self.shape)[0]

    @property
    def elements(self) -> int:
        rows, cols = matrix_shape(self.shape)
        return rows * cols


Block = tuple[TensorJob, int, int]
"""A tensor of the output and a half-open range of its rows."""


def block_elements(block: Block) -> int:
    """Elements of a block."""
    job, start, stop = block
    return (stop - start) * matrix_shape(job.shape)[1]


def parts(block: Block, elements: int) -> Iterator[Block]:
    """The block in parts of at most this many elements (one row where a row is longer)."""
    job, start, stop = block
    for a, b in row_blocks((stop - start, matrix_shape(job.shape)[1]), elements):
        yield job, start + a, start + b


HINTS = 16
"""Runs of rows of one block that are read ahead."""


def row_runs(wanted: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Neighbouring rows that follow each other in the model, too: (place, the model's row or −1 where it lacks them, how many)."""
    before, after = wanted[:-1], wanted[1:]
    joined = np.where(before >= 0, after == before + 1, after < 0)
    starts = np.concatenate([[0], np.flatnonzero(~joined) + 1])[: len(wanted)]
    counts = np.diff(np.append(starts, len(wanted)))
    return list(zip(starts.tolist(), wanted[starts].tolist(), counts.tolist(), strict=True))


@dataclass(kw_only=True)
class ModelView:
    """A model's tensors by the output's names and rows."""

    name: str
    checkpoint: Checkpoint
    tied: Mapping[str, str]
    row_map: NDArray[np.int64] | None
    device: str
    """As torch names it: ``cpu``, ``cuda`` or one of several GPUs."""
    count_read: Callable[[int], None]
    guard: Guard | None = None
    """Notes numbers that are not finite; None where they are allowed."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """Name in the output → the model's own, where they differ: of layers that stand elsewhere in the output."""
    filled: Filled | None = None
    """Rows of its vocabulary that it takes from elsewhere, where the recipe says so."""

    def own_name(self, name: str) -> str:
        """What the model calls a tensor of the output."""
        return self.renames.get(name, name)

    def stored_name(self, name: str) -> str:
        """The name under which the checkpoint holds a tensor, or the one it is tied to."""
        name = self.own_name(name)
        return name if name in self.checkpoint else self.tied.get(name, name)

    @property
    def as_it_stands(self) -> bool:
        """Whether the rows of its vocabulary are the output's, every one."""
        return self.row_map is None and self.filled is None

    def gather(self, read: ReadRows, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows of the output from a reader of the model's own rows; rows that the model lacks are zeros."""
        if self.row_map is None or not is_vocabulary_tensor(name):
            return read(name, start, stop)
        runs = row_runs(self.row_map[start:stop])
        if len(runs) == 1 and runs[0][1] >= 0:
            return read(name, runs[0][1], runs[0][1] + runs[0][2])
        found: NDArray[Any] | None = None
        for place, row, count in runs:
            if row >= 0:
                rows = read(name, row, row + count)
                found = np.zeros((stop - start, *rows.shape[1:]), rows.dtype) if found is None else found
                found[place : place + count] = rows
        if found is None:
            rows = read(name, 0, 0)
            found = np.zeros((stop - start, *rows.shape[1:]), rows.dtype)
        return found

    def has_rows(self, name: str, start: int, stop: int) -> NDArray[np.bool_] | None:
        """Which rows the model has, bool (stop − start,), or None when it has all."""
        if self.row_map is None or not is_vocabulary_tensor(name):
            return None
        has = self.row_map[start:stop] >= 0
        if self.filled is not None:
            has[[row - start for row in self.filled.within(start, stop)]] = True
        return None if has.all() else has

    def present(self, name: str, start: int, stop: int) -> "torch.Tensor | None":
        """The same as bool (stop − start, 1), on the device."""
        has = self.has_rows(name, start, stop)
        return None if has is None else tensor_on(self.device, has[:, None])

    def theta(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Rows start:stop of the weights, float64 (stop − start, C), on the device."""
        rows = self.rows(name, start, stop)
        if self.guard is not None and self.device == "cpu" and not_finite(rows):
            raise self._unfit(name)
        values = tensor_on(self.device, rows).double()
        if self.guard is not None and self.device != "cpu":
            self.guard.on_device(values, partial(self._unfit, name))
        return values

    def prefetch(self, job: TensorJob, start: int, stop: int) -> None:
        """A hint that these rows are asked for soon."""
        self.hint(lambda *rows: self.checkpoint.prefetch(self.stored_name(job.name), *rows), job.name, start, stop)

    def hint(self, prefetch: Callable[[int, int], None], name: str, start: int, stop: int) -> None:
        """Hand these rows of the output on, as the model's own rows: neighbours together, the first few where they are many."""
        if self.row_map is None or not is_vocabulary_tensor(name):
            prefetch(start, stop)
            return
        for _, row, count in row_runs(self.row_map[start:stop])[:HINTS]:
            if row >= 0:
                prefetch(row, row + count)

    def stored(self, name: str, start: int, stop: int) -> Rows:
        """The same rows as they are stored, with what says which the model has. A compiled pass that loads them notes numbers that are not finite in the guard's cell."""
        rows = self.rows(name, start, stop)
        if self.guard is None or not rows.dtype.is_floating_point:
            return rows
        return replace(rows, watch=self.guard.cell(partial(self._unfit, name)))

    def check_finite(self, name: str, start: int, stop: int) -> None:
        """Raise CheckpointError where these rows, read again, are not finite. A model that lacks the tensor holds no such number."""
        if self.stored_name(name) in self.checkpoint and not_finite(self.rows(name, start, stop)):
            raise self._unfit(name)

    def _unfit(self, name: str) -> OtaError:
        return unfit_input(self.name, self.checkpoint, self.stored_name(name))

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """Rows of the output as they are stored, or as they are filled in."""
        stored = self.stored_name(name)
        held = self.gather(lambda *rows: self.checkpoint.read_rows(*rows).held, stored, start, stop)
        self.count_read(held.nbytes)
        found = Rows(self.checkpoint.info(stored).dtype, held, present=self.has_rows(stored, start, stop))
        if self.filled is None or not is_vocabulary_tensor(name):
            return found
        return self.filled.into(self, name, start, stop, found)

    def own_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """The model's own rows, by its own numbers: float32 or float64 (stop − start, C)."""
        rows = self.checkpoint.read_rows(self.stored_name(name), start, stop)
        if self.guard is not None and not_finite(rows):
            raise self._unfit(name)
        return rows.held if rows.dtype == F64 else rows.to_float32()


@dataclass(kw_only=True)
class ExpertView(ModelView):
    """An expert: a model with second moments and masks."""

    index: int
    moments: Moments | None = None
    full_moments: Moments | None = None
    masks: MaskFile | None = None
    bias_correction: bool = False
    own_tensors: frozenset[str] = frozenset()
    """What second moments of its checkpoint may be called."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Its own names to the output's, where these differ; ``checkpoint`` and second moments go by the output's."""
    relaid: Relayout | None = None
    """How tensors of the output's layout are made of its own, where it has another; ``checkpoint`` and second moments go by the output's."""
    inactive: set[str] = field(default_factory=set)
    """Tensors (canonical names) without curvature that the expert never moved: it takes no part there."""

    def has_curvature(self, canonical: str) -> bool:
        """Whether v is known for this tensor."""
        return self.moments is not None and self.own_name(canonical) in self.moments.shapes()

    def v_hat(self, canonical: str, start: int, stop: int, *, full: bool = False) -> "torch.Tensor":
        """Rows start:stop of v̂, float32 (stop − start, C), on the device. ``full``: from the uncompressed moments."""
        moments = self._moments(full)
        canonical = self.own_name(canonical)
        factors = moments.factors(canonical) if isinstance(moments, RankOneMoments) else None
        if self.device != "cpu" and factors is not None and factors[1].ndim == 1 and self.row_map is None:
            # Two vectors go to the GPU, not their product.
            share, columns = (tensor_on(self.device, part) for part in (factors[0][start:stop], factors[1]))
            v = share[:, None] * columns
        else:
            rows = self.gather(moments.read, canonical, start, stop)
            self.count_read(rows.nbytes)
            v = tensor_on(self.device, rows)
        return v * bias_factor(moments, canonical) if self.bias_correction else v

    def v_source(self, job: TensorJob, start: int, stop: int, *, full: bool = False) -> VSource:
        """Rows start:stop of v for a compiled pass, on the CPU, unchecked: the pass tells of a bad entry, ``refuse`` names it."""
        moments, name = self._moments(full), self.own_name(job.canonical)
        factor = bias_factor(moments, name) if self.bias_correction else 1.0
        if isinstance(moments, RankOneMoments) and (factors := moments.factors(name)) is not None:
            if self.row_map is None or not is_vocabulary_tensor(name):
                return VSource(rank1_source(*factors, start), factor, factors)
            share = self.gather(lambda _, *rows: factors[0][slice(*rows)], name, start, stop)
            return VSource(rank1_source(share, factors[1], 0), factor, (share, factors[1]))
        v = self.gather(lambda *rows: moments.read(*rows, check=False), name, start, stop)
        self.count_read(v.nbytes)
        return VSource(source_of(Rows.float32(v)), factor, v)

    def refuse(self, job: TensorJob, start: int, stop: int) -> NoReturn:
        """Raise the MomentsError that names the bad entry of v, merged or full, in these rows."""
        for moments in (self.moments, self.full_moments):
            if moments is not None:
                self.gather(moments.read, self.own_name(job.canonical), start, stop)
        raise AssertionError(f"{job.canonical}: a compiled pass found a bad second moment, the check of its file did not")

    def prefetch_curvature(self, job: TensorJob, start: int, stop: int, *, full: bool = False) -> None:
        """A hint that these rows of v are asked for soon."""
        if self.has_curvature(job.canonical):
            self.hint(lambda *rows: self._moments(full).prefetch(self.own_name(job.canonical), *rows), job.canonical, start, stop)

    def _moments(self, full: bool) -> Moments:
        moments = self.full_moments if full else self.moments
        assert moments is not None
        return moments


def bias_factor(moments: Moments, name: str) -> float:
    """1 / (1 − β₂^t) (Kingma & Ba 2015, arXiv 1412.6980, section 3), or 1 where v is unbiased: a plain mean, such as an estimate. Raises
    MomentsError when β₂ or t is not known."""
    if moments.unbiased or moments.estimated is not None:
        return 1.0
    step = moments.step(name)
    if moments.beta2 is None or not step:
        raise MomentsError(
            f"{moments.path}: bias_correction needs β₂ and the step, known are beta2={moments.beta2}, step={step} for '{name}'. "
            "Add them to expert.json or to the file's metadata, or set bias_correction: false"
        )
    return float(np.float32(1.0 / (1.0 - moments.beta2**step)))


def tensor_on(device: str, rows: Rows | NDArray[Any]) -> "torch.Tensor":
    """Rows as a tensor, on the device: the same memory where that is the CPU. torch is loaded here, for what is not compiled."""
    import torch

    tensor = rows.tensor() if isinstance(rows, Rows) else torch.from_numpy(rows)
    if device == "cpu":
        return tensor
    from ota_core.compute.gpu import to_device

    return to_device(tensor, device)
