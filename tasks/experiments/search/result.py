"""What a search leaves behind: the winner as a recipe, tables for people, a page with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ota_core.recipe.recipe import MergeRecipe
from ota_core.recipe.slices import same_model
from ota_core.recipe.yaml_text import as_comment, dump_yaml
from tasks.experiments.search.config import SearchConfig
from tasks.experiments.search.search import Trial, Tuned
from tasks.experiments.search.space import CHOICES, Dimension
from tasks.merging.composed import locate
from tasks.pages import terminal
from tasks.pages.markdown import captioned
from tasks.pages.tables import NUMBER, PERCENT, TEXT, Column, Table, Unit
from tasks.storage.models import is_s3

SHOWN = 6
_TRADE_OFFS = (
    "Every trial on all documents, one line each; the coloured ones form the Pareto front: no other trial is as good in every capability and "
    "better in one. Short bars, or dashed lines, are the floors. The average chose the winner, which need not be what you would choose."
)
_AVERAGE = Unit("percent", ".1f")


def legend(tuned: Tuned) -> str:
    """What the numbers of the tables are."""
    return " ".join(["Scores on the validation suite in percent; * below the floor.", *_likelihoods(tuned)])


def _likelihoods(tuned: Tuned) -> list[str]:
    names = ", ".join(tuned.likelihoods)
    return [f"Of {names}: the likelihood of a byte of held-out text, 2 to the minus bits per byte."] if names else []


def recipe_text(tuned: Tuned, config: SearchConfig, recipe_dir: Path | None, out: str) -> str:
    """The winner's recipe as YAML with comments on top that say where it comes from. It can be merged from where it is written."""
    best, start = tuned.best, tuned.start
    lines = [
        f"Found by a search from {config.recipe if isinstance(config.recipe, str) else 'a recipe'}: "
        f"trial {best.number} of {len(tuned.trials)}, {tuned.evaluations:g} evaluations, seed {config.seed}.",
        f"Validation suite {config.suite}, {max(best.scores)} documents a task: average {_percent(best.average)} "
        f"({', '.join(f'{name} {_percent(value)}' for name, value in best.last.items())}); the recipe before: {_percent(start.average)}.",
    ]
    lines += _likelihoods(tuned)
    if best.floors:
        lines.append("Floors: " + ", ".join(f"{name} {_percent(value)}" for name, value in best.floors.items()) + ".")
    if not tuned.feasible:
        lines.append(f"NO TRIAL HELD ALL FLOORS. This one misses them by the least: {missed(best)}.")
    lines.append("The average chose this recipe, and so flatters it: judge it on documents of another split.")
    placed = located(best.recipe, recipe_dir, out)
    return as_comment(lines) + dump_yaml(placed.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True))


def missed(trial: Trial) -> str:
    """The floors that a trial misses, in words."""
    return ", ".join(f"{name} {_percent(trial.last[name])} instead of {_percent(trial.floors[name])}" for name in trial.shortfall)


def ranked(tuned: Tuned) -> list[Trial]:
    """Trials from the best to the worst: complete ones first, under the floors before others."""
    return sorted(tuned.trials, key=lambda one: (not one.complete, bool(one.shortfall), one.violation, -one.average, one.number))


def trials(tuned: Tuned, shown: int) -> Table:
    """The best trials, and always the recipe as given."""
    from tasks.experiments.search.pictures import table_of

    best = ranked(tuned)[:shown]
    best += [tuned.start] if tuned.start not in best else []
    frame = table_of(tuned).set_index("trial", drop=False).loc[[one.number for one in best]]
    frame["label"] = ["recipe" if one.origin == "recipe" else str(one.number) for one in best]
    for name in tuned.best.last:
        frame[f"missed/{name}"] = [name in one.shortfall for one in best]
    searched = dict.fromkeys(name for trial in tuned.trials for name in trial.values)
    columns = [
        Column("label", "trial"), Column("average", unit=_AVERAGE),
        *(Column(f"score/{name}", name, PERCENT, mark=f"missed/{name}") for name in tuned.best.last),
        *(Column(name, name, TEXT if name in CHOICES else NUMBER, absent="") for name in searched),
    ]  # fmt: skip
    return Table("Best trials", frame, columns, [legend(tuned)], strong=[one is tuned.best for one in best])


