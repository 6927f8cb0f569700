"""One name for each tensor of a merge: checkpoints of one model may differ in names, as transformers' versions and tools write them.

The output has the names of the model whose configuration it takes. Names of the others are found, in this order: as they are; with or without
the base model's prefix; by the parameters that the tensors become when transformers loads them (given from outside, and asked for only then).
By these parameters, tensors that one checkpoint stacks or fuses and another holds apart are made of each other, row by row as they are read.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ota_core.errors import OtaError
from ota_core.files.architecture import architecture_of, is_buffer
from ota_core.files.checkpoint import Checkpoint
from ota_core.files.layouts.relaid import RelaidWeights
from ota_core.files.layouts.relayout import Relayout, gone, relayout
from ota_core.files.layouts.stored import Loaded, whole
from ota_core.plan.vocabulary.match import tied_tensors

ParametersOf = Callable[[], Loaded]
"""What a checkpoint's tensors become when transformers loads it. Raises OtaError where that cannot be told."""


@dataclass(kw_only=True)
class Agreed:
    """What making the names agree came to."""

    renamed: list[dict[str, str]]
    """For each model, name of the tensor in its folder to the output's name, where these differ: its second moments go the same way."""
    relaid: list[Relayout | None]
    """For each model, how tensors of the output's layout are made of its own, where it stacks or fuses others; ``renamed`` comes first."""
    first_alone: frozenset[str] = frozenset()
    """Tensors that only the output's model needs to hold, and that are copied from it: transformers leaves them aside on loading."""
    notes: list[str] = field(default_factory=list)


def agree(
    names: Sequence[str], checkpoints: Sequence[Checkpoint], first: int, parameters: Sequence[ParametersOf | None]
) -> Agreed:
    """Give the tensors of all checkpoints the names of the ``first`` one, and leave buffers aside that not all of them hold.

    What still differs is found by who compares the tensors. names: of the models.
    """
    agreed = Agreed(renamed=[{} for _ in checkpoints], relaid=[None for _ in checkpoints])
    _without_buffers(names, checkpoints, agreed)
    known = architecture_of(checkpoints[first].config)
    for i, checkpoint in enumerate(checkpoints):
        if i == first:
            continue
        by_prefix = _by_prefix(known.prefix, _own(checkpoint), _own(checkpoints[first]))
        if by_prefix:
            _rename(i, checkpoint, by_prefix, agreed)
            agreed.notes.append(f"{names[i]}: its names and those of {names[first]} differ by the prefix '{known.prefix}.' alone")
    unlike = [i for i, one in enumerate(checkpoints) if _own(one) != _own(checkpoints[first])]
    if unlike and parameters[first] is not None:
        _by_parameters(names, checkpoints, first, unlike, parameters, agreed)
    held = [set(one.names()) for one in checkpoints]
    everywhere = set.intersection(*held)
    agreed.first_alone = frozenset(name for name in held[first] - everywhere if known.leaves_aside(name))
    for i, checkpoint in enumerate(checkpoints):
        extra = {name for name in held[i] - held[first] if known.leaves_aside(name)} if i != first else set()
        if extra:
            checkpoint.leave_aside(extra)
            agreed.notes.append(
                f"{names[i]}: {_some(extra)} left out, which transformers does not load and {names[first]} does not hold"
            )
    if agreed.first_alone:
        agreed.notes.append(
            f"{_some(agreed.first_alone)} copied from {names[first]}: transformers does not load them, and not all models hold them"
        )
    return agreed


def _without_buffers(names: Sequence[str], checkpoints: Sequence[Checkpoint], agreed: Agreed) -> None:
    held = [{name for name in one.names() if is_buffer(name, len(one.info(name).shape))} for one in checkpoints]
    everywhere = set.intersection(*held)
    for name, checkpoint, buffers in zip(names, checkpoints, held, strict=True):
        if left := buffers - everywhere:
            checkpoint.leave_aside(left)
            agreed.notes.append(f"{name}: {_some(left)} left out, which models compute themselves and not all of these store")


def _own(checkpoint: Checkpoint) -> set[str]:
    """Names of what is stored once: without aliases of what is stored, too."""
    return set(checkpoint.names()) - tied_tensors(checkpoint).keys()


def _by_prefix(prefix: str, own: Collection[str], wanted: Collection[str]) -> dict[str, str]:
    """Renamings that add the base model's prefix, or take it away, to names that are wanted so. Nothing where the names agree."""
    if not prefix or own == wanted:
        return {}
    front = f"{prefix}."
    longer = {name: front + name for name in own if name not in wanted and front + name in wanted}
    shorter = {
        n: n.removeprefix(front) for n in own if n not in wanted and n.startswith(front) and n.removeprefix(front) in wanted
    }
    return longer or shorter


