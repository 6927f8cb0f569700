"""Results of a study made by hand, without merging anything: every cell's scores from one function of its label and replicate."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tasks.evaluation.scores import CapabilityScore, ModelScores
from tasks.experiments.study.scores import CellResult, StudyResults
from tasks.experiments.study.study import StudyConfig

CAPABILITIES = ("math", "code")
Values = Mapping[str, float | None]
Read = Mapping[str, Mapping[str, tuple[float, int]]]
"""Capability to document to (log-likelihood, bytes)."""


def scores(
    values: Values, stderr: float | None = 0.01, losses: Mapping[str, float] | None = None, read: Read | None = None
) -> ModelScores:
    """``read``: the documents that the losses are then computed from."""
    read = read or {}
    losses = {name: bits_per_byte(documents.values()) for name, documents in read.items()} | dict(losses or {})
    found = {
        name: CapabilityScore(score=value, stderr=None if value is None else stderr, n_samples=100, tasks={})
        for name, value in values.items()
    }
    return ModelScores(
        suite="tiny", suite_digest="d", capabilities=found, samples={}, limit=None, lm_eval_version="0", seconds=1.0,
        losses=losses, loss_stderr=dict.fromkeys(losses, 0.02), loss_samples={name: dict(documents) for name, documents in read.items()},
    )  # fmt: skip


def bits_per_byte(documents: Iterable[tuple[float, int]]) -> float:
    nats, sizes = zip(*documents, strict=True)
    return -sum(nats) / math.log(2) / sum(sizes)


def config(*grid: dict[str, Any], replicates: int = 2, **changes: Any) -> StudyConfig:
    raw = {
        "name": "byhand", "base_model": "base{seed}", "suite": "tiny", "replicates": {"seed": list(range(1, replicates + 1))},
        "models": [{"model": f"{name}{{seed}}", "capability": name} for name in CAPABILITIES], "grid": list(grid),
    }  # fmt: skip
    return StudyConfig.model_validate(raw | changes)


def study(
    *grid: dict[str, Any],
    of: Callable[[str, int], Values],
    base: Callable[[int], Values] = lambda number: {"math": 0.1, "code": 0.3},
    alone: Callable[[str, int], Values] = lambda name, number: {"math": 0.0, "code": 0.0} | {name: 0.8},
    replicates: int = 2,
    stderr: float | None = 0.01,
    cost: Callable[[str], dict[str, Any]] = lambda label: {},
    loss: Callable[[str, int], Mapping[str, float]] = lambda label, number: {},
    read: Callable[[str, int], Read] = lambda label, number: {},
    **changes: Any,
) -> StudyResults:
    """``of``: the scores of a cell's label on the replicate with a number from 0; ``loss``: the losses of a cell, an expert or ``base``, or
    ``read``: the documents that they are of."""
    made = config(*grid, replicates=replicates, **changes)

    def one(values: Values, label: str, number: int) -> ModelScores:
        return scores(values, stderr, loss(label, number), read(label, number))

    names, cells = [one.name for one in made.all_replicates()], made.cells()
    return StudyResults(
        name=made.name, suite="tiny", experts=dict(zip(made.experts(), (model.capability for model in made.models), strict=True)), replicates=tuple(names),
        base={name: one(base(i), "base", i) for i, name in enumerate(names)},
        alone={name: {expert: one(alone(expert, i), expert, i) for expert in made.experts()} for i, name in enumerate(names)},
        cells=cells,
        results=tuple(
            CellResult(label=cell.label, replicate=name, scores=one(of(cell.label, i), cell.label, i), **cost(cell.label))
            for i, name in enumerate(names) for cell in cells
        ),
    )  # fmt: skip
