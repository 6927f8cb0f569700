"""Pictures of an analysis, from its tidy table: one number a row (``tasks/pages/analysis.py`` makes it)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import altair as alt

from ota_core.analysis import Row
from ota_core.errors import OtaError
from tasks.pages.pictures.grids import Shade, grids, layer_axis, layer_count, place
from tasks.pages.pictures.mixture import mixture_pictures
from tasks.pages.pictures.pairs import agreement_pictures, overlap_pictures
from tasks.pages.pictures.picture import Picture
from tasks.pages.pictures.sparsity import sparsity_pictures
from tasks.pages.pictures.style import CATEGORIES, PANEL, SHAPES

if TYPE_CHECKING:
    import pandas as pd

COMPRESSIONS = ("none", "log8", "rank_k", "rank1")
"""From the most bytes to the fewest."""
_LOSSES = {
    "sqrt_error": ("relative error of √v", "0 = exact"),
    "mask_jaccard": ("agreement of the masks", "Jaccard (1 = the same)"),
    "saliency_spearman": ("agreement of the saliency", "Spearman ρ (1 = the same)"),
}
"""Measure to what it is and its axis."""
_PLACE = ("expert:N", alt.Tooltip("layer:Q", format="d"), "role:N")
_ELEMENTS = alt.Tooltip("elements:Q", format=",")

Pictures = dict[str, Picture]


def pictures_of(table: pd.DataFrame) -> dict[str, Picture]:
    """Name to picture, in the order in which they read best. A part that the table lacks makes no picture.

    Raises OtaError where a column is missing.
    """
    missing = [column for column in Row._fields if column not in table]
    if missing:
        raise OtaError(
            f"the table of the analysis lacks the columns {missing}; it has {list(table.columns)}; make it with: ota analyse"
        )
    parts: tuple[Callable[[pd.DataFrame], Pictures], ...] = (
        _density, mixture_pictures, sparsity_pictures, overlap_pictures, _task_vectors, agreement_pictures, _compression,
    )  # fmt: skip
    return {name: picture for part in parts for name, picture in part(table).items()}


def _density(table: pd.DataFrame) -> Pictures:
    """Where FFG keeps elements, and how that differs from magnitude pruning at the same density."""
    rows = table[(table["analysis"] == "localisation") & (table["measure"] == "density")]
    keys = ["expert", "layer", "role"]
    rows = rows[[*keys, "variant", "value", "elements"]]
    ffg = rows[rows["variant"] == "curvature"].drop(columns="variant")
    cells, pictures = place(ffg), {}
    if cells.empty:
        return {}
    whole = ffg[(ffg["role"] == "all") & ffg["layer"].isna()]
    overall = ", ".join(f"{name} {100 * value:.3g} %" for name, value in zip(whole["expert"], whole["value"], strict=True))
    pictures["density"] = Picture(
        "Where does FFG keep the experts' changes?",
        "Share of elements that FFG's mask of each expert, which ranks by curvature, keeps by layer and role, whether or not the merge "
        "masks by it; tensors outside of the blocks as strips." + (f" Over the whole expert: {overall}." if overall else ""),
        grids(
            cells, Shade.of(cells["value"], "kept by FFG", ".2~p"),
            [*_PLACE, alt.Tooltip("value:Q", title="kept", format=".4~p"), _ELEMENTS],
        ),
    )  # fmt: skip
    magnitude = rows.loc[rows["variant"] == "magnitude", [*keys, "value"]].rename(columns={"value": "magnitude"})
    cells = cells.rename(columns={"value": "FFG"}).merge(magnitude, on=keys, how="inner")
    if cells.empty:
        return pictures
    cells["value"] = 100 * (cells["FFG"] - cells["magnitude"])
    tooltip: list[alt.Tooltip | str] = [*_PLACE, *(alt.Tooltip(f"{name}:Q", format=".4~p") for name in ("FFG", "magnitude"))]
    tooltip += [alt.Tooltip("value:Q", title="difference (points)", format="+.4~r"), _ELEMENTS]
    pictures["density_difference"] = Picture(
        "Where does FFG differ from magnitude pruning?",
        "Share kept by FFG minus share kept by magnitude, at the same density of the whole expert. Orange: curvature moves the budget "
        "there. Blue: away from there.",
        grids(cells, Shade.of(cells["value"], "FFG − magnitude (percentage points)", "+.2~r", about=0.0), tooltip),
    )
    return pictures


def _task_vectors(table: pd.DataFrame) -> Pictures:
    """How far the experts moved."""
    rows = table[(table["analysis"] == "task_vector") & table["measure"].isin(["norm", "relative_norm"])]
    rows, pictures = rows[["expert", "layer", "role", "measure", "value", "elements"]], {}
    layers = rows[rows["layer"].notna() & (rows["role"] == "all")]
    if not layers.empty:
        pictures["task_vector_layers"] = Picture(
            "How far did the experts move?",
            "Length of each expert's task vector in each transformer block, and as a share of the length of the base's weights there.",
            _lines(layers),
        )
    cells = place(rows[rows["measure"] == "relative_norm"])
    if not cells.empty:
        shade = Shade.of(cells["value"], "task vector / base (square-root scale)", ".2~p", root=True)
        pictures["task_vector_roles"] = Picture(
            "Where did the experts move?",
            "Length of each expert's task vector as a share of the length of the base's weights, by layer and role.",
            grids(cells, shade, [*_PLACE, alt.Tooltip("value:Q", title="‖Δ‖ / ‖θ₀‖", format=".4~p"), _ELEMENTS]),
        )
    return pictures


def _lines(layers: pd.DataFrame) -> alt.ConcatChart:
    """Norm and relative norm against the layer, a line for each expert."""
    experts = list(dict.fromkeys(layers["expert"]))
    count = layer_count(layers)
    panels = []
    for measure, title, form in (("norm", "‖Δ‖ (L2 norm)", "~g"), ("relative_norm", "‖Δ‖ / ‖θ₀‖", ".2~p")):
        part = layers[layers["measure"] == measure]
        if part.empty:
            continue
        chart = alt.Chart(part[["expert", "layer", "value", "elements"]]).encode(
            x=layer_axis("layer", count),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(nice=5), axis=alt.Axis(format=form, tickCount=5)),
            color=alt.Color("expert:N", sort=experts, scale=_scale(experts, CATEGORIES)),
            shape=alt.Shape("expert:N", sort=experts, scale=_scale(experts, SHAPES)),
            tooltip=[
                "expert:N",
                alt.Tooltip("layer:Q", format="d"),
                alt.Tooltip("value:Q", title=title, format=".4~g"),
                _ELEMENTS,
            ],
        )
        panels.append(
            (chart.mark_line() + chart.mark_point(size=60 if count <= 12 else 20)).properties(width=PANEL + 100, height=200)
        )
    return alt.concat(*panels, columns=2)


def _compression(table: pd.DataFrame) -> Pictures:
    """Bytes per parameter against what the compression loses."""
    rows = table[(table["analysis"] == "compression") & (table["role"] == "all") & table["layer"].isna()]
    if rows.empty or not (rows["measure"] == "bytes_per_param").any():
        return {}
    wide = rows.pivot_table(index=["expert", "variant"], columns="measure", values="value", sort=False).reset_index()
    variants = [v for v in COMPRESSIONS if v in set(wide["variant"])] + sorted(set(wide["variant"]) - set(COMPRESSIONS))
    masks = table[(table["measure"] == "mask_jaccard") & table["at"].notna()].drop_duplicates(["expert", "at"])
    densities = ", ".join(f"{name} {100 * at:.3g} %" for name, at in zip(masks["expert"], masks["at"], strict=True))
    panels = [_against_bytes(wide, measure, *names, variants) for measure, names in _LOSSES.items() if measure in wide]
    if not panels:
        return {}
    return {
        "compression": Picture(
            "What does compressing the second moments cost?",
            "Bytes that each parameter's second moment takes, against how well the compressed moments stand in for the full ones; a point "
            "for each expert." + (f" Share of elements that the compared masks keep: {densities}." if densities else ""),
            alt.concat(*panels, columns=3),
        )
    }


def _against_bytes(wide: pd.DataFrame, measure: str, title: str, axis: str, variants: list[str]) -> alt.Chart:
    part = wide[["expert", "variant", "bytes_per_param", measure]].dropna()
    low, high = (math.log10(value) for value in (part["bytes_per_param"].min(), part["bytes_per_param"].max()))
    decades = [10.0**i for i in range(math.floor(low), math.ceil(high) + 1)]
    bytes_axis = alt.X(
        "bytes_per_param:Q",
        title="bytes per parameter (log scale)",
        scale=alt.Scale(type="log", domain=[decades[0], decades[-1]]),
        axis=alt.Axis(format="~g", values=decades),
    )
    numbers = {"bytes_per_param": "bytes/parameter", measure: title}
    tooltip: list[alt.Tooltip | str] = [alt.Tooltip(f"{field}:Q", title=name, format=".4~g") for field, name in numbers.items()]
    return (
        alt.Chart(part, title=title)
        .mark_point(size=80, opacity=0.85)
        .encode(
            x=bytes_axis,
            y=alt.Y(
                f"{measure}:Q",
                title=axis,
                scale=alt.Scale(zero=measure == "sqrt_error", nice=5),
                axis=alt.Axis(format="~g", tickCount=5),
            ),
            color=alt.Color("variant:N", title="compression", scale=_scale(variants, CATEGORIES)),
            shape=alt.Shape("variant:N", title="compression", scale=_scale(variants, SHAPES)),
            tooltip=["expert:N", alt.Tooltip("variant:N", title="compression"), *tooltip],
        )
        .properties(width=PANEL, height=200)
    )


def _scale(names: list[str], values: tuple[str, ...]) -> alt.Scale:
    """A colour or a shape for each name, from the start again where they run out."""
    return alt.Scale(domain=names, range=[values[i % len(values)] for i in range(len(names))])
