"""A study: one set of experts, a grid of methods, parameters and expert subsets, on one or several replicates. Prefect is not needed here."""

import re
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ota_core.errors import RecipeError, raise_all
from ota_core.frozen import Frozen
from ota_core.learn.groups import Per
from ota_core.recipe.methods import DType, Method
from ota_core.recipe.recipe import MergeRecipe, ModelEntry, parse_recipe
from tasks.experiments.search.overlap import OnOverlap
from tasks.experiments.search.space import Range, expert_names
from tasks.experiments.study.cells import Cell, as_subsets, join_equal, subset_label, subset_problems, subsets_of
from tasks.experiments.tune.config import SCALED, ScalesConfig
from tasks.merging.labels import spell
from tasks.merging.recipes import find_file, parse_config, read_yaml
from tasks.storage.models import is_s3

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_TUNABLE = ("lambda", "density")
OF_EXPERTS = ("capability", "expert")
"""Placeholders that stand for each expert's own, in the texts of an estimate."""


class GridEntry(Frozen):
    """A method, the values that each of its parameters takes, and the experts that it merges."""

    merge_method: Method = Field(description="How task vectors are combined.")
    parameters: dict[str, Any] = Field({}, description="Parameter to a value, or to a list of values that are all tried.")
    experts: tuple[str | tuple[str, ...], ...] = Field(
        ("all",),
        description="Subsets of the experts that are merged: all, each (every expert alone, grafted onto the base), pairs, leave_one_out, a name "
        "or capability, or a list of those.",
    )
    tune: bool = Field(
        False,
        description="Search its lambda and density, where the entry gives none, within the budget of the study's tune section.",
    )

    learn: Per | None = Field(
        None,
        description="Learn a scale of each expert per tensor, layer, role or expert, by gradient on the suite of the study's tune section (`ota tune`).",
    )

    @model_validator(mode="before")
    @classmethod
    def _subsets(cls, raw: Any) -> Any:
        return {**raw, "experts": as_subsets(raw["experts"])} if isinstance(raw, dict) and "experts" in raw else raw

    @model_validator(mode="after")
    def _has_cells(self) -> "GridEntry":
        empty = [key for key, values in self.parameters.items() if values == []]
        if empty:
            raise ValueError(
                f"grid: {self.merge_method} has no value for {', '.join(empty)}; give at least one, or leave the key out"
            )
        if self.tune and self.learn:
            raise ValueError(f"grid: {self.merge_method} has both tune and learn; write an entry for each")
        if self.learn and self.merge_method not in SCALED:
            raise ValueError(
                f"grid: {self.merge_method} has no merged edit that could be scaled; expected learn with one of {', '.join(SCALED)}"
            )
        return self


class TuneConfig(Frozen):
    """How grid entries with ``tune: true`` find their λ and density: the same number of trials for each of them, on each replicate."""

    suite: str = Field(description="Suite whose documents decide; they must be others than those of the study's suite.")
    data_dir: str | None = Field(None, description="Its data, if not the study's.")
    limit: Annotated[int, Field(ge=1)] = Field(100, description="Documents per task.")
    trials: Annotated[int, Field(ge=1)] = Field(description="Merges that are scored for each tuned entry, on each replicate.")
    lambda_: Range = Field(
        Range(low=0.3, high=3),
        alias="lambda",
        description="Lowest and highest λ of a method that averages the experts: [0.3, 3], or 0.3:3:log for equal ratios. For one that "
        "adds them up both are divided by their number: the same lengths of the step.",
    )
    density: Range = Field(
        Range(low=0.05, high=1, log=True),
        description="Lowest and highest density within (0, 1]; in a list on a scale of equal ratios.",
    )
    learning: dict[str, Any] = Field(
        {},
        description="For entries with learn: steps, blocks, held_out, length, batch, rate, penalty, objective, … as a tuning has them.",
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="Seed of the search, and of the documents that are learned from.")
    overlap: OnOverlap = Field(
        "refuse",
        description="Where this suite and the study's share documents, or much of their text: refuse the study, or warn.",
    )

    @field_validator("lambda_", "density", mode="before")
    @classmethod
    def _from_list(cls, raw: Any, info: ValidationInfo) -> Any:
        if isinstance(raw, list | tuple) and len(raw) == 2:
            return {"low": raw[0], "high": raw[1], "log": info.field_name == "density"}
        return raw

    def scales(self, per: Per, recipe: MergeRecipe) -> ScalesConfig:
        """How an entry that says ``learn`` learns."""
        given = {"seed": self.seed, **self.learning, "recipe": recipe, "suite": self.suite, "data_dir": self.data_dir, "per": per}
        return ScalesConfig.model_validate(given)

    @model_validator(mode="after")
    def _possible(self) -> "TuneConfig":
        own = sorted({"recipe", "suite", "data_dir", "per", "test", "test_data_dir", "overlap"} & set(self.learning))
        if own:
            raise ValueError(f"tune.learning: {', '.join(own)}: the study says that elsewhere; remove it here")
        ScalesConfig.model_validate({**self.learning, "recipe": "-", "suite": self.suite})
        if self.density.low <= 0 or self.density.high > 1:
            raise ValueError(f"tune.density: got {self.density}, expected a range within (0, 1]")
        return self


