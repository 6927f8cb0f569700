"""Small dense linear algebra as compiled loops in float64: what decides bytes must not go through a BLAS, whose order of sums is its own.

Legend: m rows of a sketch, R rows, C columns, l directions. Directions are the rows of a matrix (l, C), orthonormal or zero.
"""

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.loops import compiled

F64 = NDArray[np.float64]

# What is left of a vector after its projections were taken off counts as nothing below this share of its length.
_DEPENDENT = 1e-10
_SWEEPS = 30


@compiled
def mix(counter: int, seed: int) -> np.uint64:
    """A random number for each (counter, seed): the finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    z = np.uint64(counter) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def dot(a: F64, b: F64) -> float:
    """Σ a·b in eight running sums, whose order only the length decides."""
    whole = a.shape[0] - a.shape[0] % 8
    s0, s1, s2, s3, s4, s5, s6, s7 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for j in range(0, whole, 8):
        s0 += a[j] * b[j]
        s1 += a[j + 1] * b[j + 1]
        s2 += a[j + 2] * b[j + 2]
        s3 += a[j + 3] * b[j + 3]
        s4 += a[j + 4] * b[j + 4]
        s5 += a[j + 5] * b[j + 5]
        s6 += a[j + 6] * b[j + 6]
        s7 += a[j + 7] * b[j + 7]
    total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    for j in range(whole, a.shape[0]):
        total += a[j] * b[j]
    return total


@compiled
def add_scaled(target: F64, factor: float, vector: F64) -> None:
    """target += factor · vector."""
    for j in range(target.shape[0]):
        target[j] += factor * vector[j]


@compiled
def products(matrix: F64, directions: F64, out: F64) -> None:
    """out (n, l) = matrix (n, C) · directions (l, C)ᵀ."""
    for i in range(matrix.shape[0]):
        for p in range(directions.shape[0]):
            out[i, p] = dot(matrix[i], directions[p])


@compiled
def combinations(factors: F64, matrix: F64, out: F64) -> None:
    """out (l, C) = factors (n, l)ᵀ · matrix (n, C), added row after row."""
    out[:] = 0.0
    for i in range(matrix.shape[0]):
        for p in range(factors.shape[1]):
            add_scaled(out[p], factors[i, p], matrix[i])


@compiled
def orthonormalise(vectors: F64) -> None:
    """Gram-Schmidt on the rows, twice for accuracy; a row that depends on those before it becomes zero."""
    for p in range(vectors.shape[0]):
        before = np.sqrt(dot(vectors[p], vectors[p]))
        for _ in range(2):
            for q in range(p):
                add_scaled(vectors[p], -dot(vectors[p], vectors[q]), vectors[q])
        length = np.sqrt(dot(vectors[p], vectors[p]))
        if length <= _DEPENDENT * before:
            vectors[p] = 0.0
        else:
            vectors[p] /= length


@compiled
def leading_directions(sketch: F64, first: F64, count: int, rounds: int) -> F64:
    """Orthonormal directions (1 + count, C): ``first`` (C,), then the leading right singular space of the sketch (m, C).

    Subspace iteration from random signs (Halko, Martinsson & Tropp 2011, arXiv 0909.4061, algorithm 4.4).
    """
    m, width = sketch.shape
    factors = np.empty((m, count))
    for i in range(m):
        for p in range(count):
            factors[i, p] = 1.0 if mix(i, p + 1) >> np.uint64(63) else -1.0
    found = np.empty((count, width))
    combinations(factors, sketch, found)
    for _ in range(rounds):
        orthonormalise(found)
        products(sketch, found, factors)
        combinations(factors, sketch, found)
    orthonormalise(found)
    directions = np.empty((1 + count, width))
    directions[0] = first
    directions[1:] = found
    orthonormalise(directions)
    return directions


@compiled
def eigenvectors(matrix: F64) -> tuple[F64, F64]:
    """Eigenvalues (l,), falling, and eigenvectors as rows (l, l) of a symmetric matrix: Jacobi's rotations, row after row."""
    a, n = matrix.copy(), matrix.shape[0]
    vectors = np.eye(n)
    for _ in range(_SWEEPS):
        largest = 0.0
        for p in range(n):
            for q in range(p + 1, n):
                scale = np.sqrt(a[p, p]) * np.sqrt(a[q, q]) if a[p, p] > 0 and a[q, q] > 0 else 0.0
                if abs(a[p, q]) <= 1e-15 * scale or a[p, q] == 0.0:
                    continue
                largest = max(largest, abs(a[p, q]))
                theta = (a[q, q] - a[p, p]) / (2.0 * a[p, q])
                t = (1.0 if theta >= 0 else -1.0) / (abs(theta) + np.sqrt(theta * theta + 1.0))
                c = 1.0 / np.sqrt(t * t + 1.0)
                s = t * c
                for k in range(n):
                    x, y = a[k, p], a[k, q]
                    a[k, p], a[k, q] = c * x - s * y, s * x + c * y
                for k in range(n):
                    x, y = a[p, k], a[q, k]
                    a[p, k], a[q, k] = c * x - s * y, s * x + c * y
                for k in range(n):
                    x, y = vectors[p, k], vectors[q, k]
                    vectors[p, k], vectors[q, k] = c * x - s * y, s * x + c * y
        if largest == 0.0:
            break
    values = np.empty(n)
    for p in range(n):
        values[p] = a[p, p]
    order = np.argsort(-values, kind="mergesort")
    return values[order], vectors[order]
