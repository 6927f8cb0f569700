"""Compression of second moments (methods.md section 2) and its file format.

Rank-1: a matrix v is kept as its row sums r and column sums c, and read back as ṽ_ij = (r_i / s) · c_j with s = Σ v
(AdaFactor: Shazeer & Stern 2018, arXiv 1804.04235, algorithm 1; used for merging in arXiv 2509.11167, section 4).

File: safetensors with metadata ``ota_format`` = ``moments/1``. A tensor N that is stored whole is called N, one that is factored has
``N#row`` and ``N#col``, float32. Shapes, steps and β₂ are in the metadata.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from ota_core.blocks import matrix_shape, row_blocks
from ota_core.byte_source import SourceOf
from ota_core.errors import MomentsError
from ota_core.kernels import row_and_column_sums, row_sums, sqrt
from ota_core.moments.base import Moments
from ota_core.moments.check import checked
from ota_core.safetensors_io import SafetensorsFile
from ota_core.stream import Stream
from ota_core.writer import SafetensorsWriter, TensorSpec

FORMAT = "moments/1"
ROW, COL = "#row", "#col"


class CompressionReport(BaseModel):
    """What a compression cost and lost. ``sqrt_error`` is ‖√v − √ṽ‖ / ‖√v‖ over the whole expert; bytes are of the data alone."""

    model_config = ConfigDict(frozen=True)

    method: str
    parameters: int
    bytes_per_param: float
    sqrt_error: float
    sqrt_error_per_tensor: dict[str, float]


class RankOneMoments:
    """Rank-1 second moments, from a file or straight from ``compress``: the same numbers either way."""

    method = "rank1"

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        stored: Mapping[str, torch.Tensor],
        beta2: float | None,
        steps: Mapping[str, int],
    ) -> None:
        """``stored``: the tensors of the file format, float32."""
        self.path, self.beta2 = path, beta2
        self._shapes, self._steps, self._stored = dict(shapes), dict(steps), dict(stored)
        self._share = {name: _share(stored[name + ROW]) for name in shapes if name + ROW in stored}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Parameter name to the shape of the parameter."""
        return self._shapes

    def step(self, name: str) -> int | None:
        """Optimizer steps behind v, where known."""
        return self._steps.get(name)

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """r / s, float32 (…, R), and c, float32 (…, C), of a tensor that is factored; None for one that is stored whole."""
        return (self._share[name], self._stored[name + COL]) if name in self._share else None

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> torch.Tensor:
        """Rows start:stop of ṽ, float32 (stop − start, C). The factors were checked once, so that ``check`` changes nothing."""
        if name not in self._share:
            return self._stored[name].reshape(matrix_shape(self._shapes[name]))[start:stop]
        share, cols = self._share[name], self._stored[name + COL]
        if cols.dim() == 1:
            return share[start:stop, None] * cols
        # Stacks of matrices: each row belongs to the column sums of its own matrix.
        height = self._shapes[name][-2]
        flat = cols.reshape(-1, cols.shape[-1])
        return share.reshape(-1)[start:stop, None] * flat[torch.arange(start, stop) // height]

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Everything is in memory; nothing to fetch."""

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """What the file format stores."""
        return self._stored

    def close(self) -> None:
        """Everything is in memory; nothing to release."""


def _share(rows: torch.Tensor) -> torch.Tensor:
    """r / s for each matrix; zeros where the whole matrix is zero. Divided first: r·c underflows. rows: float32 (…, R)."""
    flat = rows.double().reshape(-1, rows.shape[-1])
    sums = torch.tensor([math.fsum(matrix.tolist()) for matrix in flat], dtype=torch.float64)[:, None]
    return torch.where(sums > 0, flat / sums.clamp(min=torch.finfo(torch.float64).tiny), 0.0).float().reshape(rows.shape)


def compress(moments: Moments, *, stream: Stream, what: str = "compress") -> tuple[RankOneMoments, CompressionReport]:
    """Rank-1 compression of one expert's second moments, a tensor per job. Vectors are kept whole. Raises MomentsError on bad values."""
    shapes = dict(moments.shapes())
    results = stream.map(lambda name: _factor(moments, name, shapes[name], stream.block_elements), sorted(shapes), what=what)
    stored = {key: tensor for tensors, _, _ in results for key, tensor in tensors.items()}
    steps = {name: step for name in shapes if (step := moments.step(name)) is not None}
    compressed = RankOneMoments(moments.path, shapes, stored, moments.beta2, steps)
    errors = {name: (lost, total) for name, (_, lost, total) in zip(sorted(shapes), results, strict=True)}
    parameters = sum(math.prod(shape) for shape in shapes.values())
    report = CompressionReport(
        method="rank1",
        parameters=parameters,
        bytes_per_param=sum(t.nbytes for t in stored.values()) / max(parameters, 1),
        sqrt_error=_ratio(math.fsum(lost for lost, _ in errors.values()), math.fsum(total for _, total in errors.values())),
        sqrt_error_per_tensor={name: _ratio(lost, total) for name, (lost, total) in errors.items()},
    )
    return compressed, report


def _ratio(lost: float, total: float) -> float:
    return math.sqrt(max(lost, 0.0) / total) if total > 0 else 0.0


def _factor(moments: Moments, name: str, shape: tuple[int, ...], block: int) -> tuple[dict[str, torch.Tensor], float, float]:
    """The stored form of one tensor, Σ(√v − √ṽ)² and Σv."""
    if len(shape) < 2:
        whole = (
            torch.cat([moments.read(name, a, b) for a, b in row_blocks(shape, block)] or [torch.empty(0, 1)])
            .reshape(shape)
            .clone()
        )
        return {name: whole}, 0.0, math.fsum(whole.double().reshape(-1).tolist())
    height, width = shape[-2:]
    stacks = math.prod(shape[:-2])
    rows = torch.zeros(stacks * height, dtype=torch.float64)
    cols = torch.zeros(stacks, width, dtype=torch.float64)
    for stack in range(stacks):
        for a, b in row_blocks((height, width), block):
            start = stack * height
            rows[start + a : start + b] = row_and_column_sums(moments.read(name, start + a, start + b), cols[stack])
    largest = max(rows.max().item() if rows.numel() else 0.0, cols.max().item() if cols.numel() else 0.0)
    if largest > torch.finfo(torch.float32).max:
        raise MomentsError(
            f"{moments.path}: a row or column of '{name}' adds up to {largest:.3g}, more than float32 holds; second moments are usually "
            "1e-22 to 1e-8: is this the right file? With compression: none they are used as they are"
        )
    stored = {name + ROW: rows.float().reshape(shape[:-1]), name + COL: cols.float().reshape(*shape[:-2], width)}
    approximate = RankOneMoments(moments.path, {name: shape}, stored, None, {})
    lost = []
    for a, b in row_blocks(shape, block):
        difference = sqrt(moments.read(name, a, b).double()) - sqrt(approximate.read(name, a, b).double())
        lost += row_sums(difference * difference).tolist()
    return stored, math.fsum(lost), math.fsum(rows.tolist())


def save_compressed(moments: RankOneMoments, path: Path) -> None:
    """Write the file format to ``path``."""
    stored = {name: tensor.contiguous() for name, tensor in moments.tensors().items()}
    writer = SafetensorsWriter(
        path, [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in stored.items()], _metadata(moments, moments.method)
    )
    for name, tensor in stored.items():
        writer.write_rows(name, 0, tensor.reshape(matrix_shape(tensor.shape)))
    writer.close()


def save_full(moments: Moments, path: Path, *, stream: Stream) -> CompressionReport:
    """Write v uncompressed, float32, under the parameters' names: one format whatever the trainer left."""
    shapes = dict(moments.shapes())
    writer = SafetensorsWriter(
        path, [TensorSpec(n, s, torch.float32) for n, s in sorted(shapes.items())], _metadata(moments, "none")
    )
    try:
        blocks = [(name, a, b) for name in sorted(shapes) for a, b in row_blocks(shapes[name], stream.block_elements)]
        stream.map(lambda block: writer.write_rows(block[0], block[1], moments.read(*block)), blocks, what="copy moments")
    except BaseException:
        writer.abort()
        raise
    writer.close()
    parameters = sum(math.prod(shape) for shape in shapes.values())
    return CompressionReport(method="none", parameters=parameters, bytes_per_param=4.0, sqrt_error=0.0, sqrt_error_per_tensor={})


def _metadata(moments: Moments, method: str) -> dict[str, str]:
    shapes = {name: list(shape) for name, shape in sorted(moments.shapes().items())}
    steps = {name: step for name in shapes if (step := moments.step(name)) is not None}
    return {
        "ota_format": FORMAT,
        "method": method,
        "header": json.dumps({"shapes": shapes, "steps": steps, "beta2": moments.beta2}, sort_keys=True),
    }


class StoredMoments:
    """Moments that ``save_full`` wrote."""

    method = "none"

    def __init__(self, file: SafetensorsFile, header: dict[str, Any]) -> None:
        self.path, self.beta2 = file.path, header["beta2"]
        self._file = file
        self._steps: dict[str, int] = header["steps"]
        self._shapes = {name: tuple(shape) for name, shape in header["shapes"].items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def step(self, name: str) -> int | None:
        return self._steps.get(name)

    def read(self, name: str, start: int, stop: int, *, check: bool = True) -> torch.Tensor:
        """Rows start:stop of v, a view of the file: float32 (stop − start, C)."""
        rows = self._file.read_rows(name, start, stop)
        return checked(rows, path=self.path, name=name, shape=self._shapes[name], start=start) if check else rows

    def prefetch(self, name: str, start: int, stop: int) -> None:
        self._file.prefetch(name, start, stop)

    def drop_pages(self) -> None:
        self._file.drop_pages()

    def close(self) -> None:
        self._file.close()


def open_compressed(path: Path, source_of: SourceOf | None = None) -> RankOneMoments | StoredMoments:
    """Open a file of this format. Raises MomentsError when the format or the method is not known here."""
    file = SafetensorsFile(path, source_of(path) if source_of else None)
    method = file.metadata.get("method")
    if file.metadata.get("ota_format") != FORMAT or method not in {"none", "rank1"}:
        raise MomentsError(
            f"{path}: format {file.metadata.get('ota_format')!r}, method {method!r}; this version reads {FORMAT} with method none or rank1. "
            "Compress the second moments again with this version"
        )
    header = json.loads(file.metadata["header"])
    if method == "none":
        return StoredMoments(file, header)
    shapes = {name: tuple(shape) for name, shape in header["shapes"].items()}
    for name, info in file.infos.items():
        file.prefetch(name, 0, matrix_shape(info.shape)[0])
    stored = {
        name: file.read_rows(name, 0, matrix_shape(info.shape)[0]).reshape(info.shape).clone()
        for name, info in file.infos.items()
    }
    expected = {key for name, shape in shapes.items() for key in ([name] if len(shape) < 2 else [name + ROW, name + COL])}
    if set(stored) != expected:
        raise MomentsError(
            f"{path}: its tensors do not match its header ({sorted(set(stored) ^ expected)[:4]}); compress the second moments again"
        )
    for name, tensor in stored.items():
        if tensor.numel() and not (tensor.min() >= 0 and tensor.max() < math.inf):
            raise MomentsError(
                f"{path}: tensor '{name}' holds a negative, NaN or infinite entry; second moments are finite and ≥ 0"
            )
    file.close()
    return RankOneMoments(path, shapes, stored, header["beta2"], header["steps"])
