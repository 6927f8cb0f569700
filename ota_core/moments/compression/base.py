"""What the compressed forms of second moments have in common: how they are described, and what a compression reports."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ota_core.moments.base import Moments

Method = Literal["none", "rank1", "log8", "rank_k"]
METHODS: tuple[Method, ...] = ("none", "rank1", "log8", "rank_k")
IN_MEMORY: tuple[Method, ...] = ("rank1", "rank_k")
"""Methods whose form is small enough to be held in memory; the others are read from files as a merge needs them."""
DEFAULT_RANK = 4


class CompressionReport(BaseModel):
    """What a compression cost and lost. ``sqrt_error`` is ‖√v − √ṽ‖ / ‖√v‖ over the whole expert; bytes are of the data alone."""

    model_config = ConfigDict(frozen=True)

    method: str
    rank: int | None = None
    """Number of factors of ``rank_k``."""
    parameters: int
    bytes_per_param: float
    sqrt_error: float
    sqrt_error_per_tensor: dict[str, float]

    @classmethod
    def of(cls, moments: "CompressedMoments", size: int, errors: Mapping[str, tuple[float, float]]) -> "CompressionReport":
        """size: bytes of the data; errors: tensor → (Σ(√v − √ṽ)², Σv)."""
        parameters = sum(math.prod(shape) for shape in moments.shapes().values())
        return cls(
            method=moments.method,
            rank=moments.rank,
            parameters=parameters,
            bytes_per_param=size / max(parameters, 1),
            sqrt_error=_ratio(math.fsum(lost for lost, _ in errors.values()), math.fsum(total for _, total in errors.values())),
            sqrt_error_per_tensor={name: _ratio(lost, total) for name, (lost, total) in sorted(errors.items())},
        )


def _ratio(lost: float, total: float) -> float:
    return math.sqrt(max(lost, 0.0) / total) if total > 0 else 0.0


class CompressedMoments(ABC):
    """Second moments in one of the forms of this package; offers what ``Moments`` offers."""

    method: Method
    rank: int | None = None

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], beta2: float | None, steps: Mapping[str, int]) -> None:
        self.path, self.beta2 = path, beta2
        self._shapes, self._steps = dict(shapes), dict(steps)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Parameter name to the shape of the parameter."""
        return self._shapes

    def step(self, name: str) -> int | None:
        """Optimizer steps behind v, where known."""
        return self._steps.get(name)

    @abstractmethod
    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> NDArray[np.float32]:
        """Rows start:stop of ṽ, float32 (stop − start, C)."""

    def prefetch(self, name: str, start: int, stop: int) -> None:  # noqa: B027 - what is in memory needs no fetching
        """The same rows are read soon."""

    def drop_pages(self) -> None:  # noqa: B027 - nothing to do is the usual case
        """Return the pages read so far, where a file is mapped."""

    def close(self) -> None:  # noqa: B027
        """Release the file, where one is open."""


class FactoredMoments(CompressedMoments):
    """Forms that are small enough to be held in memory: ``tensors`` is all there is."""

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        stored: Mapping[str, NDArray[np.float32]],
        beta2: float | None,
        steps: Mapping[str, int],
    ) -> None:
        """``stored``: the tensors of the file format, float32."""
        super().__init__(path, shapes, beta2, steps)
        self._stored = dict(stored)

    def tensors(self) -> Mapping[str, NDArray[np.float32]]:
        """What the file format stores."""
        return self._stored

    @property
    def size(self) -> int:
        """Bytes of the data."""
        return sum(tensor.nbytes for tensor in self._stored.values())


def compression_of(moments: Moments) -> str | None:
    """The compression of opened moments, ``none`` where v was written as it is; None for what a trainer left."""
    return moments.method if isinstance(moments, CompressedMoments) else None


def rank_of(moments: Moments) -> int | None:
    """The rank of opened moments that ``rank_k`` compressed; None for all others."""
    return moments.rank if isinstance(moments, CompressedMoments) else None


def is_compressed(moments: Moments) -> bool:
    """Whether opened moments stand for v in fewer bytes, rather than being v itself."""
    return compression_of(moments) not in {None, "none"}


def compression_label(method: str, rank: int | None) -> str:
    """A compression as messages name it."""
    return f"rank_k with rank {DEFAULT_RANK if rank is None else rank}" if method == "rank_k" else method


def label_of(moments: Moments) -> str:
    """The compression of opened moments as messages name it."""
    return compression_label(compression_of(moments) or "none", rank_of(moments))


def steps_of(moments: Moments) -> dict[str, int]:
    """Optimizer steps by parameter, where known."""
    return {name: step for name in moments.shapes() if (step := moments.step(name)) is not None}
