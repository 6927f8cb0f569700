"""DARE: drop edits at random and rescale the rest (Yu et al. 2023, arXiv 2311.03099).

The random numbers are counter-based: element i of a tensor gets the same number on every machine, in every block and shard layout.
"""

import torch

from ota_core.methods.numbers import key_of

# SplitMix64 (Steele, Lea & Flood 2014). torch has no uint64 arithmetic; int64 wraps around to the same bits.
_GAMMA = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift of int64 bits."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def uniform(seed: int, expert: int, name: str, start: int, count: int, device: str | torch.device = "cpu") -> torch.Tensor:
    """Numbers in [0, 1) for elements start … start + count − 1 of tensor ``name`` of expert number ``expert``: float64 (count,)."""
    key = key_of(seed, expert, name)
    index = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    bits = index * _signed(_GAMMA) + _signed(key)
    bits = (bits ^ _shift_right(bits, 30)) * _signed(_MIX1)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(_MIX2)
    bits = bits ^ _shift_right(bits, 31)
    return _shift_right(bits, 11).double() * 2.0**-53


def drop(delta: torch.Tensor, random: torch.Tensor, *, density: float, rescale: bool) -> torch.Tensor:
    """Δ where random < density, 0 elsewhere; divided by the density with ``rescale``, which keeps its expectation.

    delta: float64 (r, C); random: float64 (r, C) in [0, 1).
    """
    kept = torch.where(random < density, delta, 0.0)
    return kept / density if rescale else kept
