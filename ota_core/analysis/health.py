"""Whether an expert can be merged at all: one pass over its weights and second moments, which reports everything that is wrong."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ota_core.compute.blocks import matrix_shape, row_blocks
from ota_core.compute.loops import compiled
from ota_core.compute.stream import Stream
from ota_core.files.checkpoint import Checkpoint, adapter_of
from ota_core.files.rows import F64, Rows
from ota_core.fused.finite import kinds_not_finite
from ota_core.moments import Moments, none_found
from ota_core.plan.inputs import ExpertInput, MergeInputs, ModelInput
from ota_core.plan.plan import checkpoint_problems
from ota_core.plan.vocabulary.match import tied_tensors
from ota_core.recipe.recipe import MergeRecipe

SHOWN = 4
"""Tensors that one problem names."""
_AGAIN = "training diverged or the file is damaged: take an earlier checkpoint, or save this one again"


@compiled
def _count_no_moment(bits: NDArray[np.uint32]) -> int:
    """How many float32 are no finite number of at least 0: patterns from infinity on, but that of −0."""
    count = 0
    for value in bits:
        count += (value >= np.uint32(0x7F800000)) & (value != np.uint32(0x80000000))
    return count


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Rows start:stop of one tensor, to be looked at."""

    name: str
    start: int
    stop: int
    look: Callable[["_Piece"], dict[str, int]]
    """Kind of bad entry to how many there are; nothing where all are good."""
    prefetch: Callable[[str, int, int], None]
    size: int
    """Bytes."""


def check_expert(
    base: Checkpoint,
    expert: Checkpoint,
    moments: Moments | None,
    *,
    stream: Stream,
    needs_moments: bool = False,
    missing_curvature: str = "error",
) -> list[str]:
    """Everything that keeps an expert from being merged over a base, one sentence each; an empty list for a healthy expert.

    Reads every weight and every second moment once, and of the base as much as it takes to see that training changed something.
    Found are: weights that are NaN or infinite; second moments that are NaN, infinite or negative; tensors that are missing, too many, or of
    another shape or kind than the base's; second moments of another shape than their tensors; an expert whose every value is the base's.
    With ``needs_moments`` also second moments that are missing: all of them, or, unless ``missing_curvature`` is ``mean`` as in a recipe,
    those of tensors that training changed. Vocabularies may differ where a tokenizer tells which row is which token.

    ``stream``: threads, memory and block size, none of which changes the findings. What cannot be opened raised before this is called;
    nothing is raised here for what an expert holds.
    """
    scan = _Scan(base, expert, moments, stream, watched=needs_moments and missing_curvature == "error")
    weights, second = scan.run()
    problems = _form(base, expert)
    problems += _some("weights are not finite", weights, _AGAIN)
    problems += _some("second moments are not finite numbers of at least 0", second, _AGAIN)
    problems += _moments_form(expert, moments)
    if moments is None and needs_moments:
        problems.append(f"{none_found(expert.path)}: save them with the checkpoint")
    if scan.same_form and not scan.moved:
        problems.append(
            "every weight equals the base's: training changed nothing, and merging it would only dilute the others; was the base uploaded in "
            "the expert's place?"
        )
    lacking = {name: "" for name in scan.lacking if name in scan.moved}
    return problems + _some("changed in training without second moments", lacking, "give the complete optimizer state")


