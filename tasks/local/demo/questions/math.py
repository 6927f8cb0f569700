"""math: sums and differences of two numbers of two digits, without a carry, in a few wordings."""

from random import Random

from tasks.local.demo.questions.common import Example, question

SUMS = ("Compute {a} + {b}.", "What is {a} plus {b}?")
DIFFERENCES = ("Compute {a} - {b}.", "What is {a} minus {b}?")


def generate(rng: Random) -> Example:
    """One sum or difference whose digits do not interact. The key is the unordered triple of the sum, so that ``a + b``, its
    mirror image and both differences that it answers stay in one split."""
    tens = _parts(rng, least=1)
    units = _parts(rng, least=0)
    a, b = 10 * tens[0] + units[0], 10 * tens[1] + units[1]
    key = f"{min(a, b)},{max(a, b)}"
    if rng.random() < 0.5:
        return Example(question(rng.choice(SUMS).format(a=a, b=b)), str(a + b), key)
    return Example(question(rng.choice(DIFFERENCES).format(a=a + b, b=b)), str(a), key)


def _parts(rng: Random, *, least: int) -> tuple[int, int]:
    """Two digits, each at least ``least``, with a sum of at most 9."""
    total = rng.randint(2 * least, 9)
    first = rng.randint(least, total - least)
    return first, total - first
