"""How far compressed second moments lead to the same saliency as the full ones (methods.md section 2): rank correlation and mask overlap."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

import torch
from pydantic import BaseModel, ConfigDict

from ota_core.blocks import row_blocks
from ota_core.checkpoint import Checkpoint
from ota_core.errors import CheckpointError
from ota_core.kernels import count_high, count_low
from ota_core.moments.base import Moments
from ota_core.saliency import Histogram, curvature_scores, keep, kept_count, locate, score_of
from ota_core.stream import Stream

Block = tuple[str, int, int]


class Agreement(BaseModel):
    """``spearman``: rank correlation of the saliency of all elements, ranks told apart by the upper 16 bits of the float32 score (1/128 of
    an octave). ``jaccard``: |A ∩ B| / |A ∪ B| of the two FFG masks at ``density``, both exact."""

    model_config = ConfigDict(frozen=True)

    density: float
    spearman: float
    jaccard: float


@dataclass
class _Sums:
    """Integer counts and exact float parts that blocks add to, in any order."""

    both: int = 0
    either: int = 0
    parts: list[tuple[float, float, float]] = field(default_factory=list)
    lock: Lock = field(default_factory=Lock)


def agreement(
    full: Moments, compressed: Moments, expert: Checkpoint, base: Checkpoint, *, density: float, stream: Stream
) -> Agreement:
    """Compare √v·|Δ| with √ṽ·|Δ| over every tensor that both moments cover. Raises CheckpointError when expert and base do not fit."""
    shapes = {name: shape for name, shape in full.shapes().items() if name in expert and name in base}
    if not shapes:
        raise CheckpointError(
            f"{full.path}: none of its tensors is in both {expert.path} and {base.path}; expected the models it was trained with"
        )
    for name, shape in shapes.items():
        for model in (expert, base):
            if model.info(name).shape != tuple(shape):
                raise CheckpointError(
                    f"{model.path}: tensor '{name}' has shape {list(model.info(name).shape)}, its second moments {list(shape)}"
                )
    blocks = [(name, a, b) for name, shape in sorted(shapes.items()) for a, b in row_blocks(shape, stream.block_elements)]
    total = sum(math.prod(shape) for shape in shapes.values())

    def scores(moments: Moments, block: Block) -> torch.Tensor:
        v, theta, start = moments.read(*block), expert.read_rows(*block), base.read_rows(*block)
        stream.count_read(v.nbytes + theta.nbytes + start.nbytes)
        return curvature_scores(v, theta.double() - start.double())

    def counter(moments: Moments) -> Callable[[Histogram, int | None], None]:
        def count(histogram: Histogram, high: int | None) -> None:
            def work(block: Block) -> None:
                values = scores(moments, block)
                count_high(values, histogram.local()) if high is None else count_low(values, high, histogram.local())

            stream.map(work, blocks, what="compare")

        return count

    k = kept_count(density, total)
    thresholds, ranks = [], []
    for moments in (full, compressed):
        count, histogram = counter(moments), Histogram()
        count(histogram, None)
        thresholds.append(_kth_largest(count, k, histogram) if k else math.inf)
        ranks.append(_midranks(histogram))
    sums = _Sums()

    def compare(block: Block) -> None:
        a, b = scores(full, block), scores(compressed, block)
        kept_a, kept_b = keep(a, thresholds[0]), keep(b, thresholds[1])
        x, y = (rank[values.reshape(-1).view(torch.int32) >> 16] for rank, values in zip(ranks, (a, b), strict=True))
        part = (float((x * y).sum()), float((x * x).sum()), float((y * y).sum()))
        with sums.lock:
            sums.both += int((kept_a & kept_b).sum())
            sums.either += int((kept_a | kept_b).sum())
            sums.parts.append(part)

    stream.map(compare, blocks, what="compare")
    xy, xx, yy = (math.fsum(part[i] for part in sums.parts) for i in range(3))
    spearman = xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else 1.0
    return Agreement(density=density, spearman=spearman, jaccard=sums.both / sums.either if sums.either else 1.0)


def _kth_largest(count: Callable[[Histogram, int | None], None], k: int, high: Histogram) -> float:
    """The k-th largest score, from the histogram of the upper bits and one more count."""
    upper, above = locate(high.counts().numpy(), k)
    low = Histogram()
    count(low, upper)
    return score_of((upper << 16) | locate(low.counts().numpy(), k - above)[0])


def _midranks(histogram: Histogram) -> torch.Tensor:
    """The centred mean rank of the scores of each bin: float64 (65536,)."""
    counts = histogram.counts().double()
    ranks = counts.cumsum(0) - (counts - 1) / 2
    return ranks - (counts.sum() + 1) / 2
