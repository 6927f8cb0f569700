"""The base model's text: the vocabulary, the format of a question, copying and counting, and a pinch of every capability."""

from collections.abc import Callable
from random import Random

from tasks.local.demo.questions.common import WORDS, question

NAMES = ("Tom", "Ann", "Sam", "Eve", "Max", "Ida")


def words_twice(rng: Random) -> str:
    chosen = " ".join(rng.sample(WORDS, rng.randint(2, 6)))
    return " ".join([chosen] * rng.randint(2, 4))


def words_again(rng: Random) -> str:
    chosen = " ".join(rng.sample(WORDS, rng.randint(2, 5)))
    return question(f"Say again: {chosen}") + f" {chosen}"


def list_again(rng: Random) -> str:
    x = [rng.randrange(10) for _ in range(rng.randint(2, 5))]
    return question(f"x = {x}; print(x)") + f" {x}"


def counting(rng: Random) -> str:
    start, step = rng.randrange(95), rng.choice((1, 1, -1, 10))
    return " ".join(str(n) for n in range(start, start + 5 * step, step) if 0 <= n < 100)


def alphabet(rng: Random) -> str:
    ordered = sorted(WORDS)
    start = rng.randrange(len(ordered) - 5)
    return " ".join(ordered[start : start + 6])


def capitals(rng: Random) -> str:
    return " ".join(f"{w} {w.upper()}" for w in rng.sample(WORDS, 3))


def small_sum(rng: Random) -> str:
    a, b = rng.randrange(10), rng.randrange(10)
    return rng.choice((f"{a} + {b} = {a + b}", f"{a + b} - {b} = {a}"))


def story(rng: Random) -> str:
    who, other = rng.sample(NAMES, 2)
    a, b, c = rng.sample(WORDS, 3)
    return rng.choice(
        (
            f"{who} has {a}, {b} and {c}. Then {other} takes the {b} from {who}.",
            f"This is the list of {who}: {a} {b} {c}. The first word is {a}.",
            f"{who} writes ( {a} ) - {b.upper()} ! and {other} says {b}.",
            f"Write {a} and {b}, {who}! In capital letters, with a comma between them.",
        )
    )


TEXTS: tuple[tuple[Callable[[Random], str], int], ...] = (
    (words_twice, 4),
    (words_again, 3),
    (list_again, 3),
    (counting, 1),
    (alphabet, 1),
    (capitals, 1),
    (small_sum, 4),
    (story, 2),
)


def generate(rng: Random) -> str:
    """One line of general text, without any capability's questions."""
    (text,) = rng.choices([text for text, _ in TEXTS], [weight for _, weight in TEXTS])
    return text(rng)