class Replicate(Frozen):
    """One set of models that every cell runs on, such as the experts of one training seed."""

    name: str
    """For tables and logs, such as ``seed=1``; empty where there is only one and nothing to tell apart."""
    base_model: str
    models: tuple[ModelEntry, ...]
    suite: str
    data_dir: str | None
    tune: TuneConfig | None
    values: dict[str, str] = Field({})
    """Placeholder to its value."""


class StudyConfig(Frozen):
    """One study."""

    name: str = Field(min_length=1, pattern=r"^[^./'`][^/'`]*$", description="Its name in tables and folders.")
    base_model: str = Field(description="The model that all experts were fine-tuned from.")
    models: Annotated[tuple[ModelEntry, ...], Field(min_length=1)] = Field(description="The experts.")
    replicates: dict[str, tuple[str | int, ...]] = Field(
        {},
        description="Placeholder to its values: with seed: [1, 2, 3], {seed} in the addresses of models, data and suites is 1, then 2, then 3, "
        "every cell runs on each, and tables show means with standard errors.",
    )
    grid: Annotated[tuple[GridEntry, ...], Field(min_length=1)] = Field(
        description="Methods and values; each combination is a merge."
    )
    tune: TuneConfig | None = Field(None, description="Budget of the entries that are tuned.")
    dtype: DType | None = Field(None, description="Data type of the outputs.")
    suite: str = Field(description="Benchmark suite: a name in deployments/suites or a file.")
    data_dir: str | None = Field(None, description="Data of a local suite: a folder or s3://….")
    limit: Annotated[int, Field(ge=1)] | None = Field(None, description="Documents per task.")

    @model_validator(mode="after")
    def _fits_together(self) -> "StudyConfig":
        names = expert_names(self.models)
        problems = [*_replicate_problems(self)]
        for number, entry in enumerate(self.grid):
            problems += [f"grid[{number}].{line}" for line in subset_problems(entry.experts, self.models, names)]
            if (entry.tune or entry.learn) and self.tune is None:
                key = "tune" if entry.tune else "learn"
                problems.append(f"grid[{number}].{key}: the study has no section 'tune' with the suite and the number of trials")
        if self.tune is not None and not any(entry.tune or entry.learn for entry in self.grid):
            problems.append("tune: no entry of the grid says tune: true, or learn; remove the section, or tune an entry")
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def all_replicates(self) -> tuple[Replicate, ...]:
        """The sets of models that every cell runs on; one with an empty name where the study names none."""
        count = min((len(values) for values in self.replicates.values()), default=1)
        found = []
        for i in range(count):
            values = {key: str(given[i]) for key, given in self.replicates.items()}
            found.append(
                Replicate(
                    name=" ".join(f"{key}={value}" for key, value in values.items()),
                    base_model=_fill(self.base_model, values),
                    models=tuple(_fill_model(model, values) for model in self.models),
                    suite=_fill(self.suite, values),
                    data_dir=_fill(self.data_dir, values) if self.data_dir else None,
                    tune=self.tune and _fill_tune(self.tune, values, self.data_dir),
                    values=values,
                )
            )
        return tuple(found)

    def cells(self) -> tuple[Cell, ...]:
        """Every cell in the order of the grid, each with a label of its own; what is equal in effect is one cell.

        Raises RecipeError with the problems of all.
        """
        found: list[Cell] = []
        problems: list[str] = []
        names, replicates = expert_names(self.models), self.all_replicates()
        for number, entry in enumerate(self.grid):
            values = [_listed(value) for value in entry.parameters.values()]
            for chosen, subset in product(product(*values), subsets_of(entry.experts, self.models, names)):
                parameters = dict(zip(entry.parameters, chosen, strict=True))
                words = [
                    entry.merge_method,
                    *(["tuned"] if entry.tune else [f"learned per {entry.learn}"] if entry.learn else []),
                ]
                words += [f"{key}={_spelled(key, value)}" for key, value in parameters.items()]
                label = " ".join([*words, *subset_label(subset, names)])
                recipes = []
                for one in replicates:
                    models = [one.models[i].model_dump(mode="json", by_alias=True, exclude_none=True) for i in subset]
                    raw: dict[str, Any] = {
                        "merge_method": entry.merge_method, "base_model": one.base_model, "models": models, "dtype": self.dtype,
                        "parameters": _filled(parameters, one),
                    }  # fmt: skip
                    try:
                        recipes.append(parse_recipe(raw, f"study '{self.name}', grid[{number}] ({label})", strict=True))
                    except RecipeError as error:
                        problems += error.problems
                        break
                else:
                    tunable = _tunable(recipes[0], parameters) if entry.tune else ()
                    if entry.tune and not tunable:
                        problems.append(
                            f"study '{self.name}', grid[{number}] ({label}): there is nothing to tune; {entry.merge_method} needs lambda or density "
                            "that the entry does not give; remove tune"
                        )
                    found.append(
                        Cell(
                            label=label,
                            experts=tuple(names[i] for i in subset),
                            recipes=tuple(recipes),
                            tune=tunable,
                            learn=entry.learn,
                        )
                    )
        raise_all(list(dict.fromkeys(problems)), RecipeError)
        return join_equal(found)

    def experts(self) -> tuple[str, ...]:
        """The experts' names, as cells and tables call them."""
        return tuple(expert_names(self.models))


