"""``expert.json``: what of it may be of which kind. Its keys are people's, and trainers' scripts'."""

import math
from collections.abc import Mapping
from typing import Any

from ota_core.reading import printable, quoted

LONGEST = 4096
"""Characters of a text."""
# Step and β₂ are judged where they are needed (ota_core/moments): some write them as texts.
_KINDS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("capability", (str,), "a word"), ("base_model", (str,), "the model's address"), ("trained_at", (str, int, float), "an ISO date or time"),
    ("step", (int, float, str), "a number"), ("beta2", (int, float, str), "a number"),
)  # fmt: skip


def odd_fact(facts: Mapping[str, Any]) -> str | None:
    """What is wrong with the first value that is not of its kind, as a phrase; None where all are. Keys that nobody knows are not looked at."""
    for key, kinds, expected in _KINDS:
        value = facts.get(key)
        if value is None:
            continue
        finite = not isinstance(value, float) or math.isfinite(value)
        if not isinstance(value, kinds) or isinstance(value, bool) or not finite:
            return f"{key} is {quoted(value)}, expected {expected}"
        if isinstance(value, str) and (len(value) > LONGEST or value != printable(value)):
            return f"{key} is {quoted(value, 80)}, expected a line of text"
    return None
