"""Methods whose result is a weighted sum of the models, with factors that the products between the models tell.

Vectors are whole tensors, or rows or columns of them; M vectors x_1 … x_M are known here by their Gram matrix G, G_ij = ⟨x_i, x_j⟩, so that
no tensor is held. Every function returns the M factors of the sum. Scalar routines alone: a vectorised sine may differ on another processor.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled

PARALLEL = 1e-8
"""Below this sine of the angle between two vectors the arc between them has no direction."""

Gram = Sequence[Sequence[float]]


def multislerp(gram: Gram, weights: Sequence[float], *, normalize: bool, eps: float) -> list[float]:
    """Weighted spherical mean: the direction of Σ w·x/‖x‖, the length Σ w·‖x‖.

    The tangents at that direction add up to 0, so that the mean in the tangent space is the direction itself (Goddard 2024, the multislerp
    method of mergekit). Where the directions cancel, below ``eps``, it is Σ w·x. ``normalize`` divides the weights by their sum.
    """
    if normalize:
        total = sum(weights)
        weights = [weight / total for weight in weights]
    norms = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    shares = [weight / (norm + eps) if norm > 0 else 0.0 for weight, norm in zip(weights, norms, strict=True)]
    length = math.sqrt(max(0.0, _form(gram, shares)))
    if length < eps or length == 0:
        return list(weights)
    size = math.fsum(weight * norm for weight, norm in zip(weights, norms, strict=True)) * math.cos(eps) / length
    return [share * size for share in shares]


def karcher(gram: Gram, *, max_iter: int, tol: float) -> list[float]:
    """The Karcher mean of the directions on the sphere, at the mean of the lengths (Karcher 1977; arXiv 2603.04972 for merging).

    From the mean direction q, each step goes along the mean of the logarithms log_q(x_i/‖x_i‖); a step below ``tol`` ends it. Vectors of
    zeros have no direction: they count in the mean length alone.
    """
    norms = [math.sqrt(gram[i][i]) for i in range(len(gram))]
    here = [i for i, norm in enumerate(norms) if norm > 0]
    if not here:
        return [1.0 / len(gram)] * len(gram)
    cosines = [[gram[i][j] / (norms[i] * norms[j]) for j in here] for i in here]
    point = _unit(cosines, [1.0] * len(here)) or [1.0] + [0.0] * (len(here) - 1)
    for _ in range(max_iter):
        step = [0.0] * len(here)
        for i, row in enumerate(cosines):
            cosine = min(1.0, max(-1.0, math.fsum(c * p for c, p in zip(row, point, strict=True))))
            angle = math.acos(cosine)
            if math.sin(angle) < PARALLEL:  # at the point itself, or opposite to it, where no direction leads
                continue
            stretch = angle / math.sin(angle) / len(here)
            step = [s - stretch * cosine * p for s, p in zip(step, point, strict=True)]
            step[i] += stretch
        length = math.sqrt(max(0.0, _form(cosines, step)))
        if length < tol or length == 0:
            break
        ahead, aside = math.cos(length), math.sin(length) / length
        point = [ahead * p + aside * s for p, s in zip(point, step, strict=True)]
    size, factors = math.fsum(norms) / len(norms), [0.0] * len(norms)
    for i, p in zip(here, point, strict=True):
        factors[i] = p * size / norms[i]
    return factors


def _form(matrix: Gram, vector: Sequence[float]) -> float:
    """vᵀ A v."""
    return math.fsum(matrix[i][j] * a * b for i, a in enumerate(vector) for j, b in enumerate(vector))


def _unit(cosines: Gram, vector: list[float]) -> list[float] | None:
    """The combination at length 1; None where it is nothing."""
    length = math.sqrt(max(0.0, _form(cosines, vector)))
    return [v / length for v in vector] if length > PARALLEL else None


@compiled
def arc_factors(aa: float, bb: float, ab: float, t: float) -> tuple[float, float]:
    """The factors of two vectors at position t of the arc between them (Shoemake 1985), from ⟨a, a⟩, ⟨b, b⟩ and ⟨a, b⟩.

    Vectors that are parallel or opposite, to ``PARALLEL``, interpolate linearly; one of zeros counts as orthogonal to every other.
    """
    cosine = ab / (math.sqrt(aa) * math.sqrt(bb)) if aa > 0 and bb > 0 else 0.0
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    sine = math.sin(angle)
    if sine < 1e-8:
        return 1.0 - t, t
    return math.sin((1.0 - t) * angle) / sine, math.sin(t * angle) / sine


@compiled
def stock_ratio(products: NDArray[np.float64], count: int) -> float:
    """Model Stock's ratio t = M·c / (1 + (M − 1)·c), with c the mean cosine between pairs of M task vectors (arXiv 2403.19522, equation 7 for
    any M). products: the pairs (0, 0), (0, 1), …, (1, 1), … of ``exact.pair_index``. A task vector of zeros has the cosine 0 to every other."""
    squares, total, pair = np.empty(count), 0.0, 0
    for a in range(count):
        squares[a] = products[pair]
        pair += count - a
    pair = 0
    for a in range(count):
        for b in range(a, count):
            if b > a and squares[a] > 0 and squares[b] > 0:
                total += products[pair] / (math.sqrt(squares[a]) * math.sqrt(squares[b]))
            pair += 1
    cosine = total / (count * (count - 1) / 2)
    below = 1.0 + (count - 1) * cosine
    return count * cosine / below if below != 0 else 0.0


@compiled
def arc_factors_of_each(products: NDArray[np.float64], t: float, factors: NDArray[np.float64]) -> None:
    """``arc_factors`` of G pairs of vectors. products: (G, 3), ⟨a, a⟩, ⟨a, b⟩, ⟨b, b⟩; factors: (2, G), is written."""
    for g in range(products.shape[0]):
        factors[0, g], factors[1, g] = arc_factors(products[g, 0], products[g, 2], products[g, 1], t)


@compiled
def stock_factors_of_each(products: NDArray[np.float64], count: int, factors: NDArray[np.float64]) -> None:
    """t / M of ``stock_ratio`` for G groups of M task vectors. products: (G, pairs); factors: (M, G), is written."""
    for g in range(products.shape[0]):
        ratio = stock_ratio(products[g], count) / count
        for m in range(count):
            factors[m, g] = ratio
