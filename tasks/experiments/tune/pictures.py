"""Pictures of a tuning: how the loss fell, and the scales by layer and role."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import altair as alt
import pandas as pd

from ota_core.plan.roles import place_of
from tasks.experiments.tune.learn import Learned
from tasks.pages.pictures import style
from tasks.pages.pictures.grids import Shade, grids, place

MEAN = "mean"


def table_of(learned: Learned) -> pd.DataFrame:
    """One row a step and capability, and one of their mean: step, capability, train, held_out (missing where it was not looked at)."""
    rows: list[dict[str, Any]] = []
    for step in learned.steps:
        for name in learned.start.held_out or {}:
            rows.append({"capability": name, "train": step.train.get(name), "held_out": (step.held_out or {}).get(name)})
            rows[-1] |= {"step": step.number, "seconds": step.seconds}
    frame = pd.DataFrame(rows, columns=["step", "capability", "train", "held_out", "seconds"])
    mean = frame.groupby("step", as_index=False)[["train", "held_out", "seconds"]].mean().assign(capability=MEAN)
    return pd.concat([frame, mean], ignore_index=True)


def losses(learned: Learned) -> alt.FacetChart:
    """Loss over steps, a panel for each capability and their mean: a line for the steps' own blocks, points for what is held out."""
    table, unit = table_of(learned), unit_of(learned.objective)
    parts = ["blocks of the step", "held out"]
    long = table.melt(["step", "capability"], ["train", "held_out"], "of", "loss").dropna()
    long["of"] = long["of"].map(dict(zip(["train", "held_out"], parts, strict=True)))
    colour = alt.Color("of:N", title=None, scale=alt.Scale(domain=parts, range=["#b0b0b0", style.CATEGORIES[0]]))
    chart = alt.Chart(long).encode(
        x=alt.X("step:Q", axis=alt.Axis(format="d", tickMinStep=1)),
        y=alt.Y("loss:Q", title=unit, scale=alt.Scale(zero=False)),
        color=colour,
        tooltip=["capability:N", "step:Q", "of:N", alt.Tooltip("loss:Q", format=".4f")],
    )
    kept = alt.Chart(long).mark_rule(color=style.INK, strokeDash=[4, 3]).encode(x=alt.datum(learned.best))
    points = chart.transform_filter(alt.datum.of == parts[1]).mark_point()
    order = [MEAN, *(learned.start.held_out or {})]
    panel = alt.layer(chart.mark_line(), points, kept).properties(width=style.PANEL, height=160)
    facet = alt.Facet("capability:N", title=None, sort=order)
    return panel.facet(facet, columns=3).resolve_scale(y="independent").resolve_axis(x="independent")


def scales_table(
    experts: Sequence[str], scales: Mapping[str, Sequence[float]], shapes: Mapping[str, tuple[int, ...]]
) -> pd.DataFrame:
    """One row an expert, layer and role: the mean of the scales of its tensors, by their elements."""
    rows = []
    for name, values in scales.items():
        where, elements = place_of(name), prod(shapes[name])
        rows += [
            (expert, where.layer, where.role, value * elements, elements) for expert, value in zip(experts, values, strict=True)
        ]
    frame = pd.DataFrame(rows, columns=["expert", "layer", "role", "value", "elements"])
    found = frame.groupby(["expert", "layer", "role"], dropna=False, sort=False, as_index=False).sum()
    return found.assign(value=found["value"] / found["elements"])


def scales_picture(table: pd.DataFrame) -> alt.FacetChart:
    """The scales by layer and role, a grid for each expert."""
    tooltip: list[Any] = [
        "expert:N",
        alt.Tooltip("layer:Q", format="d"),
        "role:N",
        alt.Tooltip("value:Q", title="scale", format=".3f"),
    ]
    return grids(place(table), Shade.of(table["value"], "scale (1 = the recipe as given)", ".2f", about=1.0), tooltip)


def unit_of(objective: str) -> str:
    """What a loss is measured in."""
    return "KL to the expert (bits per token)" if objective == "kl" else "loss (bits per byte)"
