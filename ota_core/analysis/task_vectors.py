"""Task vectors Δ = θ − θ₀: how long they are, how alike, and how often two of them pull in opposite directions (docs/methods.md section 6)."""

import math
from collections.abc import Iterator
from threading import Lock

import numpy as np

from ota_core.analysis.kernels import count_conflicts
from ota_core.analysis.pieces import named_pairs, pieces, stacked
from ota_core.analysis.subject import Subject
from ota_core.analysis.table import Row, row
from ota_core.compute.exact import PairDots
from ota_core.errors import CheckpointError
from ota_core.plan.roles import Place, totals
from ota_core.plan.scoring import delta
from ota_core.plan.views import Block, block_elements


def task_vectors(subject: Subject) -> Iterator[Row]:
    """Rows of ``task_vector``: norms of every expert, cosines and sign conflicts of every pair; by cell, layer and whole."""
    plan = subject.plan
    if plan.base is None:
        return
    experts = len(plan.experts)
    places = list(dict.fromkeys(place for job in subject.jobs for place in totals(subject.places[job.name])))
    sums = {place: PairDots(1 + experts) for place in places}
    both = {place: np.zeros((experts, experts), np.int64) for place in places}
    opposite = {place: np.zeros((experts, experts), np.int64) for place in places}
    elements = dict.fromkeys(places, 0)
    for job in subject.jobs:
        for place in totals(subject.places[job.name]):
            elements[place] += job.elements
    lock = Lock()

    def work(block: Block) -> None:
        local = PairDots(1 + experts)
        moved, apart = np.zeros((experts, experts), np.int64), np.zeros((experts, experts), np.int64)
        for piece in pieces(subject, block):
            assert plan.base is not None
            base = plan.base.theta(piece[0].name, *piece[1:])
            rows = stacked([base, *(delta(plan, expert, *piece, base=base) for expert in plan.experts)])
            if not local.add_rows(rows):
                _refuse(subject, piece)
            count_conflicts(rows[1:].reshape(experts, -1), moved, apart)
        for place in totals(subject.places[block[0].name]):
            sums[place].add(local)
            with lock:
                both[place] += moved
                opposite[place] += apart

    plan.stream.map(work, plan.blocks(subject.jobs), what="task vectors", size=block_elements, ahead=plan.prefetch)
    names = [expert.name for expert in plan.experts]
    for place in places:
        yield from _norms(names, place, sums[place], elements[place])
        for a, b, one, other in named_pairs(names):
            cosine = sums[place].cosine(1 + a, 1 + b)
            yield row("task_vector", one, place, "cosine", cosine, elements[place], other=other)
            moved, apart = int(both[place][a, b]), int(opposite[place][a, b])
            conflict = apart / moved if moved else math.nan
            yield row("task_vector", one, place, "sign_conflict", conflict, moved, other=other)


def _norms(names: list[str], place: Place, sums: PairDots, elements: int) -> Iterator[Row]:
    base = math.sqrt(sums.get(0, 0))
    for i, name in enumerate(names, 1):
        norm = math.sqrt(sums.get(i, i))
        yield row("task_vector", name, place, "norm", norm, elements)
        yield row("task_vector", name, place, "relative_norm", norm / base if base else math.nan, elements)


def _refuse(subject: Subject, piece: Block) -> None:
    """Raise the error that names the model whose weights are not finite."""
    job, start, stop = piece
    for model in subject.plan.models:
        if not bool(model.theta(job.name, start, stop).isfinite().all()):
            raise CheckpointError(
                f"{model.checkpoint.path} ({model.name}): rows {start} to {stop - 1} of tensor '{job.name}' hold a NaN or infinite weight; "
                "expected finite weights: was the checkpoint saved after a training that diverged?"
            )
    raise CheckpointError(f"tensor '{job.name}': weights so large that their squares do not add up in float64")
