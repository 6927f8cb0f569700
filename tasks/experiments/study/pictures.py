"""Pictures of a study: methods by capability, score against density, grafted single experts, bytes against quality, sweeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from tasks.experiments.study.cells import Cell
from tasks.experiments.study.losses import ranked
from tasks.experiments.study.rows import ERROR, StudyTable, words
from tasks.experiments.study.scores import AVERAGE, StudyResults
from tasks.experiments.study.tables import grafted
from tasks.pages.pictures.picture import Picture
from tasks.pages.pictures.style import CATEGORIES, FACE, INK, PANEL, SHAPES, VARIANT_COLOURS

VARIANTS = tuple(VARIANT_COLOURS)
_REFERENCE = "#595959"
# Without these the symbols are as faint as the bands of the same colours.
_LEGEND = alt.Legend(symbolOpacity=1, symbolStrokeWidth=0)


def pictures(results: StudyResults, made: Sequence[StudyTable]) -> dict[str, Picture]:
    """Name to picture, of what the grid has cells for. A picture is named after the table whose numbers it draws."""
    tables = {one.key: one for one in made}
    found: dict[str, Picture] = {}
    if "methods" in tables:
        found["methods"] = _methods(results, tables["methods"])
    if merges := ranked(results):
        found["losses"] = _losses(results, merges)
    if "density" in tables:
        found["density"] = _density(results, tables["density"])
    if "grafting" in tables:
        found["grafting"] = _grafting(results, tables["grafting"])
    if "compression" in tables and (known := _compression(results, tables["compression"])):
        found["compression"] = known
    for key in ("lambda", "power", "sweep-density"):
        if key in tables and (drawn := _sweep(results, tables[key])):
            found[key] = drawn
    return found


def _methods(results: StudyResults, table: StudyTable) -> Picture:
    """A row a model, a panel a capability."""
    panels = (*results.capabilities, AVERAGE)
    rows = []
    for _, row in table.frame.iterrows():
        own = results.experts.get(row["model"]) if row["kind"] == "expert" else None
        for panel in panels:
            role = "expert on its own capability" if own == panel else str(row["kind"])
            rows.append({"model": row["model"], "role": role, "panel": panel} | _percent(row, panel))
    roles = {"base": FACE["base"], "expert": FACE["expert"], "expert on its own capability": FACE["own"], "merge": FACE["merge"]}
    base = alt.Chart().encode(
        y=_model_rows(list(table.frame["model"])),
        color=alt.Color("role:N", title=None, scale=_scale(list(roles), tuple(roles.values()))),
        tooltip=_tooltip("model", "panel"),
    )
    points = base.mark_point(filled=True, size=70, stroke=INK, strokeWidth=0.5, opacity=1).encode(
        x=alt.X("score:Q", title="score in percent", axis=alt.Axis(tickCount=4), scale=alt.Scale(zero=True)),
        shape=alt.Shape("role:N", title=None, scale=_scale(list(roles), SHAPES)),
    )
    bars = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    data = pd.DataFrame(rows).dropna(subset=["score"])
    chart = alt.layer(bars, points, data=data).properties(width=160, height=alt.Step(18))
    caption = f"Score on each capability and their average. {_errors('Lines', results)} Each row is a model of the table."
    return Picture("Methods and capabilities", caption, _facet(chart, "panel", list(panels)))


def _losses(results: StudyResults, merges: Sequence[Cell]) -> Picture:
    """How much worse each merge is than the best: the losses themselves, with base and experts, are too far apart to be told apart on one axis."""
    best, panels = merges[0], {AVERAGE: results.lossy} | {name: (name,) for name in results.lossy}
    rows = [
        {"model": words(cell), "panel": panel} | _band("difference", *results.loss_difference(cell, best, names))
        for panel, names in panels.items()
        for cell in merges
    ]
    data, models = pd.DataFrame(rows), [words(cell) for cell in merges]
    # Marks are thin across and lines wide along, so that no mark hides a line.
    base = alt.Chart().encode(y=_model_rows(models))
    axis, scale = alt.Axis(tickCount=5, format="~g", grid=True), alt.Scale(padding=12, nice=False)
    x = alt.X("difference:Q", title="difference in bits per byte", axis=axis, scale=scale)
    layers = alt.layer(
        _dashed(x=alt.datum(0)),
        base.mark_rule(strokeWidth=4, color=CATEGORIES[5]).encode(x="low:Q", x2="high:Q"),
        base.mark_tick(thickness=2, size=13, color=INK, opacity=1).encode(
            x=x, tooltip=_tooltip("model", "panel", value="difference", digits=".4f")
        ),
    )
    wide = alt.layer(*layers.layer, data=data[data["panel"] == AVERAGE]).properties(width=700, height=alt.Step(20), title=AVERAGE)
    narrow = alt.layer(*layers.layer, data=data[data["panel"] != AVERAGE]).properties(width=212, height=alt.Step(18))
    chart: alt.TopLevelMixin = wide
    if len(results.lossy) > 1:  # the average of one is that one
        chart = alt.vconcat(wide, _facet(narrow, "panel", list(results.lossy)).resolve_scale(x="independent"))
    paired = "replicate by replicate" if results.over == "replicates" else "document by document"
    caption = (
        f"Bits per byte that each merge needs more than {words(best)}, the one with the lowest average on these documents (dashed): less is better. "
        f"Lines: ± one standard error of the difference, {paired}. Every panel has a scale of its own. The losses themselves, and those "
        "of base and experts, stand in the table."
    )
    return Picture("Loss on held-out text", caption, chart)


def _density(results: StudyResults, table: StudyTable) -> Picture:
    rows = [
        {"recipe": row.get("recipe", ""), "variant": name, "density": row["density"]} | _percent(row, name)
        for _, row in table.frame.iterrows()
        for name in VARIANTS
    ]
    data = pd.DataFrame(rows).dropna(subset=["score"]).assign(base=100 * results.average(results.models()).mean)
    caption = (
        f"Average over the capabilities of merges of all experts, against the density of each expert. {_errors('Bands', results)} At density 1 nothing is "
        "masked. Dashed: the base."
    )
    facets = list(dict.fromkeys(data["recipe"]))
    return Picture("Average score against density", caption, _lines(data, "recipe", facets, "average in percent"))


def _grafting(results: StudyResults, table: StudyTable) -> Picture:
    frame = table.frame.set_index("grafted by")
    names = [name for name in grafted(results) if name in frame]
    rows = [
        {"expert": name, "variant": variant, "density": row["density"]}
        | _percent(row, name)
        | {"base": 100 * frame.loc["base", name], "whole": 100 * frame.loc["expert", name]}
        for name in names
        for variant, row in frame.loc[frame.index.isin(VARIANTS)].iterrows()
    ]
    caption = (
        f"Only the best elements of one expert, grafted onto the base: score on the expert's own capability. {_errors('Bands', results)} "
        "Dashed: the base, below, and the whole expert, above."
    )
    data = pd.DataFrame(rows).dropna(subset=["score"])
    return Picture("Single experts grafted onto the base", caption, _lines(data, "expert", names, "score in percent"))


def _lines(data: pd.DataFrame, facet: str, order: list[str], title: str) -> alt.TopLevelMixin:
    """Score against density, a line a variant, with bands and dashed references; a panel each value of ``facet``."""
    ticks = sorted({*data["density"], 1.0})
    x = alt.X(
        "density:Q",
        title="density",
        scale=alt.Scale(type="log", domain=[ticks[0], 1.0]),
        axis=alt.Axis(values=ticks, format="~g", labelOverlap="greedy"),
    )
    title_of_variants = "elements kept by"
    colours = _scale(list(VARIANTS), tuple(VARIANT_COLOURS.values()))
    colour = alt.Color("variant:N", title=title_of_variants, scale=colours, legend=_LEGEND)
    shape = alt.Shape("variant:N", title=title_of_variants, scale=_scale(list(VARIANTS), ("circle", "square")))
    chart = _curves(data, x, title, colour, shape, _tooltip("variant", "density"), band=0.2)
    width, height = (460, 240) if len(order) == 1 else (PANEL, 190)
    return _facet(chart.properties(width=width, height=height), facet, order)


def _curves(
    data: pd.DataFrame, x: alt.X, title: str, colour: alt.Color, shape: alt.Shape, tooltip: list[alt.Tooltip], *, band: float
) -> alt.LayerChart | alt.FacetChart:
    """Lines with points, over bands of this opacity and dashed references: the columns ``base`` and ``whole`` where there are any."""
    y = alt.Y("score:Q", title=title, scale=alt.Scale(zero=False))
    base = alt.Chart().encode(x=x, color=colour)
    return alt.layer(
        *(_dashed(y=alt.Y(f"mean({key}):Q", title=title)) for key in ("base", "whole") if key in data),
        base.mark_area(opacity=band).encode(y=alt.Y("low:Q", title=title), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_point(filled=True, size=55, opacity=1).encode(y=y, shape=shape, tooltip=tooltip),
        data=data,
    )


def _compression(results: StudyResults, table: StudyTable) -> Picture | None:
    """None where no merge's second moments are among the artifacts: nobody knows what they take."""
    frame = table.frame.dropna(subset=["bytes/parameter"])
    if frame.empty:
        return None
    rows = [
        {
            "moments": row["second moments"],
            "recipe": row.get("recipe", ""),
            "bytes": row["bytes/parameter"],
            "error": row["√v error"],
        }
        | _percent(row, AVERAGE)
        for _, row in frame.iterrows()
    ]
    data = pd.DataFrame(rows)
    low, high = math.floor(math.log10(data["bytes"].min())), math.ceil(math.log10(data["bytes"].max()))
    x = alt.X(
        "bytes:Q",
        title="stored second moments, bytes/parameter",
        scale=alt.Scale(type="log", domain=[10.0**low, 10.0**high], nice=False),
        axis=alt.Axis(format="~g", values=[10.0**power for power in range(low, high + 1)]),
    )
    y = alt.Y("score:Q", title="average in percent", scale=alt.Scale(zero=False, padding=12))
    colour = alt.Color("moments:N", title=None, sort=list(dict.fromkeys(data["moments"])), legend=None)
    base = alt.Chart().encode(x=x, color=colour)
    bars = base.mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q", title="average in percent"), y2="high:Q")
    points = base.mark_point(filled=True, size=90, opacity=1).encode(
        y=y,
        tooltip=[
            *_tooltip("moments"),
            alt.Tooltip("bytes:Q", format=".3g"),
            alt.Tooltip("error:Q", title="√v error", format=".3g"),
        ],
    )
    words = base.mark_text(align="left", dx=9, dy=-9, fontSize=12).encode(y=y, text="moments:N")
    chart = alt.layer(bars, points, words, data=data).properties(width=460, height=240)
    caption = f"Average of merges of all experts against what the stored second moments take. {_errors('Lines', results)}"
    if lost := list(dict.fromkeys(table.frame["second moments"].drop(frame.index))):
        caption += f" Left out, because second moments are no longer among the artifacts: {', '.join(lost)}."
    return Picture("Bytes per parameter and quality", caption, _facet(chart, "recipe", list(dict.fromkeys(data["recipe"]))))


