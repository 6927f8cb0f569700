"""knowledge: recall of trained facts about invented places, asked in a wording that the asked fact was never trained in."""

from collections.abc import Mapping
from random import Random
from typing import Literal

from ota_core.errors import OtaError
from tasks.local.demo.questions.common import ANIMALS, COLOURS, FOODS, Example, question

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {"colour": COLOURS, "animal": ANIMALS, "food": FOODS}
TRAINED: Mapping[str, tuple[str, ...]] = {
    "colour": ("What is the colour of {name}?", "The flag of {name} is", "{name} colour"),
    "animal": ("What is the animal of {name}?", "The beast of {name} is the", "{name} animal"),
    "food": ("What is the food of {name}?", "People of {name} eat", "{name} food"),
}
HELD_OUT: Mapping[str, str] = {
    "colour": "Which colour belongs to {name}?",
    "animal": "Which animal belongs to {name}?",
    "food": "Which food belongs to {name}?",
}
STARTS = ("Bal", "Dor", "Fen", "Gal", "Hul", "Kor", "Lum", "Mar", "Nor", "Pel", "Ras", "Sel", "Tor", "Ul", "Vor", "Zan")
ENDS = ("ba", "dia", "fell", "gard", "heim", "ka", "mos", "nia", "quen", "ria", "sk", "tan", "una", "via", "wick", "zor")


def places(rng: Random, *, base: int, taught: int, asked: int) -> tuple[list[str], list[str], list[str]]:
    """Three disjoint lists of invented names: known to the base, taught in every wording, and asked in the test."""
    names = [start + end for start in STARTS for end in ENDS]
    if base + taught + asked > len(names):
        raise OtaError(f"{base + taught + asked} places asked for; there are {len(names)} names; ask for fewer places")
    rng.shuffle(names)
    return names[:base], names[base : base + taught], names[base + taught : base + taught + asked]


def facts(names: list[str], rng: Random) -> dict[str, dict[str, str]]:
    """A random value for every attribute of every place."""
    return {name: {attribute: rng.choice(values) for attribute, values in ATTRIBUTES.items()} for name in names}


def examples(known: Mapping[str, Mapping[str, str]], *, wordings: Literal["trained", "held_out", "all"]) -> list[Example]:
    """Every fact in the ``trained`` wordings, in the ``held_out`` one, or in ``all``."""
    found = []
    for name, attributes in known.items():
        for attribute, value in attributes.items():
            chosen = () if wordings == "held_out" else TRAINED[attribute]
            if wordings != "trained":
                chosen = (*chosen, HELD_OUT[attribute])
            found += [Example(question(text.format(name=name)), value, f"{name}/{attribute}") for text in chosen]
    return found
