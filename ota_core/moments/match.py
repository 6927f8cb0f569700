"""Names for the numbered parameters of an optimizer, through the model's parameter layout, without guessing.

An optimizer numbers its parameters group by group. How trainers build the groups is known (``_rules``); a rule is believed when sizes and
shapes fit, and only when every other rule that fits gives the same names. Parameters that were frozen are in no group: shapes, or the
weights of the base, must leave one way to place the others.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ota_core.errors import MomentsError
from ota_core.moments.base import ParameterLayout, Shape
from ota_core.moments.old_experts import with_single_experts

# A function builds the layout when, and only when, numbers have to be matched.
Layout = ParameterLayout | Callable[[], ParameterLayout] | None
ADVICE = (
    "Check that config.json is the one of this training run (layers, vocabulary, tied embeddings), or save the second moments by "
    "name as exp_avg_sq.safetensors"
)
SHOWN = 8
TRAINER = "the Trainer's rule"
ONE_GROUP = "one group in the model's order"


def match_names(
    path: Path, groups: Sequence[Mapping[str, Any]], shapes: Mapping[int, Shape], layout: ParameterLayout
) -> dict[int, str]:
    """Number to name for every parameter that has state.

    groups: ``param_groups``, one or two, each in the model's order.
    shapes: number to shape of v; parameters without state are missing here and only take up their place.
    Frozen parameters may be missing from the groups. Where the shapes leave several ways to place the others, ``layout.changed`` says
    which parameters must be among them: those that training changed.
    Raises MomentsError that lists what differs, or which names are possible.
    """
    rules = list(_rules(path, groups, layout))
    found = [_fit(rule, groups, shapes, layout, frozenset()) for rule in rules]
    if layout.changed is not None and _unclear(found):
        changed = layout.changed()
        found = [_fit(rule, groups, shapes, layout, changed) for rule in rules]
    fitting = [fit for fit in found if fit.names is not None]
    if not fitting and (named := _older(path, groups, shapes, layout)):
        return named
    if not fitting:
        problems = _worst_first(found)
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise MomentsError(f"{path} does not fit the model's parameters: {'; '.join(problems[:SHOWN] + more)}. {ADVICE}")
    if _unclear(found):
        raise MomentsError(f"{path}: {_what_is_unclear(fitting, layout)}")
    assert fitting[0].names is not None
    return fitting[0].names


def _older(
    path: Path, groups: Sequence[Mapping[str, Any]], shapes: Mapping[int, Shape], layout: ParameterLayout
) -> dict[int, str] | None:
    """The names of a mixture of experts that transformers 4 trained; None where that fits no better."""
    found: list[dict[int, str]] = []
    for older in with_single_experts(layout):
        try:
            names = match_names(path, groups, shapes, older)
        except MomentsError:
            continue  # what does not fit today's model is told instead
        if names not in found:
            found.append(names)
    if len(found) > 1:
        key = next(key for key in found[0] if found[0][key] != found[1][key])
        raise MomentsError(
            f"{path}: parameter {key} may be {found[0][key]} or {found[1][key]}, since transformers 4 had the router before the experts in some "
            "classes and after them in others; save the second moments by name as exp_avg_sq.safetensors"
        )
    return found[0] if found else None


@dataclass(frozen=True)
class _Rule:
    """The names that a trainer puts into each group, in order."""

    title: str
    groups: list[list[str]]


@dataclass(frozen=True)
class _Fit:
    rule: _Rule
    names: dict[int, str] | None
    """None where sizes or shapes do not fit."""
    problems: list[str]
    other: tuple[int, str, str] | None = None
    """A number that may be one name or another."""


def _rules(path: Path, groups: Sequence[Mapping[str, Any]], layout: ParameterLayout) -> Iterator[_Rule]:
    """Today's Trainer first: its problems are told where no rule fits."""
    if len(groups) == 1:
        yield _Rule(ONE_GROUP, [list(layout.shapes)])
        return
    if len(groups) != 2:
        raise MomentsError(f"{path} has {len(groups)} parameter groups; one or two were expected. {ADVICE}")
    decays = [group.get("weight_decay") or 0 for group in groups]
    known = {
        TRAINER: layout.decayed,
        **layout.rules,
        "no decay for names with bias or LayerNorm.weight": _without(layout, "bias", "LayerNorm.weight"),
        "no decay for names with bias or layer_norm.weight": _without(layout, "bias", "layer_norm.weight"),
        "decay for parameters of two and more dimensions": frozenset(n for n, shape in layout.shapes.items() if len(shape) >= 2),
    }
    seen: list[list[list[str]]] = []
    for title, decayed in known.items():
        split = [[n for n in layout.shapes if n in decayed], [n for n in layout.shapes if n not in decayed]]
        for order in ((0, 1), (1, 0)):
            # The weight decay says which group is which, where it differs.
            if (decays[order[0]] != 0) < (decays[order[1]] != 0):
                continue
            ordered = [split[order[0]], split[order[1]]]
            if ordered not in seen:
                seen.append(ordered)
                yield _Rule(title + (", the decayed last" if order[0] else ""), ordered)


