"""What all generators share: the example, the word list, and the rule that assigns an example to a split."""

import hashlib
from collections.abc import Callable
from random import Random
from typing import Literal, NamedTuple

CAPABILITIES = ("math", "code", "precise_if", "general_if", "knowledge")
Capability = Literal["math", "code", "precise_if", "general_if", "knowledge"]
Split = Literal["train", "validation", "test"]

COLOURS = ("black", "blue", "brown", "gold", "gray", "green", "orange", "pink", "purple", "red", "white", "yellow")
ANIMALS = ("bear", "cat", "cow", "dog", "duck", "eagle", "fox", "frog", "goat", "horse", "lion", "wolf")
FOODS = ("apple", "bread", "cheese", "corn", "egg", "fig", "grape", "lemon", "olive", "pear", "plum", "rice")
THINGS = ("bell", "book", "boat", "coin", "drum", "lamp", "map", "ring", "rope", "ship", "table", "wheel")
WORDS = (*COLOURS, *ANIMALS, *FOODS, *THINGS)


class Example(NamedTuple):
    """One question of a capability."""

    prompt: str
    answer: str
    key: str
    """What the question is about, without its wording: all questions with one key lie in one split."""


Generator = Callable[[Random], Example]


def split_of(capability: str, key: str) -> Split:
    """The split of a key, from its digest alone: 20 % test, 5 % validation, the rest train. Independent of the seed."""
    bucket = int.from_bytes(hashlib.blake2b(f"{capability}:{key}".encode(), digest_size=4).digest(), "big") % 100
    return "test" if bucket < 20 else "validation" if bucket < 25 else "train"


def question(text: str) -> str:
    """The format that all capabilities share; the answer follows after one space."""
    return f"{text}\nAnswer:"
