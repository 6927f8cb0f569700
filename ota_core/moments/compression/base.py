"""What the compressed forms of second moments have in common: how they are described, and what a compression reports."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ota_core.files.safetensors_io import SafetensorsFile
from ota_core.moments.base import Moments
from ota_core.moments.compression.header import Header, Method

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


class CompressedMoments(Moments):
    """Second moments in one of the forms of this package."""

    compressed: ClassVar[bool] = True
    as_trained: bool = False
    """Whether the optimizer itself kept no more than this form, as Adafactor does: nothing was lost since, and there is no full v."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self.method, self.rank, self.beta2 = header.method, header.rank, header.beta2
        self.estimated, self.unbiased = header.estimated, header.unbiased

    @staticmethod
    @abstractmethod
    def keys(name: str, shape: tuple[int, ...], rank: int | None) -> dict[str, tuple[int, ...]]:
        """The tensors of the file format that stand for one parameter, with their shapes. rank: of ``rank_k``."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.header.shapes

    def step(self, name: str) -> int | None:
        return self.header.steps.get(name)


class MappedMoments(CompressedMoments):
    """Forms that stay in their file and are read as they are asked for."""

    def __init__(self, file: SafetensorsFile, header: Header) -> None:
        super().__init__(file.path, header)
        self._file = file

    def drop_pages(self) -> None:
        self._file.drop_pages()

    def close(self) -> None:
        self._file.close()


class FactoredMoments(CompressedMoments):
    """Forms that are small enough to be held in memory: ``tensors`` is all there is."""

    def __init__(self, path: Path, header: Header, stored: Mapping[str, NDArray[np.float32]]) -> None:
        """``stored``: the tensors of ``keys``, float32."""
        super().__init__(path, header)
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


def kept_as_trained(moments: Moments) -> bool:
    """Whether opened moments have a compressed form because their optimizer (Adafactor) kept no other."""
    return isinstance(moments, CompressedMoments) and moments.as_trained


def compression_label(method: str, rank: int | None) -> str:
    """A compression as messages name it."""
    return f"rank_k with rank {DEFAULT_RANK if rank is None else rank}" if method == "rank_k" else method


def label_of(moments: Moments) -> str:
    """The compression of opened moments as messages name it."""
    return compression_label(compression_of(moments) or "none", rank_of(moments))
