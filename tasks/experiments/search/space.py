"""What a search may change in a recipe: methods, ranges of densities, λ, weights; and the points of that space as recipes.

A value belongs to the methods that use it (``USED`` of the recipe's parameters): a search over methods has a density where ties is chosen
and none where linear is.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ota_core.errors import RecipeError
from ota_core.plan.inputs import expert_name, unique_names
from ota_core.recipe.methods import NEEDS_MOMENTS, OF_REFINE
from ota_core.recipe.parameters import USED
from ota_core.recipe.recipe import MergeRecipe, ModelEntry, parse_recipe
from ota_core.recipe.yaml_text import nearest

Value = float | str
Values = Mapping[str, Value]
"""A point: dimension's name, such as ``merge_method``, ``lambda`` or ``density/math``, to its value."""
CHOICES = ("merge_method", "refine", "scope", "metric", "normalise", "denominator", "fallback", "masked_merge")
"""What may be chosen among words, in the order in which it is: the method decides what else there is."""
MOST_STARTS = 8


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


class Options(_Strict):
    """Words of which one is chosen. Also written ``ota,ties``, or as a list."""

    words: Annotated[tuple[str, ...], Field(min_length=2)] = Field(description="At least two.")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, raw: Any) -> Any:
        words = [word.strip() for word in raw.split(",")] if isinstance(raw, str) else raw
        return {"words": words} if isinstance(words, list | tuple) else words

    @model_validator(mode="after")
    def _distinct(self) -> "Options":
        if len(set(self.words)) < len(self.words):
            raise ValueError(f"got {self}, a word twice")
        return self

    def __str__(self) -> str:
        return ",".join(self.words)

    def __contains__(self, value: Value) -> bool:
        return value in self.words


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
    ridge: Range | None = Field(None, description="Weight of what the method merges in the row-space regression.")
    merge_method: Options | None = Field(None, description="Methods; each has of the ranges what it uses.")
    refine: Options | None = Field(None, description="Whether a row-space regression follows: none,rowspace.")
    scope: Options | None = Field(None, description="global,per_tensor (ota).")
    metric: Options | None = Field(None, description="curvature,magnitude (ota).")
    normalise: Options | None = Field(None, description="none,global (ota).")
    denominator: Options | None = Field(None, description="kept,all (ota).")
    fallback: Options | None = Field(None, description="base,mean (ota).")
    masked_merge: Options | None = Field(None, description="precond,linear,ties (ota).")

    @field_validator("density", mode="before")
    @classmethod
    def _ratios(cls, raw: Any) -> Any:
        """Densities 0.05 and 0.1 differ as much as 0.5 and 1: written without a scale, the range is logarithmic."""
        return f"{raw}:log" if isinstance(raw, str) and raw.count(":") == 1 else raw

    @model_validator(mode="after")
    def _possible(self) -> "Space":
        limits = {"density": (0, 1), "t": (0, 1), "scaling_factor": (0, math.inf), "power": (0, math.inf), "ridge": (0, math.inf)}
        for key, (low, high) in limits.items():
            found: Range | None = getattr(self, key)
            if found and (found.low < low or found.high > high or (key == "density" and found.low <= 0)):
                expected = f"{low}..{high}" if key != "density" else "(0, 1]"
                raise ValueError(f"{key}: the range {found} leaves {expected}")
        return self

    def dimensions(self, recipe: MergeRecipe, names: Sequence[str] | None = None) -> tuple["Dimension", ...]:
        """What can be varied in this recipe, in a fixed order; empty for a method that has none of it. With choices, of all that can be chosen.

        names: the experts', for the dimensions' names; by default as far as the recipe alone tells them.
        """
        combinations = list(self.combinations(recipe))
        choices = {key: self._choice(key) for _, chosen in combinations for key in CHOICES if key in chosen}
        ranges = {one.name: one for made, _ in combinations for one in self.ranges(made, names)}
        return (*choices.values(), *ranges.values())

    def combinations(self, recipe: MergeRecipe) -> Iterator[tuple[MergeRecipe, dict[str, Value]]]:
        """Every recipe that choices alone lead to, and the choices."""
        given = {key: options.words for key in CHOICES if (options := getattr(self, key)) is not None}
        seen = []
        for words in product(*given.values()):
            made, chosen = self._chosen(recipe, partial(_named, dict(zip(given, words, strict=True))))
            if chosen not in seen:
                seen.append(chosen)
                yield made, chosen

    def walk(
        self, recipe: MergeRecipe, names: Sequence[str] | None, choose: "Choose"
    ) -> tuple[MergeRecipe, dict[str, Value]]:  # fmt: skip
        """A point: ``choose`` is asked for the value of every dimension that there is after what was chosen before. Returns the recipe with
        the choices, and all values."""
        made, values = self._chosen(recipe, choose)
        return made, values | {one.name: choose(one) for one in self.ranges(made, names)}

    def _chosen(self, recipe: MergeRecipe, choose: "Choose") -> tuple[MergeRecipe, dict[str, Value]]:
        values: dict[str, Value] = {}
        for key in CHOICES:
            if getattr(self, key) is not None and (key == "merge_method" or key in USED[recipe.merge_method]):
                values[key] = choose(self._choice(key))
                recipe = with_choice(recipe, key, str(values[key]))
        return recipe, values

    def _choice(self, key: str) -> "Dimension":
        return Dimension(key, key, None, getattr(self, key))

    def ranges(self, recipe: MergeRecipe, names: Sequence[str] | None = None) -> tuple["Dimension", ...]:
        """The numbers that can be varied in this recipe, as it is."""
        in_force = recipe.effective()
        used = {*in_force["parameters"], *in_force["experts"][0]}
        if recipe.merge_method == "ota" and recipe.base_model is None:  # without task vectors there is nothing to cut or scale
            used -= {"density", "lambda"}
        if recipe.auto and "lambda_" not in self.model_fields_set:  # the task vectors tell it
            used -= {"lambda"}
        names = names or expert_names(recipe.models)
        found: list[Dimension] = []
        for key, each in (("density", self.per_expert), ("lambda", False), ("weight", True), ("scaling_factor", True),
                          ("power", False), ("t", False), ("ridge", False)):  # fmt: skip
            within: Range | None = getattr(self, "lambda_" if key == "lambda" else key)
            if within is None or key not in used:
                continue
            if each and len(names) > 1:
                found += [Dimension(f"{key}/{name}", key, i, within) for i, name in enumerate(names)]
            else:
                found.append(Dimension(key, key, None, within))
        return tuple(found)

    def unused(self, recipe: MergeRecipe) -> list[str]:
        """What was given by name and changes nothing in this recipe."""
        used = {one.key for one in self.dimensions(recipe)}
        given = {"lambda" if name == "lambda_" else name for name in self.model_fields_set if getattr(self, name) is not None}
        return sorted(given - used - {"per_expert"})


