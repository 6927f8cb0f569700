"""Checkpoints, second moments and masks as the output sees them: its names, its rows, float64 weights, bias-corrected curvature."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ota_core.blocks import matrix_shape
from ota_core.checkpoint import Checkpoint
from ota_core.errors import MomentsError
from ota_core.masks import MaskFile
from ota_core.moments import Moments
from ota_core.vocabulary import is_vocabulary_tensor

ReadRows = Callable[[str, int, int], torch.Tensor]


@dataclass(frozen=True)
class TensorJob:
    """One tensor of the output."""

    name: str
    canonical: str
    """The tensor it is tied to, or itself: curvature, masks and random numbers go by this name."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    copy: bool
    """Not a floating-point tensor: copied, never merged."""

    @property
    def rows(self) -> int:
        return matrix_shape(self.shape)[0]

    @property
    def elements(self) -> int:
        rows, cols = matrix_shape(self.shape)
        return rows * cols


@dataclass(kw_only=True)
class ModelView:
    """A model's tensors by the output's names and rows."""

    name: str
    checkpoint: Checkpoint
    tied: Mapping[str, str]
    row_map: torch.Tensor | None
    device: torch.device
    count_read: Callable[[int], None]

    def stored_name(self, name: str) -> str:
        """The name under which the checkpoint holds a tensor, or the one it is tied to."""
        return name if name in self.checkpoint else self.tied.get(name, name)

    def gather(self, read: ReadRows, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of the output from a reader of the model's own rows; rows that the model lacks are zeros."""
        if self.row_map is None or not is_vocabulary_tensor(name):
            return read(name, start, stop)
        wanted = self.row_map[start:stop]
        return torch.cat(
            [read(name, row, row + 1) if row >= 0 else torch.zeros_like(read(name, 0, 1)) for row in wanted.tolist()]
        )

    def present(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Which rows the model has: bool (stop − start, 1), or None when it has all."""
        if self.row_map is None or not is_vocabulary_tensor(name):
            return None
        has = self.row_map[start:stop] >= 0
        return None if bool(has.all()) else has[:, None].to(self.device)

    def theta(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop of the weights, float64 (stop − start, C), on the device."""
        rows = self.stored(name, start, stop)
        return rows.to(self.device).double()

    def single(self, job: TensorJob, start: int, stop: int) -> torch.Tensor:
        """The same rows as flat float32 (n,), on the CPU; exact for every dtype but float64 (``MergePlan.can_fuse``)."""
        return self.stored(job.name, start, stop).float().reshape(-1)

    def stored(self, name: str, start: int, stop: int) -> torch.Tensor:
        """The same rows as they are stored."""
        rows = self.gather(self.checkpoint.read_rows, self.stored_name(name), start, stop)
        self.count_read(rows.nbytes)
        return rows


@dataclass(kw_only=True)
class ExpertView(ModelView):
    """An expert: a model with second moments and masks."""

    index: int
    moments: Moments | None = None
    full_moments: Moments | None = None
    masks: MaskFile | None = None
    bias_correction: bool = False
    inactive: set[str] = field(default_factory=set)
    """Tensors (canonical names) without curvature that the expert never moved: it takes no part there."""

    def has_curvature(self, canonical: str) -> bool:
        """Whether v is known for this tensor."""
        return self.moments is not None and canonical in self.moments.shapes()

    def v_hat(self, canonical: str, start: int, stop: int, *, full: bool = False) -> torch.Tensor:
        """Rows start:stop of v̂, float32 (stop − start, C), on the device. ``full``: from the uncompressed moments."""
        v, factor = self._read_v(canonical, start, stop, full)
        v = v.to(self.device)
        return v * factor if self.bias_correction else v

    def v_raw(self, job: TensorJob, start: int, stop: int, *, full: bool = False) -> tuple[torch.Tensor, float]:
        """Rows start:stop of v, float32 (stop − start, C) on the CPU, and the factor that makes them v̂."""
        return self._read_v(job.canonical, start, stop, full)

    def _read_v(self, canonical: str, start: int, stop: int, full: bool) -> tuple[torch.Tensor, float]:
        moments = self.full_moments if full else self.moments
        assert moments is not None
        v = self.gather(moments.read, canonical, start, stop)
        self.count_read(v.nbytes)
        return v, bias_factor(moments, canonical) if self.bias_correction else 1.0


def bias_factor(moments: Moments, name: str) -> float:
    """1 / (1 − β₂^t) (Kingma & Ba 2015, arXiv 1412.6980, section 3). Raises MomentsError when β₂ or t is not known."""
    step = moments.step(name)
    if moments.beta2 is None or not step:
        raise MomentsError(
            f"{moments.path}: bias_correction needs β₂ and the step, known are beta2={moments.beta2}, step={step} for '{name}'. "
            "Add them to expert.json or to the file's metadata, or set bias_correction: false"
        )
    return torch.tensor(1.0 / (1.0 - moments.beta2**step), dtype=torch.float32).item()
