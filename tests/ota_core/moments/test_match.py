"""Numbers to names where several ways to group or place parameters fit, on layouts made by hand."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from ota_core.errors import MomentsError
from ota_core.moments import ParameterLayout
from ota_core.moments.match import _place, match_names

FILE = Path("optimizer.pt")


def numbered(*sizes: int, decay: tuple[float, ...] = (0.1, 0.0)) -> list[dict[str, Any]]:
    numbers = itertools.count()
    return [{"params": [next(numbers) for _ in range(size)], "weight_decay": wd} for size, wd in zip(sizes, decay, strict=False)]


def layout_of(shapes: dict[str, tuple[int, ...]], decayed: set[str], **more: Any) -> ParameterLayout:
    return ParameterLayout(shapes=shapes, decayed=frozenset(decayed), **more)


SQUARE = {"a": (2, 2), "b": (2, 2), "norm": (2,)}


def test_rules_that_agree_are_one():
    found = match_names(FILE, numbered(2, 1), {0: (2, 2), 1: (2, 2), 2: (2,)}, layout_of(SQUARE, {"a", "b"}))
    assert found == {0: "a", 1: "b", 2: "norm"}


def test_two_rules_with_different_names_are_an_error_that_says_so():
    shapes = {"a": (2, 2), "b": (2, 2), "c": (2,), "d": (2,)}
    layout = layout_of(shapes, {"a", "b", "d"}, rules={"an older rule": frozenset({"a", "b", "c"})})
    groups, sizes = numbered(3, 1), {0: (2, 2), 1: (2, 2), 2: (2,), 3: (2,)}
    message = r"two rules that give different names: parameter 2 is d by “the Trainer's rule” and c by “an older rule”"
    with pytest.raises(MomentsError, match=message):
        match_names(FILE, groups, sizes, layout)


def test_weight_decay_says_which_group_is_which():
    shapes = {"a": (2,), "b": (2,)}
    for decay, expected in (((0.1, 0.0), ["a", "b"]), ((0.0, 0.1), ["b", "a"])):
        found = match_names(FILE, numbered(1, 1, decay=decay), {0: (2,), 1: (2,)}, layout_of(shapes, {"a"}, rules={}))
        assert [found[0], found[1]] == expected
    with pytest.raises(
        MomentsError, match=r"different names: parameter 0 is a by .* and b by “the Trainer's rule, the decayed last”"
    ):
        match_names(FILE, numbered(1, 1, decay=(0.0, 0.0)), {0: (2,), 1: (2,)}, layout_of(shapes, {"a"}))


def test_parameters_without_state_take_their_place():
    found = match_names(FILE, numbered(3, decay=(0.0,)), {0: (2, 2), 2: (2,)}, layout_of(SQUARE, set()))
    assert found == {0: "a", 2: "norm"}


def test_the_base_is_asked_only_when_it_is_needed():
    def never() -> frozenset[str]:
        raise AssertionError("asked")

    shapes = {0: (2, 2), 1: (2, 2), 2: (2,)}
    assert match_names(FILE, numbered(3, decay=(0.0,)), shapes, layout_of(SQUARE, set(), changed=never))
    layout = layout_of(SQUARE, set(), changed=lambda: frozenset({"b"}))
    assert match_names(FILE, numbered(1, decay=(0.0,)), {0: (2, 2)}, layout) == {0: "b"}


def test_a_trained_parameter_that_did_not_change_is_placed_by_its_shape():
    layout = layout_of(SQUARE, set(), changed=lambda: frozenset({"b"}))
    assert match_names(FILE, numbered(2, decay=(0.0,)), {0: (2, 2), 1: (2,)}, layout) == {0: "b", 1: "norm"}


def test_more_groups_than_any_rule_makes():
    with pytest.raises(MomentsError, match=r"3 parameter groups; one or two were expected"):
        match_names(FILE, numbered(1, 1, 1, decay=(0.1, 0.0, 0.0)), {}, layout_of(SQUARE, set()))


def test_places_are_the_leftmost_of_all():
    """Against all placings, one by one, of every small case."""
    kinds: list[tuple[int, ...] | None] = [None, (1,), (2,)]
    held_kinds = [(1,), (2,)]
    for wanted in itertools.product(kinds, repeat=2):
        for held in itertools.product(held_kinds, repeat=4):
            for must in itertools.product([False, True], repeat=4):
                every = [
                    list(places)
                    for places in itertools.combinations(range(4), 2)
                    if all(w in (None, held[p]) for w, p in zip(wanted, places, strict=True))
                    and all(p in places for p in range(4) if must[p])
                ]
                found = _place(wanted, held, must)
                assert found == (None if not every else [min(column) for column in zip(*every, strict=True)])
                last = _place(wanted[::-1], held[::-1], must[::-1])
                assert last == (None if not every else [3 - max(column) for column in zip(*every, strict=True)][::-1])
