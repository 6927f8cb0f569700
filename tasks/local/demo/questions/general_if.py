"""general_if: follow an instruction in plain words on a short list of words."""

from collections.abc import Callable
from random import Random

from tasks.local.demo.questions.common import WORDS, Example, question

INSTRUCTIONS: tuple[tuple[str, Callable[[list[str], str], str]], ...] = (
    ("Name the first word of this list", lambda w, _: w[0]),
    ("Name the last word of this list", lambda w, _: w[-1]),
    ("Name the second word of this list", lambda w, _: w[1]),
    ("Put this list in reverse order", lambda w, _: " ".join(reversed(w))),
    ("Sort this list by the alphabet", lambda w, _: " ".join(sorted(w))),
    ("How many words are in this list", lambda w, _: str(len(w))),
    ("Drop the word {one} from this list", lambda w, one: " ".join(x for x in w if x != one)),
    ("Drop the first word of this list", lambda w, _: " ".join(w[1:])),
    ("Name the word after {one} in this list", lambda w, one: w[(w.index(one) + 1) % len(w)]),
)


def generate(rng: Random) -> Example:
    """One instruction on 3 to 4 different words. The key is the list."""
    words = rng.sample(WORDS, rng.randint(3, 4))
    text, follow = rng.choice(INSTRUCTIONS)
    one = rng.choice(words[:-1])
    return Example(question(f"{text.format(one=one)}: {' '.join(words)}"), follow(words, one), " ".join(words))