@dataclass(frozen=True)
class Dimension:
    """One number or word of a recipe that a search may choose."""

    name: str
    key: str
    """The recipe's parameter."""
    expert: int | None
    """Position of the expert that it belongs to; None for the recipe as a whole."""
    within: Range | Options

    def rounded(self, value: Value) -> Value:
        """As a person would write the value into a recipe."""
        return round_value(float(value), self.within) if isinstance(self.within, Range) else value


Choose = Callable[[Dimension], Value]


def _named(values: Values, one: Dimension) -> Value:
    return values[one.name]


def expert_names(models: Sequence[ModelEntry]) -> list[str]:
    """The experts' names as far as a recipe or a study tells them: name, else capability, else the last part of the address."""
    return unique_names([expert_name(entry.model, entry.capability, entry.name) for entry in models])


def with_choice(recipe: MergeRecipe, key: str, word: str) -> MergeRecipe:
    """The recipe with this word. Of another method, without the parameters that it does not use. Raises RecipeError."""
    raw = recipe.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    if key != "merge_method":
        unused = OF_REFINE if (key, word) == ("refine", "none") else ()
        raw["parameters"] = {name: value for name, value in raw.get("parameters", {}).items() if name not in unused} | {key: word}
    elif word != recipe.merge_method:
        if word not in USED:
            raise RecipeError(f"space: unknown merge_method '{word}'; {nearest(word, USED)}")
        raw["merge_method"] = word
        for owner in (raw, *raw["models"]):
            owner["parameters"] = {name: value for name, value in owner.get("parameters", {}).items() if name in USED[word]}
    return parse_recipe(raw, f"a search with {key} {word}", strict=True)


def apply(recipe: MergeRecipe, dimensions: Sequence[Dimension], values: Values) -> MergeRecipe:
    """The recipe with these numbers in place of its own. A density replaces the thresholds: both say where an expert is cut."""
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
    return parse_recipe(raw, "a point of the search", strict=True)


