"""Pictures of a study: methods by capability, score against density, grafted single experts, bytes against quality, sweeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import pandas as pd

from tasks.experiments.study.cells import Cell
from tasks.experiments.study.losses import ranked
from tasks.experiments.study.rows import ERROR, StudyTable, words
from tasks.experiments.study.scores import AVERAGE, Estimate, StudyResults
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
    caption = f"Score on each capability and their average. {_bars(results)} Each row is a model of the table."
    chart = _dots(results, table, (*results.capabilities, AVERAGE), "score in percent", _percent, "score", ".1f")
    return Picture("Methods and capabilities", caption, chart)


def _losses(results: StudyResults, merges: Sequence[Cell]) -> Picture:
    """How much worse each merge is than the best: the losses themselves, with base and experts, are too far apart to be told apart on one axis."""
    best, panels = merges[0], {AVERAGE: results.lossy} | {name: (name,) for name in results.lossy}
    rows = [
        {"model": words(cell), "panel": panel} | _difference(results.loss_difference(cell, best, names))
        for panel, names in panels.items()
        for cell in merges
    ]
    data, models = pd.DataFrame(rows), [words(cell) for cell in merges]
    # Marks are thin across and lines wide along, so that no mark hides a line.
    base = alt.Chart().encode(y=alt.Y("model:N", sort=models, title=None, axis=alt.Axis(grid=True, labelLimit=330)))
    axis, scale = alt.Axis(tickCount=5, format="~g", grid=True), alt.Scale(padding=12, nice=False)
    x = alt.X("difference:Q", title="difference in bits per byte", axis=axis, scale=scale)
    layers = alt.layer(
        alt.Chart().mark_rule(strokeDash=[5, 4], color=_REFERENCE).encode(x=alt.datum(0)),
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
    caption = (
        f"Bits per byte that each merge needs more than {words(best)}, the one with the lowest average on these documents (dashed): less is better. "
        f"Lines: ± one standard error of the difference, {_paired_over(results)}. Every panel has a scale of its own. The losses themselves, and those "
        "of base and experts, stand in the table."
    )
    return Picture("Loss on held-out text", caption, chart)


def _dots(
    results: StudyResults, table: StudyTable, panels: tuple[str, ...], title: str, read: Callable[[Any, str], dict[str, float]],
    value: str, digits: str,
) -> alt.TopLevelMixin:  # fmt: skip
    """A row a model, a panel a capability."""
    models = list(table.frame["model"])
    rows = []
    for _, row in table.frame.iterrows():
        own = results.experts.get(row["model"]) if row["kind"] == "expert" else None
        for panel in panels:
            role = "expert on its own capability" if own == panel else str(row["kind"])
            rows.append({"model": row["model"], "role": role, "panel": panel} | read(row, panel))
    roles = {"base": FACE["base"], "expert": FACE["expert"], "expert on its own capability": FACE["own"], "merge": FACE["merge"]}
    data = pd.DataFrame(rows).dropna(subset=[value])
    base = alt.Chart().encode(
        y=alt.Y("model:N", sort=models, title=None, axis=alt.Axis(grid=True, labelLimit=330)),
        color=alt.Color("role:N", title=None, scale=alt.Scale(domain=list(roles), range=list(roles.values()))),
        tooltip=_tooltip("model", "panel", value=value, digits=digits),
    )
    points = base.mark_point(filled=True, size=70, stroke=INK, strokeWidth=0.5, opacity=1).encode(
        x=alt.X(f"{value}:Q", title=title, axis=alt.Axis(tickCount=4), scale=alt.Scale(zero=value == "score")),
        shape=alt.Shape("role:N", title=None, scale=alt.Scale(domain=list(roles), range=list(SHAPES[:4]))),
    )
    bars = base.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q")
    chart = alt.layer(bars, points, data=data).properties(width=160, height=alt.Step(18))
    return _facet(chart, "panel", list(panels))


def _density(results: StudyResults, table: StudyTable) -> Picture:
    data = _long(table, VARIANTS)
    base = results.average(results.models()).mean
    data["base"] = 100 * base
    caption = (
        f"Average over the capabilities of merges of all experts, against the density of each expert. {_bands(results)} At density 1 nothing is "
        "masked. Dashed: the base."
    )
    facets = list(dict.fromkeys(data["recipe"]))
    return Picture("Average score against density", caption, _lines(data, "recipe", facets, "average in percent"))


def _grafting(results: StudyResults, table: StudyTable) -> Picture:
    frames = []
    for name in grafted(results):
        if name not in table.frame:
            continue
        frame = table.frame
        part = frame[frame["grafted by"].isin(VARIANTS)]
        data = pd.DataFrame(
            [{"variant": row["grafted by"], "density": row["density"]} | _percent(row, name) for _, row in part.iterrows()]
        )
        data["expert"] = name
        for reference in ("base", "expert"):
            data[f"{reference}_score"] = 100 * float(frame.loc[frame["grafted by"] == reference, name].iloc[0])
        frames.append(data)
    data = pd.concat(frames).dropna(subset=["score"]).rename(columns={"base_score": "base", "expert_score": "whole"})
    caption = (
        f"Only the best elements of one expert, grafted onto the base: score on the expert's own capability. {_bands(results)} "
        "Dashed: the base, below, and the whole expert, above."
    )
    names = list(dict.fromkeys(data["expert"]))
    return Picture("Single experts grafted onto the base", caption, _lines(data, "expert", names, "score in percent"))


def _lines(data: pd.DataFrame, facet: str, order: list[str], title: str) -> alt.TopLevelMixin:
    """Score against density, a line a variant, with bands and dashed references; a panel each value of ``facet``."""
    ticks = sorted({*data["density"], 1.0})
    ends = [ticks[0], 1.0]
    x = alt.X(
        "density:Q",
        title="density",
        scale=alt.Scale(type="log", domain=ends),
        axis=alt.Axis(values=ticks, format="~g", labelOverlap="greedy"),
    )
    y = alt.Y("score:Q", title=title, scale=alt.Scale(zero=False))
    colour = alt.Color(
        "variant:N",
        title="elements kept by",
        scale=alt.Scale(domain=list(VARIANTS), range=[VARIANT_COLOURS[name] for name in VARIANTS]),
        legend=_LEGEND,
    )
    shape = alt.Shape("variant:N", title="elements kept by", scale=alt.Scale(domain=list(VARIANTS), range=["circle", "square"]))
    base = alt.Chart().encode(x=x)
    layers: list[Any] = [
        alt.Chart().mark_rule(strokeDash=[5, 4], color=_REFERENCE).encode(y=alt.Y(f"mean({key}):Q", title=title))
        for key in ("base", "whole")
        if key in data
    ]
    layers.append(base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q", title=title), y2="high:Q", color=colour))
    layers.append(base.mark_line(strokeWidth=2).encode(y=y, color=colour))
    layers.append(
        base.mark_point(filled=True, size=55, opacity=1).encode(
            y=y, color=colour, shape=shape, tooltip=_tooltip("variant", "density")
        )
    )
    width, height = (460, 240) if len(order) == 1 else (PANEL, 190)
    return _facet(alt.layer(*layers, data=data).properties(width=width, height=height), facet, order)


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
    caption = f"Average of merges of all experts against what the stored second moments take. {_bars(results)}"
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
    title = "average in percent"
    base = alt.Chart().encode(x=alt.X("at:Q", title={"lambda": "λ"}.get(key, key), scale=alt.Scale(zero=False)), color=colour)
    y = alt.Y("score:Q", title=title, scale=alt.Scale(zero=False))
    chart = alt.layer(
        alt.Chart().mark_rule(strokeDash=[5, 4], color=_REFERENCE).encode(y=alt.Y("mean(base):Q", title=title)),
        base.mark_area(opacity=0.15).encode(y=alt.Y("low:Q", title=title), y2="high:Q"),
        base.mark_line(strokeWidth=2).encode(y=y),
        base.mark_point(filled=True, size=55, opacity=1).encode(
            y=y,
            shape=shape,
            tooltip=[*_tooltip("recipe"), alt.Tooltip("at:Q", title=key)],
        ),
        data=data,
    ).properties(width=460, height=240)
    caption = f"Average of merges of all experts. {_bands(results)} Dashed: the base."
    return Picture(table.title, caption, chart)


def _scale(names: list[str], values: tuple[str, ...]) -> alt.Scale:
    return alt.Scale(domain=names, range=[values[i % len(values)] for i in range(len(names))])


def _facet(chart: Any, by: str, order: list[str]) -> alt.TopLevelMixin:
    """A panel each value; one value needs no panel and no heading."""
    if len(order) == 1:
        return chart
    header = alt.Header(title=None)
    return chart.facet(facet=alt.Facet(f"{by}:N", sort=order, header=header), columns=3)


def _long(table: StudyTable, variants: tuple[str, ...]) -> pd.DataFrame:
    """Rows of the density table as variant, density, score, low, high, recipe."""
    rows = [
        {"recipe": row.get("recipe", ""), "variant": name, "density": row["density"]} | _percent(row, name)
        for _, row in table.frame.iterrows()
        for name in variants
    ]
    return pd.DataFrame(rows).dropna(subset=["score"])


def _percent(row: Any, name: str) -> dict[str, float]:
    """Score and its band in percent, which ends at 0 and 100. Without a standard error the band is the score itself."""
    score, error = 100 * float(row[name]), 100 * float(row[f"{name}{ERROR}"])
    error = 0.0 if math.isnan(error) else error
    return {"score": score, "error of score": error, "low": max(score - error, 0.0), "high": min(score + error, 100.0)}


def _difference(found: Estimate) -> dict[str, float]:
    """A difference and its band in bits per byte. Without a standard error the band is the difference itself."""
    error = 0.0 if math.isnan(found.error) else found.error
    return {
        "difference": found.mean,
        "error of difference": error,
        "low": found.mean - error,
        "high": found.mean + error,
    }


def _tooltip(*names: str, value: str = "score", digits: str = ".1f") -> list[alt.Tooltip]:
    numbers = [
        alt.Tooltip(f"{value}:Q", format=digits),
        alt.Tooltip(f"error of {value}:Q", title="standard error", format=digits),
    ]
    return [*(alt.Tooltip(f"{name}:N") for name in names), *numbers]


def _bars(results: StudyResults) -> str:
    return f"Lines: ± one standard error over {results.over}."


def _paired_over(results: StudyResults) -> str:
    return "replicate by replicate" if results.over == "replicates" else "document by document"


def _bands(results: StudyResults) -> str:
    return f"Bands: ± one standard error over {results.over}."
