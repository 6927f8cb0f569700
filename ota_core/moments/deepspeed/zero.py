"""ZeRO stages 1 to 3: every rank holds a part of the flattened parameters, in order.

Stages 1 and 2: the parameters of a group follow one another in one vector, which is cut into as many equal parts as there are
ranks; zeros fill it up. Stage 3: every parameter is cut on its own, in parts of ceil(n / ranks), the last filled up with zeros; a
rank's parts follow one another over all groups, whose borders may lie within a part.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ota_core.errors import MomentsError, raise_all
from ota_core.files.byte_source import SourceOf
from ota_core.files.pickled.torch_file import TorchFile
from ota_core.files.pickled.unpickle import SavedTensor
from ota_core.moments.deepspeed.saved import (
    V,
    beta2_of,
    beta2_set,
    count,
    flat,
    mapping,
    open_saved,
    shapes_of,
    stage_of,
    step_of,
)
from ota_core.moments.pieces import PiecedMoments, Run, check_places

Shape = tuple[int, ...]


class ZeroMoments(PiecedMoments):
    """v by parameter name from the files of all ranks."""

    def __init__(self, folder: Path, ranks: Sequence[Path], model: Path, source_of: SourceOf | None) -> None:
        """Raises MomentsError for a missing rank, a damaged file, parts that do not fit the parameters, padding that is not zero."""
        files: list[TorchFile] = []
        try:
            groups = _group_shapes(model, source_of)
            files += [open_saved(path, source_of) for path in ranks]
            parts = [_Rank(file) for file in files]
            _check_world(folder, parts)
            runs = _cut_whole(parts, groups) if parts[0].stage == 3 else _cut_groups(parts, groups)
            shapes = {name: shape for group in groups for name, shape in group.items()}
            step = {part.step for part in parts}
            if len(step) > 1:
                raise MomentsError(
                    f"{folder}: the ranks' files are of different steps ({sorted(map(str, step))}): fetch them again"
                )
            steps = dict.fromkeys(shapes, step.pop())
            super().__init__(folder, files, runs, shapes, steps, parts[0].beta2)
        except BaseException:
            for file in files:
                file.close()
            raise


class _Rank:
    """What one rank's file holds: v of its part, per group."""

    def __init__(self, file: TorchFile) -> None:
        self.file = file
        where = str(file.path)
        saved = mapping(mapping(file.saved, where).get("optimizer_state_dict"), f"{where}: optimizer_state_dict")
        self.stage = stage_of(saved.get("zero_stage"))
        self.world = saved.get("partition_count")
        base = saved.get("base_optimizer_state", saved.get("optimizer_state_dict"))
        # Elastic checkpoints hold a list with a state per group, others the state_dict of the optimizer that ZeRO wraps.
        states: Any = base if isinstance(base, list) else _numbered(base, where)
        self.v = [flat(state, f"{where}: group {number}") for number, state in enumerate(states)]
        check_places(file, self.v)
        # Where an optimizer wants its parameters aligned, each is followed by this many zeros; newer files say so.
        self.gaps: Any = saved.get("param_alignment_paddings")
        groups = base.get("param_groups") if isinstance(base, dict) else None
        # Elastic checkpoints keep no groups; where DeepSpeed itself made the optimizer, its settings have β₂.
        self.beta2 = beta2_of(groups, where) if groups is not None else beta2_set(file.saved.get("ds_config"), where)
        self.step = step_of(
            file, *(state.get("step") for state in states), *(group.get("step") for group in groups or ()),
            saved.get("base_optimizer_state_step"),
        )  # fmt: skip


def _numbered(base: Any, where: str) -> list[Any]:
    state = mapping(mapping(base, f"{where}: the optimizer's state").get("state"), f"{where}: state")
    if sorted(state) != list(range(len(state))) or not state:
        raise MomentsError(
            f"{where} holds states under {sorted(map(str, state))[:8]}; one per group was expected, numbered from 0"
        )
    return [state[number] for number in range(len(state))]


def _group_shapes(model: Path, source_of: SourceOf | None) -> list[dict[str, Shape]]:
    """Per group the names and shapes of the trained parameters, in order."""
    file = open_saved(model, source_of)
    try:
        value = mapping(file.saved, str(model)).get("param_shapes")
    finally:
        file.close()
    if not isinstance(value, list) or not value:
        raise MomentsError(
            f"{model} holds no param_shapes, which name the parameters: save the checkpoint with DeepSpeed 0.4 or newer"
        )
    return [shapes_of(group, f"{model}: param_shapes") for group in value]


