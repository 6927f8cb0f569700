"""What a tuning leaves behind: a recipe with its file of scales, tables for people, a page with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ota_core.artifact import write_text_atomic
from ota_core.plan.expert_scales import ExpertScales, scales_digest
from ota_core.recipe.recipe import MergeRecipe
from ota_core.recipe.yaml_text import as_comment, dump_yaml
from tasks.experiments.search.result import located
from tasks.experiments.tune.config import ScalesConfig
from tasks.experiments.tune.learn import Learned
from tasks.pages import terminal
from tasks.pages.markdown import captioned
from tasks.pages.tables import Column, Table, Unit
from tasks.storage.models import is_s3, join, write_bytes, write_note

_LOSS = Unit("", ".4f")
_LESS = Unit("", ".4f", signed=True)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The learned scales and how they came about."""

    learned: Learned
    experts: tuple[str, ...]
    scales: Mapping[str, list[float]]
    """Tensor to the coefficient of each expert."""
    shapes: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()

    def file(self, recipe: MergeRecipe) -> ExpertScales:
        """As it is written, for this recipe."""
        values = {name: np.array(row, np.float64) for name, row in self.scales.items()}
        return ExpertScales(experts=self.experts, values=values, settings=recipe.effective())


def write_result(
    found: Found, recipe: MergeRecipe, config: ScalesConfig, recipe_dir: Path | None, out: str, scratch: Path
) -> str:
    """Write the file of scales and, when it is there whole, the recipe ``out`` that names it; returns the recipe's text.

    Each is written in one step, and the file's name tells its content: whatever recipe is at ``out``, its scales are its own.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    made = scratch / "scales.safetensors"
    found.file(recipe).save(made)
    name = f"{Path(out).stem}.{scales_digest(made)[:8]}.safetensors"
    if is_s3(out):
        named = join(out.rpartition("/")[0], name)
        write_bytes(named, made.read_bytes())
    else:
        named = name
        target = Path(out).expanduser().absolute().with_name(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{name}.tmp")
        temporary.write_bytes(made.read_bytes())
        temporary.replace(target)
    text = recipe_text(found.learned, recipe, config, recipe_dir, out, named)
    if is_s3(out):
        write_note(out, text)
    else:
        write_text_atomic(Path(out).expanduser(), text)
    return text


def recipe_text(
    learned: Learned, recipe: MergeRecipe, config: ScalesConfig, recipe_dir: Path | None, out: str, scales: str
) -> str:
    """The recipe as YAML with comments on top that say where it comes from. It can be merged from where it is written."""
    start, kept = learned.start, learned.kept
    lines = [
        f"Scales learned from {config.recipe if isinstance(config.recipe, str) else 'a recipe'}, one per expert and {config.per}: objective {config.objective}, "
        f"step {learned.best} of {learned.steps[-1].number}, seed {config.seed}.",
        f"On documents of suite {config.suite} that were held out, {_unit(learned)}: {_said(kept.held_out)}; the recipe before: {_said(start.held_out)}.",
        *(["NO STEP WAS BETTER THAN THE RECIPE AS GIVEN: all scales are those that it began with."] if learned.best == 0 else []),
        "These documents chose the step, and so flatter it: judge it on documents of another split.",
    ]
    raw = located(recipe, recipe_dir, out).model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
    return as_comment(lines) + dump_yaml(raw | {"scales": scales})


def table(learned: Learned) -> Table:
    """Losses on what is held out: of the recipe as given, and with the scales that are kept."""
    import pandas as pd

    before, after = learned.start.held_out or {}, learned.kept.held_out or {}
    frame = pd.DataFrame({"capability": list(before), "before": list(before.values()), "after": [after[name] for name in before]})
    frame.loc[len(frame)] = ["average", frame["before"].mean(), frame["after"].mean()]
    frame["change"] = frame["after"] - frame["before"]
    columns = [
        Column("capability"),
        Column("before", "as given", _LOSS),
        Column("after", "learned", _LOSS),
        Column("change", unit=_LESS),
    ]
    caption = [f"{_unit(learned).capitalize()}, less is better, on documents that were held out."]
    return Table("Learned scales", frame, columns, caption, strong=[name == "average" for name in frame["capability"]])


def render(learned: Learned) -> object:
    """For a terminal."""
    return terminal.table(table(learned))


def markdown(learned: Learned) -> str:
    """As a page of the flow run."""
    return f"{verdict(learned)}\n\n{captioned(table(learned))}"


def verdict(learned: Learned) -> str:
    """The end in one line."""
    last, seconds = learned.steps[-1].number, learned.steps[-1].seconds
    if learned.best == 0:
        return f"No step is better than the recipe as given on what is held out ({last} steps, {seconds:.0f} s)."
    before, after = learned.start.value, learned.kept.value
    assert before is not None and after is not None
    return (
        f"Step {learned.best} of {last} is kept: objective {learned.objective} on what is held out {after:.4f}, with the recipe as given "
        f"{before:.4f} ({seconds:.0f} s)."
    )


def files(found: Found, recipe_yaml: str, title: str) -> dict[str, str | bytes]:
    """What is kept beside the run in MLflow, besides the file of scales: recipe, tables, pictures, a page."""
    from tasks.experiments.tune.pictures import losses, scales_picture, scales_table, table_of
    from tasks.pages.html import Section, to_html
    from tasks.pages.pictures.picture import Picture, png

    learned = found.learned
    by_place = scales_table(found.experts, found.scales, found.shapes)
    pictures = {
        "losses": Picture("Loss", "The steps' own blocks and what is held out. Dashed: the step whose scales are kept.", losses(learned)),
        "scales": Picture(
            "Scales", "By what each expert's part of the merged edit is multiplied, by layer and role; the mean of a cell's tensors.",
            scales_picture(by_place),
        ),
    }  # fmt: skip
    made: dict[str, str | bytes] = {
        "recipe.yaml": recipe_yaml, "tables/steps.csv": table_of(learned).to_csv(index=False),
        "tables/scales.csv": by_place.to_csv(index=False),
    }  # fmt: skip
    made |= {f"plots/{name}.png": png(picture.chart) for name, picture in pictures.items()}
    return made | {"tune.html": to_html(title, [Section("Result", [verdict(learned), table(learned), *pictures.values()])])}


def _said(losses: Mapping[str, float] | None) -> str:
    values = losses or {}
    average = sum(values.values()) / max(len(values), 1)
    return f"{average:.4f} ({', '.join(f'{name} {value:.4f}' for name, value in values.items())})"


def _unit(learned: Learned) -> str:
    return "bits per token away from the experts" if learned.objective == "kl" else "bits per byte"