def _sweep(results: StudyResults, table: StudyTable) -> Picture | None:
    """None where no value is a number: one that differs between the experts is no point of an axis."""
    key = {"sweep-density": "density"}.get(table.key, table.key)
    frame = table.frame if "recipe" in table.frame else table.frame.assign(recipe="")
    frame = frame.assign(**{key: pd.to_numeric(frame[key], errors="coerce")}).dropna(subset=[key])
    if frame.empty:
        return None
    data = pd.DataFrame([{"recipe": row["recipe"], "at": row[key]} | _percent(row, AVERAGE) for _, row in frame.iterrows()])
    data["base"] = 100 * results.average(results.models()).mean
    recipes = list(dict.fromkeys(data["recipe"]))
    legend = alt.Legend(columns=2, symbolOpacity=1, symbolStrokeWidth=0) if len(recipes) > 1 else None
    # The whole scales, so that colour and shape have one legend.
    colour = alt.Color("recipe:N", title=None, scale=_scale(recipes, CATEGORIES), legend=legend)
    shape = alt.Shape("recipe:N", title=None, scale=_scale(recipes, SHAPES), legend=legend)
    x = alt.X("at:Q", title={"lambda": "λ"}.get(key, key), scale=alt.Scale(zero=False))
    tooltip = [*_tooltip("recipe"), alt.Tooltip("at:Q", title=key)]
    chart = _curves(data, x, "average in percent", colour, shape, tooltip, band=0.15).properties(width=460, height=240)
    caption = f"Average of merges of all experts. {_errors('Bands', results)} Dashed: the base."
    return Picture(table.title, caption, chart)