def _check_world(folder: Path, parts: Sequence[_Rank]) -> None:
    """As many files as there were ranks, all of one stage."""
    problems = []
    for part in parts:
        world = part.world if isinstance(part.world, list) else [part.world]
        if len(set(world)) > 1:
            raise MomentsError(
                f"{part.file.path}: the groups are cut into different numbers of parts ({world}), as experts of a mixture of experts "
                "are. Convert the checkpoint with DeepSpeed's ds_to_universal.py, its result is read"
            )
        if world and type(world[0]) is int and world[0] != len(parts):
            problems.append(
                f"{part.file.path} is of a run with {world[0]} ranks, {folder} holds the files of {len(parts)}: fetch the files of all "
                "ranks, of this run alone"
            )
        if (part.stage == 3) != (parts[0].stage == 3) or len(part.v) != len(parts[0].v):
            problems.append(f"{part.file.path} is of another run than {parts[0].file.path}: its stage or its groups differ")
    raise_all(problems[:1], MomentsError)


def _cut_groups(parts: Sequence[_Rank], groups: Sequence[Mapping[str, Shape]]) -> dict[str, list[Run]]:
    """Stages 1 and 2: join the ranks of each group, cut what is joined by the shapes."""
    if len(parts[0].v) != len(groups):
        raise MomentsError(f"{parts[0].file.path} holds {len(parts[0].v)} groups, the parameters come in {len(groups)}: {_OTHER}")
    runs: dict[str, list[Run]] = {}
    for number, shapes in enumerate(groups):
        held = [(part.file, part.v[number]) for part in parts]
        gaps = parts[0].gaps[number] if parts[0].gaps else [0] * len(shapes)
        start = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            runs[name] = _joined(held, start, start + count(shape))
            start += count(shape)
            _check_padding(_joined(held, start, start + gap), f"the end of {name!r}")
            start += gap
        have = sum(tensor.numel for _, tensor in held)
        if have < start:
            raise MomentsError(
                f"{parts[0].file.path} and its other ranks hold {have} numbers for group {number}, its parameters have {start}: {_OTHER}"
            )
        _check_padding(_joined(held, start, have), f"the end of group {number}")
    return runs


_OTHER = "the files are of different runs, or one was written only in part. Fetch the checkpoint again"


def _joined(held: Sequence[tuple[TorchFile, SavedTensor]], start: int, stop: int) -> list[Run]:
    """Elements start:stop of these vectors, one behind the other."""
    runs, first = [], 0
    for file, tensor in held:
        low, high = max(start, first), min(stop, first + tensor.numel)
        if low < high:
            runs.append(Run(file, tensor, low - first, high - first))
        first += tensor.numel
    return runs


def _cut_whole(parts: Sequence[_Rank], groups: Sequence[Mapping[str, Shape]]) -> dict[str, list[Run]]:
    """Stage 3: join every parameter's parts over the ranks."""
    shapes = {name: shape for group in groups for name, shape in group.items()}
    world = len(parts)
    needed = sum(-(-count(shape) // world) for shape in shapes.values())
    for part in parts:
        have = sum(tensor.numel for tensor in part.v)
        if have != needed:
            raise MomentsError(
                f"{part.file.path} holds {have} numbers of {V}, its parts of the parameters have {needed}: {_OTHER}"
            )
    runs: dict[str, list[Run]] = {}
    start = 0
    for name, shape in shapes.items():
        size = -(-count(shape) // world)
        runs[name], left = [], count(shape)
        for part in parts:
            held = [(part.file, tensor) for tensor in part.v]
            used = min(size, left)
            runs[name] += _joined(held, start, start + used)
            _check_padding(_joined(held, start + used, start + size), f"the end of {name!r}")
            left -= used
        start += size
    return runs


def _check_padding(runs: Sequence[Run], where: str) -> None:
    """What fills up the parts must be zero: otherwise the parameters are not where they are looked for."""
    for run in runs:
        if np.count_nonzero(run.read(0, len(run))):
            raise MomentsError(
                f"{run.file.path}: the {len(run)} numbers at {where} are padding and were expected to be zero; they are not, so names and "
                "shapes in the checkpoint do not fit its optimizer states. Fetch it again"
            )
