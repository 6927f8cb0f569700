"""A search as its YAML says it, and the floors in it as numbers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import Field, field_validator

from ota_core.errors import RecipeError, raise_all
from ota_core.frozen import Frozen
from ota_core.recipe.recipe import MergeRecipe
from ota_core.recipe.yaml_text import nearest
from tasks.evaluation.scores import Scores, best_experts
from tasks.experiments.search.overlap import OnOverlap
from tasks.experiments.search.search import Budget, SearchError
from tasks.experiments.search.space import Space, check_used
from tasks.merging.recipes import find_file, parse_config, read_recipe, read_yaml
from tasks.storage.models import is_s3

Config = TypeVar("Config", bound=Frozen)
DEFAULT = "default"
BUDGET = Budget(evaluations=40)
FloorText = str | float


class Floor(NamedTuple):
    """What a capability must reach at least."""

    kind: Literal["none", "base", "expert", "score"]
    value: float = 1.0
    """Of kind expert: the fraction of the expert's score; of kind score: the score, 0..1. On a capability with a held-out loss, all of them
    are of the likelihood of a byte, which the search makes as large as it can there: see ``ModelScores.objective``."""


def parse_floor(text: FloorText) -> Floor:
    """``none``, ``base``, a fraction of the expert's own score such as ``0.9``, or ``score:0.4``. Raises ValueError."""
    words = str(text).strip()
    if words in {"none", "base"}:
        return Floor("base" if words == "base" else "none")
    try:
        value = float(words.removeprefix("score:"))
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1 or isinstance(text, bool):
        raise ValueError(
            f"floor: got '{text}', expected base (the base model's score), a fraction of the expert's score such as 0.9, a score such as "
            "score:0.4, or none"
        )
    return Floor("score" if words.startswith("score:") else "expert", value)


class SearchConfig(Frozen):
    """One search."""

    recipe: MergeRecipe | str = Field(description="What to begin with: a recipe, or where its YAML lies (s3://… or a file).")
    suite: str = Field(
        description="Benchmark suite that chooses: a name in deployments/suites or a file. Not the one that judges."
    )
    data_dir: str | None = Field(None, description="Data of a local suite: a folder or s3://….")
    space: Space = Field(Space(), description="What may be changed, and how far.")
    budget: Budget = Field(BUDGET, description="How much may be measured.")
    floor: dict[str, FloorText] = Field(
        {DEFAULT: "base"},
        description="Capability, or default, to what it must reach: base, a fraction of its expert's score such as 0.9, score:0.4, or none. "
        "Where the suite measures a held-out loss, the score is the likelihood of a byte, 2 to the minus bits per byte.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Seed of the optimiser.")
    test: str | None = Field(None, description="Suite that judges the winner, once. It must share no document with the first.")
    test_data_dir: str | None = Field(None, description="Its data, if other than data_dir.")
    overlap: OnOverlap = Field(
        "refuse", description="Where suite and test share documents, or much of their text: refuse the search, or warn."
    )

    @field_validator("floor", mode="before")
    @classmethod
    def _one_for_all(cls, raw: Any) -> Any:
        return {DEFAULT: raw} if isinstance(raw, str | int | float) and not isinstance(raw, bool) else raw

    @field_validator("floor")
    @classmethod
    def _understood(cls, raw: dict[str, FloorText]) -> dict[str, FloorText]:
        problems = []
        for name, text in raw.items():
            try:
                parse_floor(text)
            except ValueError as error:
                problems.append(f"floor of {name}: {str(error).removeprefix('floor: ')}")
        if problems:
            raise ValueError("\n".join(problems))
        return raw

    def floors(self) -> dict[str, Floor]:
        """Capability, and ``default``, to its floor."""
        return {DEFAULT: Floor("base")} | {name: parse_floor(text) for name, text in self.floor.items()}


def load_search(uri: str) -> SearchConfig:
    """The search at a path or ``s3://…``. Raises RecipeError, StorageError."""
    return load_beside(SearchConfig, uri)


def load_beside(kind: type[Config], uri: str) -> Config:
    """A configuration with a ``recipe``, at a path or ``s3://…``; a recipe that it names by a relative path lies beside it.

    Raises RecipeError, StorageError.
    """
    config = parse_config(kind, read_yaml(uri), uri)
    recipe = getattr(config, "recipe", None)
    if isinstance(recipe, str) and not is_s3(recipe) and not is_s3(uri):
        beside = find_file(uri).resolve().parent / recipe
        config = config.model_copy(update={"recipe": str(beside) if beside.is_file() else recipe})
    return config


def recipe_of(config: SearchConfig) -> tuple[MergeRecipe, Path | None]:
    """The recipe to begin with and the folder that its relative paths start from. Raises RecipeError, also for ranges without effect."""
    recipe, folder = read_recipe(config.recipe) if isinstance(config.recipe, str) else (config.recipe, None)
    check_used(config.space, recipe, "space")
    if recipe.base_model is None and any(one.kind == "base" for one in config.floors().values()):
        raise RecipeError("floor: the recipe names no base_model, so there is no base to hold scores against; give another floor")
    return recipe, folder


def floors_of(
    floors: Mapping[str, Floor],
    capabilities: Mapping[str, object],
    base: Scores | None,
    experts: Mapping[str, tuple[str, Scores]],
) -> dict[str, float]:
    """Capability to its floor, in what trials are measured by, from the scores of base and experts (name to its capability and its scores).

    Raises SearchError for floors of unknown capabilities, and for those that nothing was measured for.
    """
    known = {name: value for name, value in _plain(base).items() if value is not None}
    own = best_experts({name: (capability, _plain(scores)) for name, (capability, scores) in experts.items()})
    problems = [
        f"floor: the suite has no capability '{name}'; {nearest(name, capabilities)}"
        for name in floors
        if name not in {DEFAULT, *capabilities}
    ]
    found: dict[str, float] = {}
    for name in capabilities:
        floor = floors.get(name, floors[DEFAULT])
        if floor.kind == "score":
            found[name] = floor.value
        elif floor.kind == "base" and name in known:
            found[name] = known[name]
        elif floor.kind == "expert" and name in own:
            found[name] = floor.value * own[name]
        elif floor.kind != "none" and name in _measured(base, experts):
            problems.append(
                f"floor: no expert of the recipe has the capability '{name}', so there is no fraction of its score; "
                f"give it a floor of its own, such as {name}=base or {name}=none"
            )
        elif floor.kind != "none" and name in floors:
            problems.append(f"floor: '{name}' was not measured; give it no floor ({name}=none), or let the suite measure it")
    raise_all(problems, SearchError)
    return found


def _measured(base: Scores | None, experts: Mapping[str, tuple[str, Scores]]) -> set[str]:
    models = [_plain(base), *(_plain(scores) for _, scores in experts.values())]
    return {name for scores in models for name, value in scores.items() if value is not None}


def _plain(scores: Scores | None) -> Mapping[str, float | None]:
    if scores is None:
        return {}
    return scores if isinstance(scores, Mapping) else scores.objective()