class _Scan:
    """The pass over all values."""

    def __init__(self, base: Checkpoint, expert: Checkpoint, moments: Moments | None, stream: Stream, watched: bool) -> None:
        """``watched``: whether it matters which tensors without second moments were changed."""
        self._base, self._expert, self._moments, self._stream = base, expert, moments, stream
        names = expert.names_by_place()
        self._floats = [name for name in names if expert.info(name).dtype.is_floating_point]
        self.same_form = {n for n in self._floats if n in base and base.info(n).shape == expert.info(n).shape}
        self.moved: set[str] = {name for name in self._floats if name in base} - self.same_form
        """Tensors that were seen to differ from the base: not all of them, but some where any does, and all of ``lacking``."""
        tied, known = tied_tensors(expert), moments.shapes() if moments else {}
        self.lacking = [n for n in self._floats if watched and moments and n in self.same_form and tied.get(n, n) not in known]

    def run(self) -> tuple[dict[str, str], dict[str, str]]:
        """(Tensor to what is wrong with its weights, tensor to what is wrong with its second moments), only where there is something."""
        stream, expert, moments = self._stream, self._expert, self._moments
        stream.droppable += [self._base.drop_pages, expert.drop_pages]
        shapes = {name: expert.info(name).shape for name in self._floats}
        width = {name: expert.info(name).dtype.itemsize for name in self._floats}
        pieces = [*self._cut(shapes, width, self._look_at_weights, expert.prefetch)]
        count = len(pieces)
        if moments is not None:
            known = moments.shapes()
            pieces += self._cut(known, dict.fromkeys(known, 4), self._look_at_moments, moments.prefetch)
        found = stream.map(
            lambda piece: piece.look(piece), pieces, what="check", size=lambda piece: piece.size,
            ahead=lambda piece: piece.prefetch(piece.name, piece.start, piece.stop),
        )  # fmt: skip
        weights = _summed(pieces[:count], found[:count], shapes)
        return weights, _summed(pieces[count:], found[count:], moments.shapes() if moments else {})

    def _cut(self, shapes: Mapping[str, tuple[int, ...]], width: Mapping[str, int], look: Any, prefetch: Any) -> Iterator[_Piece]:
        for name, shape in shapes.items():
            for start, stop in row_blocks(shape, self._stream.block_elements):
                size = (stop - start) * matrix_shape(shape)[1] * width[name]
                yield _Piece(name=name, start=start, stop=stop, look=look, prefetch=prefetch, size=size)

    def _look_at_weights(self, piece: _Piece) -> dict[str, int]:
        rows = self._expert.read_rows(piece.name, piece.start, piece.stop)
        self._stream.count_read(rows.nbytes)
        if self._matters(piece.name):
            others = self._base.read_rows(piece.name, piece.start, piece.stop)
            self._stream.count_read(others.nbytes)
            if not _equal(rows, others):
                self.moved.add(piece.name)
        return kinds_not_finite(rows)

    def _matters(self, name: str) -> bool:
        """Whether the base's values have to be compared: until the first change is seen, and where second moments are missing."""
        return name in self.same_form and name not in self.moved and (not self.moved or name in self.lacking)

    def _look_at_moments(self, piece: _Piece) -> dict[str, int]:
        assert self._moments is not None
        v = self._moments.read(piece.name, piece.start, piece.stop, check=False)
        self._stream.count_read(v.nbytes)
        if not _count_no_moment(v.reshape(-1).view(np.uint32)):
            return {}
        positive = v == np.inf
        return {"NaN": int(np.isnan(v).sum()), "infinite": int(positive.sum()), "negative": int((v < 0).sum())}


def _equal(one: Rows, other: Rows) -> bool:
    """Whether all values are the same; a NaN equals nothing."""
    if one.dtype == other.dtype and one.dtype.held_itself:
        return np.array_equal(one.held, other.held)
    if F64 in (one.dtype, other.dtype):
        return bool(one.tensor().double().equal(other.tensor().double()))
    return np.array_equal(one.to_float32(), other.to_float32())


def _summed(
    pieces: Sequence[_Piece], found: Sequence[Mapping[str, int]], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    totals: dict[str, dict[str, int]] = {}
    for piece, counts in zip(pieces, found, strict=True):
        for kind, count in counts.items():
            total = totals.setdefault(piece.name, {})
            total[kind] = total.get(kind, 0) + count
    return {name: _counted(counts, shapes[name]) for name, counts in totals.items()}


def _counted(counts: Mapping[str, int], shape: Sequence[int]) -> str:
    rows, cols = matrix_shape(shape)
    return f" ({', '.join(f'{count:,} {kind}' for kind, count in counts.items() if count)} of {rows * cols:,})"


def _some(what: str, tensors: Mapping[str, str], advice: str) -> list[str]:
    """One problem that names the first few tensors; none where there are none."""
    if not tensors:
        return []
    shown = ", ".join(f"'{name}'{detail}" for name, detail in list(tensors.items())[:SHOWN])
    more = f", and {len(tensors) - SHOWN} more tensors" if len(tensors) > SHOWN else ""
    return [f"{what}: {shown}{more}; {advice}"]


def _form(base: Checkpoint, expert: Checkpoint) -> list[str]:
    """Names, shapes and kinds of the tensors, and vocabularies that nothing matches: as a merge finds them, before it reads a value."""
    recipe = MergeRecipe.model_validate(
        {"merge_method": "task_arithmetic", "base_model": str(base.path), "models": [{"model": str(expert.path)}]}
    )
    below = ModelInput(name="base", path=base.path)
    under = below if adapter_of(expert.path) is not None else None
    inputs = MergeInputs(base=below, experts=(ExpertInput(name="expert", path=expert.path, under=under),))
    return checkpoint_problems(recipe, inputs)


def _moments_form(expert: Checkpoint, moments: Moments | None) -> list[str]:
    """Shapes of the second moments against the expert's own tensors."""
    if moments is None:
        return []
    shapes = {name: tuple(shape) for name, shape in moments.shapes().items()}
    held = {name: expert.info(name).shape for name in shapes if name in expert}
    if not held:
        names = ", ".join(sorted(shapes)[:3])
        return [
            f"{moments.path}: none of its names ({names}, …) is a tensor of the model; expected second moments by the model's names"
        ]
    differing = {n: f" ({list(shapes[n])} instead of {list(shape)})" for n, shape in held.items() if shapes[n] != shape}
    return _some("second moments have another shape than their tensors", differing, "do they belong to this checkpoint?")