def _by_parameters(
    names: Sequence[str], checkpoints: Sequence[Checkpoint], first: int, unlike: Sequence[int],
    parameters: Sequence[ParametersOf | None], agreed: Agreed,
) -> None:  # fmt: skip
    """Rename by the parameters that tensors become; of a model for which nobody knows these, nothing."""
    wanted = _told(names[first], parameters[first], agreed)
    if wanted is None:
        return
    target = _at_parameters(checkpoints[first], wanted.own)
    for i in unlike:
        loaded = _told(names[i], parameters[i], agreed)
        if loaded is None:
            continue
        found = _at_parameters(checkpoints[i], loaded.own)
        before = {new: old for old, new in agreed.renamed[i].items()}
        moved = {tensor: target[name] for name, tensor in found.items() if name in target}
        moved = {new: name for new, name in ((_now(before, t), n) for t, n in moved.items()) if new != name}
        held = set(checkpoints[i].names())
        moved = {old: new for old, new in moved.items() if old in held and new not in held - moved.keys()}
        if moved:
            _rename(i, checkpoints[i], moved, agreed)
            agreed.notes.append(
                f"{names[i]}: {len(moved)} tensors are the same parameters as in {names[first]} under other names ({_some(moved)})"
            )
        _lay_out(i, names, checkpoints, first, wanted, loaded, agreed)
        now = agreed.renamed[i]
        beside = {now.get(t, t) for t in loaded.beside} & set(checkpoints[i].names()) - set(checkpoints[first].names())
        # Of a model that lacks tensors they may be these, under a name that nobody knows.
        if beside and _own(checkpoints[first]) <= set(checkpoints[i].names()):
            checkpoints[i].leave_aside(beside)
            agreed.notes.append(
                f"{names[i]}: {_some(beside)} left out: transformers loads {names[i]} without them, as its class has no such modules"
            )


def _told(name: str, parameters: ParametersOf | None, agreed: Agreed) -> Loaded | None:
    try:
        return None if parameters is None else parameters()
    except OtaError as error:
        agreed.notes.append(f"{name}: names could not be compared by what transformers makes of them ({error})")
        return None


def _lay_out(
    model: int,
    names: Sequence[str],
    checkpoints: Sequence[Checkpoint],
    first: int,
    wanted: Loaded,
    loaded: Loaded,
    agreed: Agreed,
) -> None:
    """Make the tensors of the first checkpoint that a model lacks of those that it has instead: stacks of experts, fused matrices."""
    checkpoint, theirs = checkpoints[model], _own(checkpoints[first])
    lacking = theirs - set(checkpoint.names())
    made = {name: one for name, one in wanted.made.items() if name in lacking}
    made |= {t: whole(p, wanted.shapes[p]) for t, p in wanted.own.items() if t in lacking}
    made = {
        name: one for name, one in made.items()
        if all(wanted.shapes[view.parameter] == loaded.shapes.get(view.parameter) for view in one.views)
    }  # fmt: skip
    now = agreed.renamed[model]
    loaded = Loaded(
        {now.get(t, t): p for t, p in loaded.own.items()}, {now.get(t, t): p for t, p in loaded.made.items()}, loaded.shapes
    )
    layout = relayout(made, loaded, {name: tuple(checkpoint.info(name).shape) for name in checkpoint.names()})
    if layout is None:
        return
    left = gone(layout, theirs)
    checkpoint.replace(left, RelaidWeights(checkpoint.as_it_is(), layout))
    agreed.relaid[model] = layout
    agreed.notes.append(
        f"{names[model]}: {len(left)} tensors ({_some(left)}) are read in the layout of {names[first]}, as {_some(layout.made)}: transformers makes "
        "the same parameters of both"
    )


def _at_parameters(checkpoint: Checkpoint, told: Mapping[str, str]) -> dict[str, str]:
    """Parameter to the tensor that it is, aliases of other tensors left out."""
    tied = tied_tensors(checkpoint)
    return {parameter: tensor for tensor, parameter in told.items() if tensor not in tied}


def _now(before: Mapping[str, str], tensor: str) -> str:
    """The name by which a tensor is known now."""
    return next((new for new, old in before.items() if old == tensor), tensor)


def _rename(model: int, checkpoint: Checkpoint, names: Mapping[str, str], agreed: Agreed) -> None:
    checkpoint.rename(names)
    before = agreed.renamed[model]
    was = {new: old for old, new in before.items()}
    before.update({was.get(present, present): new for present, new in names.items()})


def only_prefix(own: Collection[str], wanted: Collection[str]) -> str | None:
    """How two sets of names differ, in words, where a prefix is all, ``{}`` for the owner of ``wanted``; None where more differs."""
    sides = (
        (own, wanted, "its names have the prefix '%s', those of {} do not"),
        (wanted, own, "those of {} have the prefix '%s', its names do not"),
    )
    for longer, shorter, said in sides:
        parts = next(iter(longer), "").split(".")
        for n in range(1, len(parts)):
            prefix = ".".join(parts[:n]) + "."
            if all(name.startswith(prefix) for name in longer) and {name.removeprefix(prefix) for name in longer} == set(shorter):
                return "the same names but for a prefix: " + said % prefix
    return None


def _some(names: Collection[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:2]) + (f" and {len(ordered) - 2} more" if len(ordered) > 2 else "")
