"""Values that differ between the tensors of a model: a gradient over the layers, and filters by name. mergekit's dialect.

    density: [0.2, 0.8]                         from the first layer to the last, linear in between
    weight:                                     the first filter whose text is part of the tensor's name
      - {filter: self_attn, value: 0.7}
      - {filter: mlp, value: [0, 1]}            a gradient for the tensors that this filter fits
      - 0.5                                     or {value: 0.5}: all others

A tensor that no filter fits has the value of the next level: of the slice, of the recipe, then the method's default.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One entry of a list of filters."""

    filter: str | None
    """Part of the names of the tensors that it holds for; None and ``*``: all."""
    values: tuple[Any, ...]
    """One value, or the points of a gradient, at even distances over the layers."""

    def fits(self, tensor: str) -> bool:
        """Whether it holds for the tensor with this name."""
        return self.filter in (None, "*") or str(self.filter) in tensor

    def at(self, position: float) -> Any:
        """The value at a position in [0, 1]: linear between the two points beside it."""
        if len(self.values) == 1:
            return self.values[0]
        scaled = position * (len(self.values) - 1)
        left = min(int(scaled), len(self.values) - 2)
        share = scaled - left
        return (1 - share) * self.values[left] + share * self.values[left + 1]


@dataclass(frozen=True)
class Varying:
    """The value of one parameter, by tensor."""

    rules: tuple[Rule, ...]

    def at(self, tensor: str, position: float) -> Any:
        """The value for a tensor whose layer lies at this position of its slice (0 … 1); None where no filter fits."""
        return next((rule.at(position) for rule in self.rules if rule.fits(tensor)), None)

    def before(self, fallback: Any) -> "Varying":
        """The same with the value of the next level (None for none) where no filter fits."""
        if fallback is None:
            return self
        rules = fallback.rules if isinstance(fallback, Varying) else (Rule(None, (fallback,)),)
        return Varying((*self.rules, *rules))

    def values(self) -> list[Any]:
        """Every value that is named."""
        return [value for rule in self.rules for value in rule.values]

    def dump(self) -> list[Any]:
        """As YAML and JSON spell it; ``read`` makes an equal one of it."""
        if len(self.rules) == 1 and self.rules[0].filter is None and len(self.rules[0].values) > 1:
            return list(self.rules[0].values)
        return [
            ({} if rule.filter is None else {"filter": rule.filter})
            | {"value": rule.values[0] if len(rule.values) == 1 else list(rule.values)}
            for rule in self.rules
        ]


def least(value: Any) -> Any:
    """The smallest of the values that are named, or the single one."""
    return min((one for one in value.values() if one is not None), default=None) if isinstance(value, Varying) else value


def middle(value: Any) -> Any:
    """The mean of the numbers that are named, or the single value: one number for a table, never for a merge."""
    if not isinstance(value, Varying):
        return value
    numbers = [one for one in value.values() if isinstance(one, int | float)]
    return fmean(numbers) if numbers else None


def is_varying(value: Any) -> bool:
    """Whether a recipe's value is a gradient or a list of filters."""
    return isinstance(value, Varying | list | tuple) or (isinstance(value, dict) and "value" in value)


def read(value: Any, check: Callable[[Any], Any]) -> Varying:
    """A gradient or filters as a recipe has them. ``check`` gives each single value as its key takes it, or raises ValueError.

    Raises ValueError for what is neither; the message goes on behind the key's name.
    """
    if isinstance(value, Varying):
        return value
    entries = [value] if isinstance(value, dict) else list(value)
    if not entries:
        raise ValueError("got an empty list, expected a number, a gradient such as [0, 0.5, 1] or a list of {filter, value}")
    if not any(isinstance(entry, dict) for entry in entries):
        return Varying((Rule(None, _points(entries, check)),))
    return Varying(tuple(_rule(entry, check) for entry in entries))


def _rule(entry: Any, check: Callable[[Any], Any]) -> Rule:
    if not isinstance(entry, dict):  # a bare value among filters holds for the rest
        return Rule(None, (check(entry),))
    known = {"filter", "pattern", "value"}  # mergekit's early recipes say pattern
    if unknown := sorted(map(str, set(entry) - known)):
        raise ValueError(f"got the keys {', '.join(unknown)} in a list of filters, expected filter and value")
    if "value" not in entry:
        raise ValueError(f"got {entry!r} without 'value', expected such as {{filter: mlp, value: 0.5}}")
    found = entry.get("filter", entry.get("pattern"))
    if found is not None and not isinstance(found, str):
        raise ValueError(f"got the filter {found!r}, expected a part of a tensor's name, such as mlp")
    own = entry["value"]
    return Rule(found, _points(own, check) if isinstance(own, list | tuple) else (check(own),))


def _points(values: Sequence[Any], check: Callable[[Any], Any]) -> tuple[Any, ...]:
    points = tuple(check(value) for value in values)
    wrong = [value for value in points if isinstance(value, bool) or not isinstance(value, int | float)]
    if not points or wrong:
        raise ValueError(f"got {list(values)!r}, expected the numbers of a gradient, from the first layer to the last")
    return points
