"""The analyses by plain numpy on whole models, float64: what ``ota_core.analysis`` is compared with. Shares nothing with it."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from tests.reference import Expert, Tensors

Key = tuple[Any, ...]
"""analysis, expert, other, layer, role, variant, measure, at"""
PLACES: dict[str, tuple[int | None, str]] = {
    "model.embed_tokens.weight": (None, "embed"),
    "model.layers.0.self_attn.q_proj.weight": (0, "q"),
    "model.layers.0.mlp.experts.down_proj": (0, "down"),
    "model.layers.1.mlp.up_proj.weight": (1, "up"),
    "model.layers.1.mlp.up_proj.bias": (1, "up"),
    "model.layers.1.input_layernorm.weight": (1, "norm"),
    "model.norm.weight": (None, "norm"),
}
BINS = 20


def members(names: Sequence[str], *, layers: bool) -> dict[tuple[int | None, str], list[str]]:
    """Cells, with ``layers`` also the layers, and the whole → names of their tensors."""
    found: dict[tuple[int | None, str], list[str]] = {}
    for name in names:
        layer, role = PLACES[name]
        for place in [(layer, role), *([(layer, "all")] if layers and layer is not None else []), (None, "all")]:
            found.setdefault(place, []).append(name)
    return found


def flat(tensors: Mapping[str, Any], names: Sequence[str]) -> np.ndarray:
    return np.concatenate([np.asarray(tensors[name], np.float64).ravel() for name in names])


def top(values: np.ndarray, k: int) -> np.ndarray:
    """The k largest that are positive, with all that equal the last of them."""
    return (values >= np.sort(values)[::-1][k - 1]) & (values > 0) if k else np.zeros(values.shape, bool)


def split(mask: np.ndarray, tensors: Tensors, names: Sequence[str]) -> Tensors:
    """The opposite of ``flat``."""
    found, start = {}, 0
    for name in names:
        size = tensors[name].size
        found[name] = mask[start : start + size].reshape(tensors[name].shape)
        start += size
    return found


def localisation(name: str, variant: str, masks: Tensors) -> dict[Key, float]:
    found: dict[Key, float] = {}
    for (layer, role), names in members(list(masks), layers=True).items():
        mask = flat(masks, names)
        found["localisation", name, None, layer, role, variant, "density", None] = mask.mean()
        matrices = [m for n in names for m in masks[n].reshape(-1, *masks[n].shape[-2:]) if masks[n].ndim > 1]
        if not matrices or (role == "all" and layer is not None):
            continue
        for measure, axis in (("rows", 1), ("columns", 0)):
            counts = np.zeros(BINS)
            lines = [(int(x.sum()), x.size) for m in matrices for x in (m if axis else m.T)]
            for kept, size in lines:
                counts[next(i for i in reversed(range(BINS)) if kept * BINS >= i * size)] += 1
            for i, count in enumerate(counts):
                found["sparsity", name, None, layer, role, variant, measure, i / BINS] = count
            empty = np.mean([kept == 0 for kept, _ in lines])
            found["sparsity", name, None, layer, role, variant, f"empty_{measure}", None] = empty
    for stack in (n for n in masks if ".experts." in n):  # of a mixture: here one tensor with all of them
        layer, role = PLACES[stack]
        for i, matrix in enumerate(masks[stack]):
            for place in ((layer, role), (layer, "all"), (None, "all")):
                found["moe", name, None, *place, variant, "density", i] = matrix.mean()
    return found


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    return float(a @ b / lengths[0] / lengths[1]) if min(lengths) > 0 else math.nan


def task_vectors(base: Tensors, experts: Mapping[str, Expert]) -> dict[Key, float]:
    deltas = {e: {n: x.weights[n].astype(np.float64) - base[n] for n in base} for e, x in experts.items()}
    found: dict[Key, float] = {}
    for (layer, role), names in members(list(base), layers=True).items():
        parts = {e: flat(d, names) for e, d in deltas.items()}
        start = np.linalg.norm(flat(base, names))
        for e, x in parts.items():
            found["task_vector", e, None, layer, role, "", "norm", None] = np.linalg.norm(x)
            found["task_vector", e, None, layer, role, "", "relative_norm", None] = np.linalg.norm(x) / start
        for a, b in combinations(parts, 2):
            x, y = parts[a], parts[b]
            both = (x != 0) & (y != 0)
            found["task_vector", a, b, layer, role, "", "cosine", None] = cosine(x, y)
            conflict = np.mean(np.sign(x[both]) != np.sign(y[both])) if both.any() else math.nan
            found["task_vector", a, b, layer, role, "", "sign_conflict", None] = conflict
    return found


def overlap(v: Mapping[str, Tensors], density: float) -> dict[Key, float]:
    """v: of each expert the curvature that is compared."""
    names = list(next(iter(v.values())))
    k = math.floor(density * sum(v[next(iter(v))][n].size for n in names) + 0.5)
    masks = {e: split(top(flat(x, names), k), x, names) for e, x in v.items()}
    found: dict[Key, float] = {}
    for (layer, role), part in members(names, layers=False).items():
        for a, b in combinations(v, 2):
            x, y = flat(v[a], part), flat(v[b], part)
            kept = flat(masks[a], part).astype(bool), flat(masks[b], part).astype(bool)
            measures = {
                "cosine_sqrt_v": cosine(np.sqrt(x), np.sqrt(y)),
                "spearman": spearmanr(x, y).statistic,
                "jaccard": (kept[0] & kept[1]).sum() / (kept[0] | kept[1]).sum() if (kept[0] | kept[1]).any() else math.nan,
            }
            for measure, value in measures.items():
                at = density if measure == "jaccard" else None
                found["curvature_overlap", a, b, layer, role, "", measure, at] = value
    return found


def by_key(rows: Sequence[Any], keep: Callable[[Any], bool] = lambda _: True) -> dict[Key, float]:
    found = {(r.analysis, r.expert, r.other, r.layer, r.role, r.variant, r.measure, r.at): r.value for r in rows if keep(r)}
    assert len(found) == sum(1 for r in rows if keep(r)), "two rows say the same"
    return found
