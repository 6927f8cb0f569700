"""Names for the numbered parameters of an optimizer, through the model's parameter layout, without guessing."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ota_core.errors import MomentsError
from ota_core.moments.base import ParameterLayout

Shape = tuple[int, ...]
# A function builds the layout when, and only when, numbers have to be matched.
Layout = ParameterLayout | Callable[[], ParameterLayout] | None
ADVICE = (
    "Check that config.json is the one of this training run (layers, vocabulary, tied embeddings), or save the second moments by "
    "name as exp_avg_sq.safetensors"
)
SHOWN = 8


def match_names(
    path: Path, groups: Sequence[Mapping[str, Any]], shapes: Mapping[int, Shape], layout: ParameterLayout
) -> dict[int, str]:
    """Number to name for every parameter that has state.

    groups: ``param_groups``; one group holds the model's parameters in their order, two hold the decayed ones, then the rest.
    shapes: number to shape of v; parameters without state are missing here and only take up their place.
    Frozen parameters are missing from the groups: that is accepted when the shapes leave exactly one way to place the others.
    Raises MomentsError that lists what differs.
    """
    expected = _expected_groups(path, groups, layout)
    names: dict[int, str] = {}
    problems: list[str] = []
    for number, (group, candidates) in enumerate(zip(groups, expected, strict=True)):
        keys = list(group["params"])
        wanted = [shapes.get(key) for key in keys]
        held = [tuple(layout.shapes[name]) for name in candidates]
        if len(keys) == len(candidates):
            problems += [
                f"parameter {key} (group {number}) has the shape {list(shape)}, {name} has {list(own)}"
                for key, shape, name, own in zip(keys, wanted, candidates, held, strict=True)
                if shape is not None and shape != own
            ]
            names |= {key: name for key, name in zip(keys, candidates, strict=True) if key in shapes}
            continue
        count = f"group {number} holds {len(keys)} parameters, the model has {len(candidates)} for it"
        first, last = _place(wanted, held), _place(wanted[::-1], held[::-1])
        if first is None or last is None:
            problems.append(f"{count}, and their shapes do not fit in that order")
            continue
        last = [len(held) - 1 - place for place in reversed(last)]
        unclear = [i for i, key in enumerate(keys) if key in shapes and first[i] != last[i]]
        if unclear:
            i = unclear[0]
            problems.append(f"{count}; parameter {keys[i]} may be {candidates[first[i]]} or {candidates[last[i]]}, by its shape")
        names |= {key: candidates[place] for key, place in zip(keys, first, strict=True) if key in shapes}
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise MomentsError(f"{path} does not fit the model's parameters: {'; '.join(problems[:SHOWN] + more)}. {ADVICE}")
    return names


def _expected_groups(path: Path, groups: Sequence[Mapping[str, Any]], layout: ParameterLayout) -> list[list[str]]:
    """The names that belong into each group, in order."""
    if len(groups) == 1:
        return [list(layout.shapes)]
    if len(groups) != 2:
        raise MomentsError(f"{path} has {len(groups)} parameter groups; one, or the Trainer's two, were expected. {ADVICE}")
    if groups[0].get("weight_decay") == 0 and groups[1].get("weight_decay", 0) != 0:
        raise MomentsError(
            f"{path}: the first group has weight decay 0 and the second {groups[1]['weight_decay']}; the Trainer puts the "
            f"decayed parameters first, so another program grouped these. {ADVICE}"
        )
    return [[n for n in layout.shapes if n in layout.decayed], [n for n in layout.shapes if n not in layout.decayed]]


def _place(wanted: Sequence[Shape | None], held: Sequence[Shape]) -> list[int] | None:
    """The leftmost places in ``held`` that take ``wanted`` in order (None takes any shape), or None when there are none.

    Every possible placing lies between the leftmost and the rightmost one, element by element: where those agree, it is unique.
    """
    places: list[int] = []
    place = 0
    for shape in wanted:
        while place < len(held) and shape is not None and held[place] != shape:
            place += 1
        if place == len(held):
            return None
        places.append(place)
        place += 1
    return places
