"""How far compressed second moments lead to the same saliency as the full ones (docs/methods.md section 2): rank correlation and mask overlap."""

import math
from collections.abc import Callable, Iterator, Sequence
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ota_core.compute.blocks import matrix_shape, row_blocks
from ota_core.compute.exact import PairDots
from ota_core.compute.kernels import count_high, count_low
from ota_core.compute.stream import CACHE_ELEMENTS, Stream
from ota_core.errors import CheckpointError
from ota_core.files.checkpoint import Checkpoint
from ota_core.methods.numbers import BINS, kept_count, locate, score_of
from ota_core.methods.saliency import curvature_scores, keep
from ota_core.moments.base import Moments

Block = tuple[str, int, int]


class Agreement(BaseModel):
    """``spearman``: rank correlation of the saliency of all elements, ranks told apart by the upper 16 bits of the float32 score (1/128 of
    an octave). ``jaccard``: |A ∩ B| / |A ∪ B| of the two FFG masks at ``density``, both exact."""

    model_config = ConfigDict(frozen=True)

    density: float
    spearman: float
    jaccard: float


def agreements(
    full: Moments, forms: Sequence[Moments], expert: Checkpoint, base: Checkpoint, *, density: float, stream: Stream
) -> list[Agreement]:
    """Compare √v·|Δ| with √ṽ·|Δ| of each compressed form over every tensor that the moments cover, in three passes for all forms.

    The same bits for every cut into blocks. Raises CheckpointError when expert and base do not fit.
    """
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
    k = kept_count(density, sum(math.prod(shape) for shape in shapes.values()))
    sources = [full, *forms]

    def scores(block: Block) -> list[torch.Tensor]:
        theta, start = expert.read_rows(*block), base.read_rows(*block)
        v = [moments.read(*block) for moments in sources]
        stream.count_read(theta.nbytes + start.nbytes + sum(one.nbytes for one in v))
        delta = theta.tensor().double() - start.tensor().double()
        return [curvature_scores(torch.from_numpy(one), delta) for one in v]

    def pieces(block: Block) -> Iterator[Block]:
        """Pieces that stay in the cache with the scores of every form."""
        name, start, stop = block
        for a, b in row_blocks((stop - start, matrix_shape(shapes[name])[1]), CACHE_ELEMENTS):
            yield name, start + a, start + b

    def counted(count: Callable[[int, torch.Tensor, NDArray[np.int64]], None]) -> NDArray[np.int64]:
        """What ``count`` adds up over the scores of each source: int64 (1 + forms, 65536)."""
        total, lock = np.zeros((len(sources), BINS), np.int64), Lock()

        def work(block: Block) -> None:
            local = np.zeros_like(total)
            for piece in pieces(block):
                for i, values in enumerate(scores(piece)):
                    count(i, values, local[i])
            with lock:
                np.add(total, local, out=total)

        stream.map(work, blocks, what="compare")
        return total

    high = counted(lambda _, values, counts: count_high(values, counts))
    places = [locate(counts, k) if k else (0, 0) for counts in high]
    low = counted(lambda i, values, counts: count_low(values, places[i][0], counts))
    thresholds = kth_scores(places, low, k)
    ranks = [midranks(counts) for counts in high]
    # Elements that the masks by the full v and by each form keep both, and at least one of them.
    sums, kept, lock = PairDots(len(sources)), np.zeros((2, len(forms)), np.int64), Lock()

    def compare(block: Block) -> None:
        local, mine = PairDots(len(sources)), np.zeros_like(kept)
        for piece in pieces(block):
            found = scores(piece)
            local.add_rows(np.stack([rank_rows(rank, values) for rank, values in zip(ranks, found, strict=True)]))
            masks = [keep(values, tau) for values, tau in zip(found, thresholds, strict=True)]
            for i, mask in enumerate(masks[1:]):
                mine[:, i] += int((masks[0] & mask).sum()), int((masks[0] | mask).sum())
        sums.add(local)
        with lock:
            np.add(kept, mine, out=kept)

    stream.map(compare, blocks, what="compare")
    found = []
    for i, (both, either) in enumerate(kept.T.tolist(), 1):
        rho = sums.cosine(0, i)
        found.append(
            Agreement(density=density, spearman=1.0 if math.isnan(rho) else rho, jaccard=both / either if either else 1.0)
        )
    return found


def kth_scores(places: Sequence[tuple[int, int]], low: NDArray[np.int64], k: int) -> list[float]:
    """The k-th largest score of each source; infinite for k = 0.

    places: its bin by the upper 16 bits, and how many scores lie above that; low: int64 (M, 65536), counts by the lower 16 bits in the bin.
    """
    if not k:
        return [math.inf] * len(places)
    return [score_of((bin << 16) | locate(counts, k - above)[0]) for (bin, above), counts in zip(places, low, strict=True)]


def midranks(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The centred mean rank of the scores of each bin: float64 (65536,), exact. counts: int64 (65536,), by rising score."""
    # Twice the rank is a whole number.
    ranks: NDArray[np.float64] = (2 * np.cumsum(counts) - counts - counts.sum()) / 2.0
    return ranks


def rank_rows(ranks: NDArray[np.float64], scores: torch.Tensor) -> NDArray[np.float64]:
    """The ranks of scores by their upper 16 bits, float64 (R, C). ranks: float64 (65536,); scores: float32 ≥ +0 (R, C)."""
    found: NDArray[np.float64] = ranks[scores.numpy().view(np.int32) >> 16]
    return found
