"""precise_if: write given words in exactly the form that is asked for."""

from collections.abc import Callable
from random import Random

from tasks.local.demo.questions.common import WORDS, Example, question

FORMS: tuple[tuple[str, Callable[[str, str], str]], ...] = (
    ("Write {a} and {b} in capital letters.", lambda a, b: f"{a} {b}".upper()),
    ("Write {a} and {b} with a comma between them.", lambda a, b: f"{a}, {b}"),
    ("Write {a} and {b} with a dash between them.", lambda a, b: f"{a} - {b}"),
    ("Write {a} two times and {b} three times.", lambda a, b: f"{a} {a} {b} {b} {b}"),
    ("Write {a} and {b} and end with an exclamation mark.", lambda a, b: f"{a} {b} !"),
    ("Write {a} and {b} in brackets.", lambda a, b: f"( {a} {b} )"),
    ("Write {a} in capital letters and {b} in brackets.", lambda a, b: f"{a.upper()} ( {b} )"),
    ("Write {b} before {a} with a comma between them.", lambda a, b: f"{b}, {a}"),
)


def generate(rng: Random) -> Example:
    """One form on two different words. The key is the pair, in either order."""
    a, b = rng.sample(WORDS, 2)
    text, form = rng.choice(FORMS)
    return Example(question(text.format(a=a, b=b)), form(a, b), ",".join(sorted((a, b))))