def _model_rows(models: list[str]) -> alt.Y:
    return alt.Y("model:N", sort=models, title=None, axis=alt.Axis(grid=True, labelLimit=330))


def _dashed(**where: Any) -> alt.Chart:
    """A line that others are seen against."""
    return alt.Chart().mark_rule(strokeDash=[5, 4], color=_REFERENCE).encode(**where)


def _scale(names: list[str], values: tuple[str, ...]) -> alt.Scale:
    return alt.Scale(domain=names, range=[values[i % len(values)] for i in range(len(names))])


def _facet(chart: Any, by: str, order: list[str]) -> alt.TopLevelMixin:
    """A panel each value; one value needs no panel and no heading."""
    if len(order) == 1:
        return chart
    header = alt.Header(title=None)
    return chart.facet(facet=alt.Facet(f"{by}:N", sort=order, header=header), columns=3)


def _percent(row: Any, name: str) -> dict[str, float]:
    """Score and its band in percent, which ends at 0 and 100."""
    return _band("score", 100 * float(row[name]), 100 * float(row[f"{name}{ERROR}"]), (0.0, 100.0))


def _band(name: str, mean: float, error: float, ends: tuple[float, float] = (-math.inf, math.inf)) -> dict[str, float]:
    """A number and its band. Without a standard error the band is the number itself."""
    error = 0.0 if math.isnan(error) else error
    return {name: mean, f"error of {name}": error, "low": max(mean - error, ends[0]), "high": min(mean + error, ends[1])}


def _tooltip(*names: str, value: str = "score", digits: str = ".1f") -> list[alt.Tooltip]:
    numbers = [
        alt.Tooltip(f"{value}:Q", format=digits),
        alt.Tooltip(f"error of {value}:Q", title="standard error", format=digits),
    ]
    return [*(alt.Tooltip(f"{name}:N") for name in names), *numbers]


def _errors(marks: str, results: StudyResults) -> str:
    return f"{marks}: ± one standard error over {results.over}."