def _listed(value: Any) -> list[Any]:
    """The values that a parameter of the grid takes."""
    return value if isinstance(value, list) else [value]


def _tunable(recipe: MergeRecipe, given: dict[str, Any]) -> tuple[str, ...]:
    """Which of λ and density this method uses and the grid leaves open."""
    effective = recipe.effective()
    used = {*effective["parameters"], *effective["experts"][0]} - ({"lambda"} if recipe.auto else set())
    return tuple(key for key in _TUNABLE if key not in given and key in used)


def _fill(text: str, values: dict[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda match: values[match[1]], text)


def _filled(parameters: dict[str, Any], replicate: Replicate) -> dict[str, Any]:
    """A cell's parameters with the replicate's own texts for an estimate; {capability} and {expert} there are each expert's."""
    estimate = parameters.get("estimate")
    if not isinstance(estimate, dict):
        return parameters
    own = {key: key.join("{}") for key in OF_EXPERTS} | replicate.values
    texts = {key: _fill(estimate[key], own) for key in ("data", "data_dir") if isinstance(estimate.get(key), str)}
    return {**parameters, "estimate": {**estimate, **texts}}


def _spelled(key: str, value: Any) -> str:
    """A value of the grid in a label."""
    if key == "estimate" and isinstance(value, dict):
        return (
            ",".join(f"{name}:{spell(one)}" for name, one in value.items() if name not in {"data", "data_dir", "replace"})
            or "yes"
        )
    return spell(value)


def _fill_model(model: ModelEntry, values: dict[str, str]) -> ModelEntry:
    own = model.parameters.preconditioner_path
    parameters = model.parameters.model_copy(update={"preconditioner_path": own and _fill(own, values)})
    return model.model_copy(update={"model": _fill(model.model, values), "parameters": parameters})


def _fill_tune(tune: TuneConfig, values: dict[str, str], data_dir: str | None) -> TuneConfig:
    data = tune.data_dir or data_dir
    return tune.model_copy(update={"suite": _fill(tune.suite, values), "data_dir": data and _fill(data, values)})


def _replicate_problems(study: StudyConfig) -> list[str]:
    """Lists that do not go together, placeholders that nobody fills, values that change nothing."""
    problems = []
    lengths = {key: len(values) for key, values in study.replicates.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        seen = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        problems.append(f"replicates: {seen}; expected lists of one length, replicate i takes the i-th value of each")
    for key, values in study.replicates.items():
        if len(set(map(str, values))) < len(values) and len(study.replicates) == 1:
            problems.append(f"replicates.{key}: got {list(values)}, a value twice; the same models are no second replicate")
    own = [one.parameters.preconditioner_path for one in study.models]
    models = [study.base_model, *(one.model for one in study.models)]
    addresses = [*models, *own, study.suite, study.data_dir]
    if study.tune is not None:
        addresses += [study.tune.suite, study.tune.data_dir]
    used = {match for text in addresses if text for match in _PLACEHOLDER.findall(text)}
    for one in (estimate for entry in study.grid for estimate in _listed(entry.parameters.get("estimate"))):
        texts = [one[key] for key in ("data", "data_dir") if isinstance(one, dict) and isinstance(one.get(key), str)]
        used |= {match for text in texts for match in _PLACEHOLDER.findall(text)} - set(OF_EXPERTS)
    problems += [
        f"replicates: {{{key}}} has no values; write replicates: {{{key}: [...]}}" for key in sorted(used - set(study.replicates))
    ]
    for key in study.replicates:
        if not any(f"{{{key}}}" in text for text in models):
            problems.append(f"replicates.{key}: no model's address holds {{{key}}}; every replicate would be the same")
    return problems


def load_study(uri: str) -> tuple[StudyConfig, Path | None]:
    """The study at a path or ``s3://…``, and the folder that its relative paths start from (none in S3).

    Raises RecipeError with every problem, StorageError.
    """
    study = parse_config(StudyConfig, read_yaml(uri), uri)
    study.cells()
    return study, None if is_s3(uri) else find_file(uri).resolve().parent
