"""code: what a one-line Python program on a short list prints. Answers are computed here; nothing generated is executed."""

from collections.abc import Callable
from random import Random

from tasks.local.demo.questions.common import Example, question

PROGRAMS: tuple[tuple[str, Callable[[list[int]], object]], ...] = (
    ("x[0]", lambda x: x[0]),
    ("x[1]", lambda x: x[1]),
    ("x[-1]", lambda x: x[-1]),
    ("x[::-1]", lambda x: x[::-1]),
    ("x[1:]", lambda x: x[1:]),
    ("x[:2]", lambda x: x[:2]),
    ("len(x)", lambda x: len(x)),
    ("max(x)", lambda x: max(x)),
    ("min(x)", lambda x: min(x)),
)


def generate(rng: Random) -> Example:
    """One program on a list of 3 or 4 digits. The key is the list."""
    x = [rng.randrange(10) for _ in range(rng.randint(3, 4))]
    expression, evaluate = rng.choice(PROGRAMS)
    return Example(question(f"x = {x}; print({expression})"), str(evaluate(x)), str(x))
