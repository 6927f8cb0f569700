"""Sums over pairs of experts by layer × role: how blocks are read in pieces, and where their sums go."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ota_core.analysis.subject import Subject
from ota_core.plan.roles import Place
from ota_core.plan.views import Block, TensorJob, parts

Item = TypeVar("Item")


def by_place(subject: Subject, jobs: Iterable[TensorJob]) -> dict[Place, list[TensorJob]]:
    """Cell of layer × role → its tensors, in the order of the model."""
    cells: dict[Place, list[TensorJob]] = {}
    for job in jobs:
        cells.setdefault(subject.places[job.name], []).append(job)
    return cells


def groups_of(items: Sequence[Item], size: Callable[[Item], int], room: int) -> Iterator[list[Item]]:
    """The items in order, in groups whose sizes add up to at most ``room``; a larger item is a group by itself."""
    group: list[Item] = []
    taken = 0
    for item in items:
        if group and taken + size(item) > room:
            yield group
            group, taken = [], 0
        group.append(item)
        taken += size(item)
    if group:
        yield group


def pieces(subject: Subject, block: Block) -> Iterator[Block]:
    """The block in pieces that stay in the cache."""
    return parts(block, subject.plan.tensor_elements)


def stacked(rows: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    """The same rows of several models in one array: float64 (M, r, C)."""
    return np.stack([one.double().numpy() for one in rows])


def named_pairs(names: Sequence[str]) -> Iterator[tuple[int, int, str, str]]:
    """Every pair of experts once: positions and names, in the recipe's order."""
    for a in range(len(names)):
        for b in range(a + 1, len(names)):
            yield a, b, names[a], names[b]
