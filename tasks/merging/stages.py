"""A file of several recipes (``---``): a stage names the result of another as its model, as mergekit-multi has it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ota_core.errors import RecipeError, raise_all
from ota_core.plan.inputs import MergeInputs
from ota_core.recipe.recipe import MergeRecipe, parse_recipe
from ota_core.recipe.slices import same_model
from ota_core.recipe.yaml_text import parse_documents, read_text


@dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """One document of the file."""

    name: str | None
    """What other documents call its result; None for the one that nobody names."""
    recipe: MergeRecipe
    needs: tuple[str, ...]
    """The stages whose results it reads."""

    def located(self, folders: dict[str, Path]) -> MergeRecipe:
        """The recipe with the folders of other stages in place of their names."""

        def place(model: str | None) -> str | None:
            known = [folder for name, folder in folders.items() if same_model(name, model)]
            return str(known[0]) if known else model

        recipe = self.recipe
        models = tuple(
            entry.model_copy(update={"model": place(entry.model), "name": entry.name or _label(entry.model, self.needs)})
            for entry in recipe.models
        )
        source = recipe.tokenizer_source
        if source.startswith("model:"):
            source = f"model:{place(source.removeprefix('model:'))}"
        changed: dict[str, Any] = {"models": models, "base_model": place(recipe.base_model), "tokenizer_source": source}
        if recipe.tokenizer is not None:
            changed["tokenizer"] = recipe.tokenizer.moved(place)
        if recipe.slices is not None:
            changed["slices"] = tuple(
                one.model_copy(
                    update={
                        "base_model": place(one.base_model),
                        "sources": tuple(s.model_copy(update={"model": place(s.model)}) for s in one.sources),
                    }
                )
                for one in recipe.slices
            )
        return recipe.model_copy(update=changed)

    def with_recipe(self, recipe: MergeRecipe) -> "StageRecipe":
        """The stage with another recipe of the same models."""
        return replace(self, recipe=recipe)

    def named(self, inputs: MergeInputs) -> MergeInputs:
        """The inputs, with results of other stages called by their names: what a record and a model card say."""
        base = inputs.base
        if base is not None and self.recipe.base_model is not None:
            base = replace(base, source=self.recipe.base_model)
        pairs = zip(inputs.experts, self.recipe.models, strict=True)
        return replace(inputs, base=base, experts=tuple(replace(expert, source=entry.model) for expert, entry in pairs))


def _label(model: str, stages: Sequence[str]) -> str | None:
    """A stage's result is called by the stage's name in tables, too."""
    name = next((name for name in stages if same_model(name, model)), None)
    return None if name is None else name.rstrip("/").rsplit("/", 1)[-1]


def read_stages(path: Path) -> list[StageRecipe]:
    """The documents of a recipe file in the order in which they can be merged, the result last; of an ordinary recipe that alone.

    Raises RecipeError with every problem: names given twice or nowhere, circles, results that nobody uses.
    """
    text = read_text(path)
    documents = parse_documents(text, str(path))
    if len(documents) <= 1:
        return [StageRecipe(name=None, recipe=parse_recipe(documents[0] if documents else None, str(path), text=text), needs=())]
    problems: list[str] = []
    read: list[tuple[str | None, MergeRecipe]] = []
    for i, raw in enumerate(documents):
        name, left = _split(raw)
        try:
            read.append(
                (name, parse_recipe(left, f"{path}, document {i + 1}{f' ({name})' if name else ''}", text=text, document=i))
            )
        except RecipeError as error:
            problems += error.problems
    raise_all(problems, RecipeError)
    names = [name for name, _ in read if name is not None]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{path}: the name '{name}' is given to {names.count(name)} documents; each result needs its own")
    raise_all(problems, RecipeError)
    return _ordered([StageRecipe(name=name, recipe=recipe, needs=_needs(recipe, names)) for name, recipe in read], str(path))


def _split(raw: Any) -> tuple[str | None, Any]:
    """The name of a document's result, and its recipe. Old files say out_path instead."""
    if not isinstance(raw, dict):
        return None, raw
    left = {key: value for key, value in raw.items() if key not in {"name", "out_path"}}
    name = raw.get("name", raw.get("out_path"))
    return (None if name is None else str(name)), left


def _needs(recipe: MergeRecipe, names: Sequence[str]) -> tuple[str, ...]:
    models = [recipe.base_model, *(entry.model for entry in recipe.models), *(one.base_model for _, one in recipe.places())]
    return tuple(name for name in names if any(same_model(name, model) for model in models))


def _ordered(stages: Sequence[StageRecipe], where: str) -> list[StageRecipe]:
    """Every stage behind those that it needs; the file's order where that leaves a choice."""
    used = {name for stage in stages for name in stage.needs}
    results = [stage for stage in stages if stage.name not in used]
    if len(results) != 1:
        shown = ", ".join(stage.name or "the one without a name" for stage in results) or "none"
        raise RecipeError(
            f"{where}: the documents end in {len(results)} results ({shown}), expected one that no other document names as its model; put each into "
            "a file of its own"
            if results
            else f"{where}: every document names another one's result, in a circle; one of them must start from models that exist"
        )
    done: list[StageRecipe] = []
    left = [stage for stage in stages if stage is not results[0]] + results
    while left:
        ready = [stage for stage in left if all(name in {one.name for one in done} for name in stage.needs)]
        if not ready:
            circle = " and ".join(stage.name or "the result" for stage in left)
            raise RecipeError(f"{where}: {circle} wait for each other; a stage cannot be made of its own result")
        done.append(ready[0])
        left.remove(ready[0])
    return done