def _without(layout: ParameterLayout, *words: str) -> frozenset[str]:
    return frozenset(name for name in layout.shapes if not any(word in name for word in words))


def _fit(
    rule: _Rule,
    groups: Sequence[Mapping[str, Any]],
    shapes: Mapping[int, Shape],
    layout: ParameterLayout,
    trained: Collection[str],
) -> _Fit:
    """Names by one rule. ``trained``: parameters that must be in a group."""
    names: dict[int, str] = {}
    problems: list[str] = []
    other = None
    for number, (group, candidates) in enumerate(zip(groups, rule.groups, strict=True)):
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
        must = [name in trained for name in candidates]
        first, last = _place(wanted, held, must), _place(wanted[::-1], held[::-1], must[::-1])
        if first is None or last is None:
            kept = ", with every parameter that differs from the base's among them" if any(must) else ""
            problems.append(
                f"group {number} holds {len(keys)} parameters, the model has {len(candidates)} for it, and their shapes do not "
                f"fit in that order{kept}"
            )
            continue
        last = [len(held) - 1 - place for place in reversed(last)]
        unclear = [i for i, key in enumerate(keys) if key in shapes and first[i] != last[i]]
        if unclear and other is None:
            other = keys[unclear[0]], candidates[first[unclear[0]]], candidates[last[unclear[0]]]
        names |= {key: candidates[place] for key, place in zip(keys, first, strict=True) if key in shapes}
    return _Fit(rule, None if problems else names, problems, other)


def _unclear(found: Sequence[_Fit]) -> bool:
    """Whether there are several ways: within one rule, or between two."""
    fitting = [fit for fit in found if fit.names is not None]
    return any(fit.other is not None or fit.names != fitting[0].names for fit in fitting)


def _worst_first(found: Sequence[_Fit]) -> list[str]:
    """Why nothing fits: what is wrong by the first rule, and that the others fit no better."""
    return [*found[0].problems, *(["other ways in which trainers group parameters fit no better"] if len(found) > 1 else [])]


def _what_is_unclear(fitting: Sequence[_Fit], layout: ParameterLayout) -> str:
    base = (
        "the weights of the base leave more than one way, too"
        if layout.changed is not None
        else "name the base model (--base, or base_model of the recipe): which parameters were trained then follows from the weights"
    )
    for fit in fitting:
        if fit.other is not None:
            key, one, another = fit.other
            return (
                f"some parameters were frozen, and by its shape parameter {key} may be {one} or {another} ({fit.rule.title}); {base}, or save "
                "the second moments by name as exp_avg_sq.safetensors"
            )
    first = fitting[0].names or {}
    one_more = next(fit for fit in fitting if fit.names != first)
    key = next(key for key, name in first.items() if (one_more.names or {}).get(key) != name)
    return (
        f"the groups fit two rules that give different names: parameter {key} is {first[key]} by “{fitting[0].rule.title}” and "
        f"{(one_more.names or {})[key]} by “{one_more.rule.title}”; save the second moments by name as exp_avg_sq.safetensors"
    )


def _place(wanted: Sequence[Shape | None], held: Sequence[Shape], must: Sequence[bool]) -> list[int] | None:
    """The leftmost places in ``held`` that take ``wanted`` in order (None takes any shape) and leave out no ``must``; None without any.

    Of two such placings the smaller places, element by element, are one again, and so are the larger ones. So every placing lies between
    the leftmost and the rightmost one, and where those agree, it is unique.
    """
    rest = len(held) - len(wanted)  # how many may be skipped in all
    if rest < 0:
        return None
    # after[i][skipped]: whether wanted[i:] can be placed when held[:i + skipped] is used up.
    after = [[False] * (rest + 1) for _ in range(len(wanted) + 1)]
    for i, skipped in product(range(len(wanted), -1, -1), range(rest, -1, -1)):
        j = i + skipped
        if j == len(held):
            after[i][skipped] = i == len(wanted)
            continue
        takes = i < len(wanted) and wanted[i] in (None, held[j]) and after[i + 1][skipped]
        after[i][skipped] = takes or (not must[j] and skipped < rest and after[i][skipped + 1])
    if not after[0][0]:
        return None
    places: list[int] = []
    skipped = 0
    for i, shape in enumerate(wanted):
        while not (shape in (None, held[i + skipped]) and after[i + 1][skipped]):
            skipped += 1
        places.append(i + skipped)
    return places
