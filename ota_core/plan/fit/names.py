"""One name for each tensor of a merge: checkpoints of one model may differ in names, as transformers' versions and tools write them.

The output has the names of the model whose configuration it takes. Names of the others are found, in this order: as they are; with or without
the base model's prefix; by the parameters that the tensors become when transformers loads them (given from outside, and asked for only then).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from ota_core.errors import OtaError
from ota_core.files.architecture import architecture_of, is_buffer
from ota_core.files.checkpoint import Checkpoint
from ota_core.plan.vocabulary.match import tied_tensors

ParametersOf = Callable[[], Mapping[str, str]]
"""Tensor of a checkpoint to the parameter that it becomes when transformers loads it. Raises OtaError where that cannot be told."""


@dataclass(kw_only=True)
class Agreed:
    """What making the names agree came to."""

    renamed: list[dict[str, str]]
    """For each model, name of the tensor in its folder to the output's name, where these differ: its second moments go the same way."""
    first_alone: frozenset[str] = frozenset()
    """Tensors that only the output's model needs to hold, and that are copied from it: transformers leaves them aside on loading."""
    notes: list[str] = field(default_factory=list)


def agree(
    names: Sequence[str], checkpoints: Sequence[Checkpoint], first: int, parameters: Sequence[ParametersOf | None]
) -> Agreed:
    """Give the tensors of all checkpoints the names of the ``first`` one, and leave buffers aside that not all of them hold.

    What still differs is found by who compares the tensors. names: of the models.
    """
    agreed = Agreed(renamed=[{} for _ in checkpoints])
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
    try:
        told = parameters[first]
        target = {} if told is None else _at_parameters(checkpoints[first], told())
    except OtaError as error:
        agreed.notes.append(f"{names[first]}: names could not be compared by what transformers makes of them ({error})")
        return
    for i in unlike:
        try:
            told = parameters[i]
            found = {} if told is None else _at_parameters(checkpoints[i], told())
        except OtaError as error:
            agreed.notes.append(f"{names[i]}: names could not be compared by what transformers makes of them ({error})")
            continue
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
