"""What a search may change in a recipe: ranges of densities, λ, weights; and the points of that space as recipes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ota_core.errors import RecipeError
from ota_core.plan.inputs import expert_name, unique_names
from ota_core.recipe.recipe import MergeRecipe, ModelEntry, parse_recipe

Values = Mapping[str, float]
"""A point: dimension's name, such as ``lambda`` or ``density/math``, to its value."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Range(_Strict):
    """The values from ``low`` to ``high``, both included. Also written ``0.05:1`` or ``0.05:1:log``."""

    low: float = Field(allow_inf_nan=False, description="Smallest value.")
    high: float = Field(allow_inf_nan=False, description="Largest value.")
    log: bool = Field(False, description="Whether equal ratios count as equal distances.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, raw: Any) -> Any:
        if not isinstance(raw, str):
            return raw
        low, high, *scale = [part.strip() for part in raw.split(":")] if raw.count(":") in {1, 2} else ["", ""]
        try:
            ends = {"low": float(low), "high": float(high)}
        except ValueError:
            raise ValueError(f"got '{raw}', expected a range such as 0.05:1 or 0.05:1:log") from None
        if scale not in ([], ["log"], ["linear"]):
            raise ValueError(f"got '{raw}', expected log or linear behind the two ends")
        return ends | ({"log": scale == ["log"]} if scale else {})

    @model_validator(mode="after")
    def _ordered(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"the range {self} is empty; its first end must be smaller than its second")
        if self.log and self.low <= 0:
            raise ValueError(f"the range {self} is logarithmic and must begin above 0")
        return self

    def __str__(self) -> str:
        return f"{self.low:g}:{self.high:g}" + (":log" if self.log else "")

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def at(self, part: float) -> float:
        """The value that has this part (0..1) of the range below it, on the range's own scale."""
        if self.log:
            return round_value(math.exp(math.log(self.low) + part * (math.log(self.high) - math.log(self.low))), self)
        return round_value(self.low + part * (self.high - self.low), self)


def round_value(value: float, within: Range) -> float:
    """Four significant digits, as a person would write the value into a recipe; never outside of the range."""
    return min(max(float(f"{value:.4g}"), within.low), within.high)


class Space(_Strict):
    """Ranges of what a search may change. What a method does not use is left out for it: ``dimensions`` says what is left."""

    density: Range | None = Field(Range(low=0.05, high=1, log=True), description="Fraction of an expert's elements that is kept.")
    per_expert: bool = Field(True, description="Whether each expert has a density of its own.")
    lambda_: Range | None = Field(Range(low=0.5, high=2), alias="lambda", description="Scale λ of the merged task vector.")
    weight: Range | None = Field(None, description="Weight of each expert.")
    scaling_factor: Range | None = Field(None, description="Factor on each expert's curvature weight (ota).")
    power: Range | None = Field(None, description="Exponent of the curvature (ota).")
    t: Range | None = Field(None, description="Position between two models (slerp).")

    @field_validator("density", mode="before")
    @classmethod
    def _ratios(cls, raw: Any) -> Any:
        """Densities 0.05 and 0.1 differ as much as 0.5 and 1: written without a scale, the range is logarithmic."""
        return f"{raw}:log" if isinstance(raw, str) and raw.count(":") == 1 else raw

    @model_validator(mode="after")
    def _possible(self) -> "Space":
        limits = {"density": (0, 1), "t": (0, 1), "scaling_factor": (0, math.inf), "power": (0, math.inf)}
        for key, (low, high) in limits.items():
            found: Range | None = getattr(self, key)
            if found and (found.low < low or found.high > high or (key == "density" and found.low <= 0)):
                expected = f"{low}..{high}" if key != "density" else "(0, 1]"
                raise ValueError(f"{key}: the range {found} leaves {expected}")
        return self

    def dimensions(self, recipe: MergeRecipe, names: Sequence[str] | None = None) -> tuple["Dimension", ...]:
        """What can be varied in this recipe, in a fixed order; empty for a method that has none of it.

        names: the experts', for the dimensions' names; by default as far as the recipe alone tells them.
        """
        in_force = recipe.effective()
        used = {*in_force["parameters"], *in_force["experts"][0]}
        if recipe.merge_method == "ota" and recipe.base_model is None:  # without task vectors there is nothing to cut or scale
            used -= {"density", "lambda"}
        names = names or expert_names(recipe.models)
        found: list[Dimension] = []
        for key, each in (("density", self.per_expert), ("lambda", False), ("weight", True), ("scaling_factor", True),
                          ("power", False), ("t", False)):  # fmt: skip
            within: Range | None = getattr(self, "lambda_" if key == "lambda" else key)
            if within is None or key not in used:
                continue
            if each and len(names) > 1:
                found += [Dimension(f"{key}/{name}", key, i, within) for i, name in enumerate(names)]
            else:
                found.append(Dimension(key, key, None, within))
        return tuple(found)

    def unused(self, recipe: MergeRecipe) -> list[str]:
        """Ranges that were given by name and change nothing in this recipe."""
        used = {one.key for one in self.dimensions(recipe)}
        given = {"lambda" if name == "lambda_" else name for name in self.model_fields_set if getattr(self, name) is not None}
        return sorted(given - used - {"per_expert"})


@dataclass(frozen=True)
class Dimension:
    """One number of a recipe that a search may choose."""

    name: str
    key: str
    """The recipe's parameter."""
    expert: int | None
    """Position of the expert that it belongs to; None for the recipe as a whole."""
    within: Range


def expert_names(models: Sequence[ModelEntry]) -> list[str]:
    """The experts' names as far as a recipe or a study tells them: name, else capability, else the last part of the address."""
    return unique_names([expert_name(entry.model, entry.capability, entry.name) for entry in models])


def apply(recipe: MergeRecipe, dimensions: Sequence[Dimension], values: Values) -> MergeRecipe:
    """The recipe with these values in place of its own. A density replaces the thresholds: both say where an expert is cut."""
    raw = recipe.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    parameters: dict[str, Any] = raw.setdefault("parameters", {})
    models = [entry.setdefault("parameters", {}) for entry in raw["models"]]
    for one in dimensions:
        replaced = {one.key, "precond_threshold"} if one.key == "density" else {one.key}
        for key in replaced:
            parameters.pop(key, None) if one.expert is None else None
            for own in models if one.expert is None else [models[one.expert]]:
                own.pop(key, None)
        (parameters if one.expert is None else models[one.expert])[one.key] = values[one.name]
    # What every expert now has of its own no longer stands for all.
    for key in {one.key for one in dimensions if one.expert is not None}:
        parameters.pop(key, None)
        if key == "density":
            parameters.pop("precond_threshold", None)
    return parse_recipe(raw, "a point of the search")


def values_of(recipe: MergeRecipe, dimensions: Sequence[Dimension]) -> dict[str, float] | None:
    """Where a recipe lies in the space; None when it does not: a value outside of its range, thresholds, or different values of the
    experts where the space has one for all."""
    found: dict[str, float] = {}
    experts = range(len(recipe.models))
    for one in dimensions:
        of_experts = one.key in {"density", "weight", "scaling_factor"}
        places = [None] if not of_experts else list(experts) if one.expert is None else [one.expert]
        if one.key == "density" and any(recipe.setting("precond_threshold", i) is not None for i in experts):
            return None
        settings = [recipe.setting(one.key, i) for i in places]
        held = {1.0 if value is None and one.key == "density" else value for value in settings}
        value = held.pop()
        if held or value is None or value not in one.within:
            return None
        found[one.name] = value
    return found


_STARTS = ((0.5, None), (0.75, 0.67), (0.5, 0.67), (0.25, 0.67))
_SCALES = ((None, 0.67), (None, 0.83), (None, 0.5), (None, 0.33))
"""Parts of the ranges of density and λ; None is the recipe's own value, or the middle."""


def starts(recipe: MergeRecipe, dimensions: Sequence[Dimension]) -> list[dict[str, float]]:
    """Points that a search tries before it chooses for itself: one density for all experts, λ as the recipe has it and above.

    The best λ of several experts often lies above 1 (docs/methods.md section 4). Where there is a λ and no density, values of it all over its
    range; without both, the middle of every range.
    """
    known = values_of(recipe, dimensions)
    points: list[dict[str, float]] = []
    for density, scale in _STARTS if any(one.key == "density" for one in dimensions) else _SCALES:
        point = {}
        for one in dimensions:
            neutral = recipe.setting(one.key, one.expert or 0)
            middle = neutral if neutral is not None and neutral in one.within else one.within.at(0.5)
            parts: dict[str, float | None] = {"density": density, "lambda": scale}
            part = parts.get(one.key)
            point[one.name] = middle if part is None else one.within.at(part)
        if point not in points and point != known:
            points.append(point)
    return points


def check_used(space: Space, recipe: MergeRecipe, where: str) -> None:
    """Raises RecipeError for ranges that would change nothing: a mistake in the search, as in a recipe."""
    unused = space.unused(recipe)
    if unused:
        raise RecipeError(
            f"{where}: the range of {', '.join(unused)} has no effect with merge_method {recipe.merge_method}; remove it"
        )
