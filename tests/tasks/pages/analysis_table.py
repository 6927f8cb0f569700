"""A table of an analysis in the form of the real one, with numbers that look like those of trained experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from tasks.evaluation.scores import mean_error

EXPERTS = ("math", "code", "precise_if", "general_if", "knowledge")
BLOCK = ("q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "norm")
"""Every projection by itself and in one tensor, as no single model has them."""
DENSITY = 0.4
OUTSIDE = ("embed", "norm", "head")
COMPRESSIONS = {"none": 4.0, "log8": 1.03, "rank_k": 0.09, "rank1": 0.012}
COLUMNS = ("analysis", "expert", "other", "layer", "role", "variant", "measure", "at", "value", "unit", "elements")

Row = dict[str, Any]


def analysis_table(experts: Sequence[str] = EXPERTS, layers: int = 12, seed: int = 0) -> pd.DataFrame:
    """All five analyses of ``experts`` with ``layers`` blocks."""
    rng = np.random.default_rng(seed)
    places: list[tuple[int | None, str]] = [(layer, role) for layer in range(layers) for role in BLOCK]
    places += [(None, role) for role in OUTSIDE]
    totals: list[tuple[int | None, str]] = [(layer, "all") for layer in range(layers)] + [(None, "all")]
    rows: list[Row] = []
    for expert in experts:
        rows += _single(expert, [*places, *totals], layers, rng)
    for one, two in combinations(experts, 2):
        rows += _pair(one, two, [*places, *totals], rng)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.astype({"layer": "Int64", "elements": "Int64", "value": "float64", "at": "float64"})


def _row(analysis: str, measure: str, value: float, place: tuple[int | None, str], **more: Any) -> Row:
    empty = {"expert": None, "other": None, "variant": "", "at": None, "unit": "fraction", "elements": 36864}
    return {"analysis": analysis, "measure": measure, "value": float(value), "layer": place[0], "role": place[1], **empty, **more}


def _single(expert: str, places: list[tuple[int | None, str]], layers: int, rng: np.random.Generator) -> Iterator[Row]:
    for place in places:
        layer, role = place
        ends = 0.0 if layer is None else abs(2 * layer / max(layers - 1, 1) - 1)
        density = (
            0.4 if role == "all" else 0.15 + 0.35 * ends * (role in {"q", "k"}) + 0.6 * (role == "embed") + 0.1 * rng.random()
        )
        for variant, value in (("curvature", density), ("magnitude", 0.4 if role == "all" else 0.25 + 0.2 * rng.random())):
            yield _row("localisation", "density", value, place, expert=expert, variant=variant)
            for measure in ("rows", "columns"):
                yield _row(
                    "sparsity", f"empty_{measure}", 0.1 * rng.random(), place, expert=expert, variant=variant, elements=512
                )
                if role != "norm":
                    kept = rng.beta(0.7, 1.5, 512) if variant == "curvature" else rng.beta(4, 6, 512)
                    for at, count in zip(np.arange(20) / 20, np.histogram(kept, 20, (0, 1))[0], strict=True):
                        yield _row(
                            "sparsity", measure, count, place, expert=expert, variant=variant, at=at, unit="count", elements=512
                        )
        yield _row("task_vector", "norm", 1 + rng.random() + 2 * ends, place, expert=expert, unit="norm")
        yield _row("task_vector", "relative_norm", 0.02 + 0.03 * rng.random() + 0.03 * ends, place, expert=expert)
        for variant, size in COMPRESSIONS.items():
            lost = {"none": 0.0, "log8": 0.01, "rank_k": 0.2, "rank1": 0.4}[variant] * (0.8 + 0.4 * rng.random())
            measured = {"sqrt_error": lost, "mask_jaccard": 1 - lost, "saliency_spearman": 1 - lost / 2}
            for measure, value in measured.items():
                at = DENSITY if measure == "mask_jaccard" else None
                yield _row("compression", measure, value, place, expert=expert, variant=variant, at=at)
            yield _row("compression", "bytes_per_param", size, place, expert=expert, variant=variant, unit="bytes/parameter")


def _pair(one: str, two: str, places: list[tuple[int | None, str]], rng: np.random.Generator) -> Iterator[Row]:
    for place in places:
        named = {"expert": one, "other": two}
        for measure, least in (("cosine_sqrt_v", 0.7), ("spearman", 0.5), ("jaccard", 0.2)):
            at = DENSITY if measure == "jaccard" else None
            yield _row("curvature_overlap", measure, least + 0.25 * rng.random(), place, at=at, **named)
        yield _row("task_vector", "cosine", 0.3 * rng.random() - 0.1, place, **named, unit="")
        yield _row("task_vector", "sign_conflict", 0.4 + 0.15 * rng.random(), place, **named)


def score_rows(experts: Sequence[str] = EXPERTS, merges: Sequence[str] = ("ota rho=0.40 rank1",), seed: int = 1) -> list[Row]:
    """A table of scores as the merge flow makes it: base, experts, merges."""
    rng = np.random.default_rng(seed)
    models = [("base", "base", None), *((name, "expert", name) for name in experts), *((name, "merge", None) for name in merges)]
    rows = []
    for model, role, own in models:
        level = {"base": 0.15, "expert": 0.2, "merge": 0.6}[role]
        scores = {name: float(level + 0.2 * rng.random() + 0.5 * (name == own)) for name in experts}
        errors = {f"{name}_stderr": float(0.01 + 0.02 * rng.random()) for name in experts}
        row: Row = {"model": model, "role": role, "capability": own, **scores, **errors}
        average = {"average": float(np.mean(list(scores.values()))), "average_stderr": mean_error(list(errors.values()))}
        rows.append({**row, **average, "retention": 0.8 if role == "merge" else None})
    return rows
