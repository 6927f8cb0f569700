"""A tuning as its YAML says it."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ota_core.errors import RecipeError
from ota_core.frozen import Frozen
from ota_core.learn.groups import Per
from ota_core.recipe.parameters import USED
from ota_core.recipe.recipe import MergeRecipe
from tasks.experiments.search.config import DEFAULT, Floor, FloorText, load_beside, parse_floor
from tasks.experiments.search.overlap import OnOverlap
from tasks.merging.recipes import read_recipe

Objective = Literal["mean", "worst", "floors", "kl"]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SCALED = tuple(sorted(name for name, keys in USED.items() if "lambda" in keys))
"""Methods with a merged edit that can be scaled."""
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ScalesConfig(Frozen):
    """How scales are learned."""

    recipe: MergeRecipe | str = Field(description="What to begin with: a recipe, or where its YAML lies (s3://… or a file).")
    suite: str = Field(
        description="Benchmark suite whose documents are learned from: a name in deployments/suites or a file. Not the one that judges."
    )
    data_dir: str | None = Field(None, description="Data of a local suite: a folder or s3://….")
    per: Per = Field("tensor", description="What shares an expert's coefficient: tensor, layer, role or expert.")
    objective: Objective = Field(
        "mean",
        description="mean of the capabilities' losses; worst: the one that lies highest above its expert's own; floors: the mean, with a penalty "
        "below what each must reach; kl: the distance to each expert's predictions on its own prompts, which needs no answers.",
    )
    floor: dict[str, FloorText] = Field(
        {DEFAULT: "base"},
        description="With objective floors, capability, or default, to what it must reach, as in a search: base, a fraction of its expert's likelihood "
        "of a byte such as 0.98, score:0.4, or none.",
    )
    floor_weight: Positive = Field(10.0, description="Weight of a bit per byte below a floor, against one of the mean.")
    top: Count = Field(
        64,
        description="With objective kl: tokens of each prediction that are kept, the most likely ones; the rest counts as one.",
    )
    answer: Count = Field(32, description="With objective kl: tokens at most of an expert's own answer to a prompt.")
    blocks: Count = Field(16, description="Blocks of text of each capability to learn from.")
    held_out: Count = Field(6, description="Blocks of each capability, of other documents, that say when to stop.")
    length: Annotated[int, Field(ge=8)] = Field(512, description="Tokens of a block at most.")
    steps: Count = Field(32, description="Steps at most.")
    batch: Count = Field(1, description="Blocks of each capability in a step.")
    every: Count = Field(4, description="Steps between two looks at what is held out.")
    patience: Count = Field(3, description="Looks without a better one, after which learning stops.")
    rate: Positive = Field(0.05, description="Adam's step: about what a coefficient changes by in one.")
    penalty: NonNegative = Field(
        0.01, description="Weight of the mean squared distance of the coefficients from their start, in bits per byte."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the model in memory; auto: bfloat16 on a GPU, else float32."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Decides which documents are taken, and in which order.")
    test: str | None = Field(None, description="Suite that judges the result, once. It must share no document with the first.")
    test_data_dir: str | None = Field(None, description="Its data, if other than data_dir.")
    overlap: OnOverlap = Field(
        "refuse", description="Where suite and test share documents, or much of their text: refuse to tune, or warn."
    )

    @field_validator("floor", mode="before")
    @classmethod
    def _one_for_all(cls, raw: Any) -> Any:
        return {DEFAULT: raw} if isinstance(raw, str | int | float) and not isinstance(raw, bool) else raw

    @field_validator("floor")
    @classmethod
    def _understood(cls, raw: dict[str, FloorText]) -> dict[str, FloorText]:
        for text in raw.values():
            parse_floor(text)
        return raw

    @model_validator(mode="after")
    def _used(self) -> Self:
        given = self.model_fields_set
        needs = {"floor": "floors", "floor_weight": "floors", "top": "kl", "answer": "kl"}
        unused = [key for key, objective in needs.items() if key in given and self.objective != objective]
        if unused:
            raise ValueError(
                f"{', '.join(unused)}: no effect with objective {self.objective}; remove it, or choose another objective"
            )
        return self

    def floors(self) -> dict[str, Floor]:
        """Capability, and ``default``, to its floor."""
        return {DEFAULT: Floor("base")} | {name: parse_floor(text) for name, text in self.floor.items()}


def load_tuning(uri: str) -> ScalesConfig:
    """The tuning at a path or ``s3://…``. Raises RecipeError, StorageError."""
    return load_beside(ScalesConfig, uri)


def recipe_of(config: ScalesConfig) -> tuple[MergeRecipe, Path | None]:
    """The recipe to begin with and the folder that its relative paths start from. Raises RecipeError where it has nothing to scale."""
    recipe, folder = read_recipe(config.recipe) if isinstance(config.recipe, str) else (config.recipe, None)
    if recipe.merge_method not in SCALED:
        raise RecipeError(
            f"ota tune: {recipe.merge_method} has no merged edit of the base that could be scaled; expected a recipe with one of: {', '.join(SCALED)}"
        )
    if recipe.base_model is None:
        raise RecipeError("ota tune: the recipe names no base_model; scales act on the experts' edits of one")
    return recipe, folder