def render(tuned: Tuned) -> object:
    """The best trials and the recipe as given, a column each: narrow enough for 80 columns of a terminal."""
    return terminal.table(trials(tuned, SHOWN), turned=True)


def markdown(tuned: Tuned) -> str:
    """The best trials as a page of the flow run."""
    return f"{verdict(tuned)}\n\n{captioned(trials(tuned, 2 * SHOWN))}"


def verdict(tuned: Tuned) -> str:
    """The end in one line."""
    best = tuned.best
    spent = f"{len(tuned.trials)} trials, {tuned.evaluations:g} evaluations"
    if not tuned.feasible:
        return f"No trial holds all floors ({spent}). Trial {best.number} misses them by the least: {missed(best)}."
    before = f"the recipe as given {_percent(tuned.start.average)} %"
    if tuned.start.shortfall:
        before += f", which misses floors: {missed(tuned.start)}"
    held = " and holds all floors" if best.floors else ""
    return f"Trial {best.number} is the best{held}: average {_percent(best.average)} %; {before} ({spent})."


def files(tuned: Tuned, dimensions: tuple[Dimension, ...], recipe_yaml: str, title: str) -> dict[str, str | bytes]:
    """What is kept beside the runs in MLflow: recipe, table, pictures, a page."""
    from tasks.experiments.search.front import trade_offs
    from tasks.experiments.search.pictures import best_so_far, table_of, values_against_average
    from tasks.pages.html import Section, to_html
    from tasks.pages.pictures.picture import Picture, png

    found: dict[str, str | bytes] = {"recipe.yaml": recipe_yaml, "tables/trials.csv": table_of(tuned).to_csv(index=False)}
    said = "Every trial by its average score on the validation suite. Trials that were stopped early were measured on fewer documents."
    pictures = [Picture("Best average", " ".join([said, *_likelihoods(tuned)]), best_so_far(tuned))]
    names = ["best"]
    if dimensions:
        drawn = values_against_average(tuned, dimensions)
        pictures.append(Picture("Values", "Each value that was searched against the average of its trial.", drawn))
        names = ["best", "values"]
    if len(tuned.best.last) > 1:
        pictures.append(Picture("Trade-offs", _TRADE_OFFS, trade_offs(tuned)))
        names.append("front")
    for name, picture in zip(names, pictures, strict=True):
        found[f"plots/{name}.png"] = png(picture.chart)
    sections = [Section("Result", [verdict(tuned), *pictures]), Section("All trials", [trials(tuned, len(tuned.trials))])]
    return found | {"search.html": to_html(title, sections)}


def located(recipe: MergeRecipe, recipe_dir: Path | None, out: str) -> MergeRecipe:
    """The recipe with the paths that it has, where they mean the same from the place of ``out``; else with whole ones."""
    if is_s3(out) or (recipe_dir is not None and Path(out).expanduser().resolve().parent == recipe_dir.resolve()):
        return recipe

    def preconditioner(path: str) -> str:
        beside = recipe_dir / path if recipe_dir else None
        return str(beside.resolve()) if beside and beside.exists() else path

    def place(model: str | None) -> str | None:
        known = model is not None and any(same_model(model, entry.model) for entry in recipe.models)
        return locate(model, recipe_dir) if known and model is not None else model

    if recipe.tokenizer is not None:
        recipe = recipe.model_copy(update={"tokenizer": recipe.tokenizer.moved(place)})
    raw: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    if recipe.tokenizer_source.startswith("model:"):
        raw["tokenizer_source"] = f"model:{place(recipe.tokenizer_source.removeprefix('model:'))}"
    if recipe.base_model:
        raw["base_model"] = locate(recipe.base_model, recipe_dir)
    for entry in raw["models"]:
        entry["model"] = locate(entry["model"], recipe_dir)
        own: Mapping[str, Any] = entry.get("parameters", {})
        if "preconditioner_path" in own:
            entry["parameters"]["preconditioner_path"] = preconditioner(own["preconditioner_path"])
    return MergeRecipe.model_validate(raw)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
