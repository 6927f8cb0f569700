"""What a search leaves behind: the winner as a recipe, tables for people, a page with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ota_core.recipe.recipe import MergeRecipe
from ota_core.recipe.yaml_text import dump_yaml
from tasks.experiments.search.config import SearchConfig
from tasks.experiments.search.search import Trial, Tuned
from tasks.experiments.search.space import Dimension
from tasks.merging.inputs import locate
from tasks.storage.models import is_s3

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 6


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
    located = _located(best.recipe, recipe_dir, out)
    return "".join(f"# {line}\n" for line in lines) + dump_yaml(
        located.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    )


def missed(trial: Trial) -> str:
    """The floors that a trial misses, in words."""
    return ", ".join(f"{name} {_percent(trial.last[name])} instead of {_percent(trial.floors[name])}" for name in trial.shortfall)


def ranked(tuned: Tuned) -> list[Trial]:
    """Trials from the best to the worst: complete ones first, under the floors before others."""
    return sorted(tuned.trials, key=lambda one: (not one.complete, bool(one.shortfall), one.violation, -one.average, one.number))


def render(tuned: Tuned) -> Table:
    """The best trials and the recipe as given, a column each: narrow enough for 80 columns of a terminal."""
    from rich import box
    from rich.table import Table

    header, rows = text_rows(tuned, SHOWN)
    drawn = Table(
        title="Best trials",
        caption=legend(tuned),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for i, cell in enumerate([header[0], *(row[0] for row in rows)]):
        drawn.add_column(cell, justify="right" if i else "left")
    ends = {0, len(tuned.best.last)}  # lines below the average, and between scores and values
    for i, name in enumerate(header[1:]):
        drawn.add_row(name, *(row[i + 1] for row in rows), end_section=i in ends)
    return drawn


def text_rows(tuned: Tuned, shown: int) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the best trials; the recipe as given is always among them."""
    names, searched = list(tuned.best.last), list(dict.fromkeys(name for trial in tuned.trials for name in trial.values))
    trials = ranked(tuned)[:shown]
    if tuned.start not in trials:
        trials.append(tuned.start)
    rows = []
    for trial in trials:
        scores = [_percent(trial.last[name]) + ("*" if name in trial.shortfall else "") for name in names]
        values = [f"{trial.values[name]:g}" if name in trial.values else "" for name in searched]
        label = "recipe" if trial.origin == "recipe" else str(trial.number)
        rows.append([label, _percent(trial.average), *scores, *values])
    return ["trial", "average", *names, *searched], rows


def markdown(tuned: Tuned) -> str:
    """The best trials as a page of the flow run."""
    header, rows = text_rows(tuned, 2 * SHOWN)
    lines = [f"| {' | '.join(cells)} |" for cells in [header, ["---", *["---:"] * (len(header) - 1)], *rows]]
    return "\n".join([verdict(tuned), "", *lines, "", legend(tuned), ""])


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
    from tasks.experiments.search.pictures import best_so_far, table_of, values_against_average
    from tasks.pages.pictures import page

    found: dict[str, str | bytes] = {"recipe.yaml": recipe_yaml, "tables/trials.csv": table_of(tuned).to_csv(index=False)}
    pictures = [
        page.Picture(
            "Best average",
            " ".join(
                [
                    "Every trial by its average score on the validation suite. Trials that were stopped early were measured on fewer documents.",
                    *_likelihoods(tuned),
                ]
            ),
            best_so_far(tuned),
        )
    ]
    if dimensions:
        ranges = {one.name: one.within for one in dimensions}
        pictures.append(
            page.Picture(
                "Values", "Each value that was searched against the average of its trial.", values_against_average(tuned, ranges)
            )
        )
    for name, picture in zip(("best", "values"), pictures, strict=False):
        found[f"plots/{name}.png"] = page.png(picture.chart)
    header, rows = text_rows(tuned, len(tuned.trials))
    table = page.table(header, rows, numbers=range(1, len(header)), strong=[0])
    sections = [page.Section("Result", [verdict(tuned), *pictures]), page.Section("All trials", [table])]
    return found | {"search.html": page.to_html(title, sections)}


def _located(recipe: MergeRecipe, recipe_dir: Path | None, out: str) -> MergeRecipe:
    """The recipe with the paths that it has, where they mean the same from the place of ``out``; else with whole ones."""
    if is_s3(out) or (recipe_dir is not None and Path(out).expanduser().resolve().parent == recipe_dir.resolve()):
        return recipe

    def preconditioner(path: str) -> str:
        beside = recipe_dir / path if recipe_dir else None
        return str(beside.resolve()) if beside and beside.exists() else path

    raw: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
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
