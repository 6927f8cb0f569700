"""A study: one set of experts, a grid of methods and parameters. Prefect is not needed here."""

from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ota_core.errors import RecipeError, raise_all
from ota_core.recipe import DType, MergeRecipe, Method, ModelEntry, parse_recipe
from tasks.recipes import find_file, parse_config, read_yaml
from tasks.storage import is_s3


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GridEntry(_Strict):
    """A method, and the values that each of its parameters takes."""

    merge_method: Method = Field(description="How task vectors are combined.")
    parameters: dict[str, Any] = Field({}, description="Parameter to a value, or to a list of values that are all tried.")

    @model_validator(mode="after")
    def _has_cells(self) -> "GridEntry":
        empty = [key for key, values in self.parameters.items() if values == []]
        if empty:
            raise ValueError(
                f"grid: {self.merge_method} has no value for {', '.join(empty)}; give at least one, or leave the key out"
            )
        return self


class StudyConfig(_Strict):
    """One study."""

    name: str = Field(min_length=1, description="Its name in tables.")
    base_model: str = Field(description="The model that all experts were fine-tuned from.")
    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)] = Field(description="The experts.")
    grid: Annotated[tuple[GridEntry, ...], Field(min_length=1)] = Field(
        description="Methods and values; each combination is a merge."
    )
    dtype: DType | None = Field(None, description="Data type of the outputs.")
    suite: str = Field(description="Benchmark suite: a name in deployments/suites or a file.")
    data_dir: str | None = Field(None, description="Data of a local suite: a folder or s3://….")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Documents per task.")

    def recipes(self) -> dict[str, MergeRecipe]:
        """Every cell's recipe under a name that tells it from the others, in the order of the grid. Raises RecipeError with the problems of all."""
        found: dict[str, MergeRecipe] = {}
        problems = []
        models = [one.model_dump(mode="json", by_alias=True, exclude_none=True) for one in self.models]
        for number, entry in enumerate(self.grid):
            values = [value if isinstance(value, list) else [value] for value in entry.parameters.values()]
            for chosen in product(*values):
                raw: dict[str, Any] = {
                    "merge_method": entry.merge_method, "base_model": self.base_model, "models": models, "dtype": self.dtype,
                    "parameters": dict(zip(entry.parameters, chosen, strict=True)),
                }  # fmt: skip
                try:
                    cell = " ".join([entry.merge_method, *(f"{key}={value}" for key, value in raw["parameters"].items())])
                    found[cell] = parse_recipe(raw, f"study '{self.name}', grid[{number}] ({cell})")
                except RecipeError as error:
                    problems += error.problems
        raise_all(list(dict.fromkeys(problems)), RecipeError)
        return found


def load_study(uri: str) -> tuple[StudyConfig, Path | None]:
    """The study at a path or ``s3://…``, and the folder that its relative paths start from (none in S3).

    Raises RecipeError with every problem, StorageError.
    """
    study = parse_config(StudyConfig, read_yaml(uri), uri)
    study.recipes()
    return study, None if is_s3(uri) else find_file(uri).resolve().parent