def point(space: Space, recipe: MergeRecipe, names: Sequence[str] | None, values: Values) -> MergeRecipe:
    """The recipe at these values of the space. Raises RecipeError."""
    recipe.check_uniform("a search")
    chosen, found = space.walk(recipe, names, partial(_named, values))
    return apply(chosen, space.ranges(chosen, names), found)


def place(space: Space, recipe: MergeRecipe, names: Sequence[str] | None = None) -> dict[str, Value] | None:
    """Where a recipe lies in the space; None when it does not: see ``values_of``."""
    used = USED[recipe.merge_method]
    words = {
        key: recipe.merge_method if key == "merge_method" else recipe.setting(key)
        for key in CHOICES
        if key == "merge_method" or key in used
    }
    choices = {key: words[key] for key in words if getattr(space, key) is not None}
    numbers = values_of(recipe, space.ranges(recipe, names))
    inside = all(word in getattr(space, key) for key, word in choices.items())
    return choices | numbers if inside and numbers is not None else None


def values_of(recipe: MergeRecipe, dimensions: Sequence[Dimension]) -> dict[str, Value] | None:
    """A recipe's numbers in these ranges; None when one lies outside of its own, is found while merging (λ auto), or is a threshold, or when
    the experts differ where the space has one for all."""
    found: dict[str, Value] = {}
    experts = range(len(recipe.models))
    for one in dimensions:
        of_experts = one.key in {"density", "weight", "scaling_factor"}
        places = [None] if not of_experts else list(experts) if one.expert is None else [one.expert]
        if one.key == "density" and any(recipe.setting("precond_threshold", i) is not None for i in experts):
            return None
        settings = [recipe.setting(one.key, i) for i in places]
        held = {1.0 if value is None and one.key == "density" else value for value in settings}
        value = held.pop()
        if held or not isinstance(value, int | float) or value not in one.within:
            return None
        found[one.name] = value
    return found


_STARTS = ((0.5, None), (0.75, 0.67), (0.5, 0.67), (0.25, 0.67))
_SCALES = ((None, 0.67), (None, 0.83), (None, 0.5), (None, 0.33))
"""Parts of the ranges of density and λ; None is the recipe's own value, or the middle."""


def starting_points(space: Space, recipe: MergeRecipe, names: Sequence[str] | None = None) -> list[dict[str, Value]]:
    """Points that a search tries before it chooses for itself: ``starts``; with choices, the first of them for each of the first of these."""
    combinations = list(space.combinations(recipe))
    if len(combinations) == 1:
        return [combinations[0][1] | numbers for numbers in starts(recipe, space.ranges(recipe, names))]
    points = []
    for made, chosen in combinations[:MOST_STARTS]:
        numbers = space.ranges(made, names)
        points.append(chosen | (values_of(made, numbers) or next(iter(starts(made, numbers)), {})))
    return [one for one in points if one != place(space, recipe, names)]


def starts(recipe: MergeRecipe, dimensions: Sequence[Dimension]) -> list[dict[str, Value]]:
    """Points that a search tries before it chooses for itself: one density for all experts, λ as the recipe has it and above.

    The best λ of several experts often lies above 1 (docs/methods.md section 4). Where there is a λ and no density, values of it all over its
    range; without both, the middle of every range.
    """
    known = values_of(recipe, dimensions)
    points: list[dict[str, Value]] = []
    for density, scale in _STARTS if any(one.key == "density" for one in dimensions) else _SCALES:
        point: dict[str, Value] = {}
        for one in dimensions:
            assert isinstance(one.within, Range)
            neutral = recipe.setting(one.key, one.expert or 0)
            middle = neutral if isinstance(neutral, int | float) and neutral in one.within else one.within.at(0.5)
            parts: dict[str, float | None] = {"density": density, "lambda": scale}
            part = parts.get(one.key)
            point[one.name] = middle if part is None else one.within.at(part)
        if point not in points and point != known:
            points.append(point)
    return points


def check_used(space: Space, recipe: MergeRecipe, where: str) -> None:
    """Raises RecipeError for what would change nothing, a mistake in the search as in a recipe, and for choices that no recipe can have."""
    needs = [word for word in space.merge_method.words if word in NEEDS_MOMENTS] if space.merge_method else []
    if needs and recipe.merge_method not in NEEDS_MOMENTS:
        raise RecipeError(
            f"{where}: {', '.join(needs)} reads second moments, and the recipe to begin with does not say how; begin with merge_method {needs[0]}"
        )
    unused = space.unused(recipe)
    if unused:
        raise RecipeError(
            f"{where}: the range of {', '.join(unused)} has no effect with merge_method {space.merge_method or recipe.merge_method}; remove it"
        )
