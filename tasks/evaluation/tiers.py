"""Tiers: what the capabilities of a suite are measured for, and what an average over them is of."""

from collections.abc import Collection, Mapping
from typing import Literal, get_args

Tier = Literal["development", "unseen", "safety", "multilingual", "long_context", "instruction_retention"]
"""``development``: what merges are chosen by. The others are looked at, and must not fall: ``unseen`` benchmarks that chose nothing, ``safety``
(with over-refusal), other languages, long texts, and whether instructions are still followed."""

TIERS: tuple[Tier, ...] = get_args(Tier)
DEVELOPMENT: Tier = "development"


def deciding(capabilities: Collection[str], tiers: Mapping[str, Tier]) -> list[str]:
    """The capabilities that an average is over: those for development, or all where none is. ``tiers``: of the others."""
    return [name for name in capabilities if name not in tiers] or list(capabilities)
