"""Pictures of pairs of experts: how alike their curvature is, and whether their task vectors agree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import altair as alt

from tasks.pages.pictures.grids import Shade, grid, place, square
from tasks.pages.pictures.picture import Picture

if TYPE_CHECKING:
    import pandas as pd

ALL_PAIRS = "mean of all pairs"
_OVERLAP = {"cosine_sqrt_v": "cosine of √v", "spearman": "Spearman ρ of v", "jaccard": "Jaccard of the top masks of v"}
_AGREEMENT = {"cosine": "cosine of the task vectors", "sign_conflict": "sign conflict"}


def overlap_pictures(table: pd.DataFrame) -> dict[str, Picture]:
    """How alike the experts' curvature is."""
    return _pictures(
        _pairs(table, "curvature_overlap", _OVERLAP), "curvature_overlap", _overlap_shades, "Do the experts' curvatures overlap",
        f"High: the experts are sensitive in the same places. The masks hold each expert's largest v{_at_density(table)}.",
    )  # fmt: skip


def _at_density(table: pd.DataFrame) -> str:
    """Which share of its elements, as the table tells."""
    found = table.loc[table["measure"] == "jaccard", "at"].dropna().unique()
    return f", {100 * found[0]:.3g} % of its elements, the same share of every expert" if len(found) == 1 else ""


def agreement_pictures(table: pd.DataFrame) -> dict[str, Picture]:
    """Whether the experts' task vectors pull in the same direction."""
    return _pictures(
        _pairs(table, "task_vector", _AGREEMENT), "task_vector_pairs", _agreement_shades, "Do the experts pull in the same direction",
        "Cosine of each pair of task vectors, and of the elements that both experts moved, the share moved in opposite directions.",
    )  # fmt: skip


def _overlap_shades(rows: pd.DataFrame) -> dict[str, Shade]:
    """One scale for all three: 1 is the most that each can be."""
    shade = Shade("overlap (1 = the same)", ".2f", min(0.0, float(rows["value"].min())), 1.0)
    return dict.fromkeys(_OVERLAP.values(), shade)


def _agreement_shades(rows: pd.DataFrame) -> dict[str, Shade]:
    cosine, conflict = (rows.loc[rows["measure"] == measure, "value"] for measure in _AGREEMENT)
    return {
        _AGREEMENT["cosine"]: Shade.of(cosine, "cosine (0 = unrelated)", ".2f", about=0.0),
        _AGREEMENT["sign_conflict"]: Shade.of(conflict, "moved in opposite directions (50% = by chance)", ".0%", about=0.5),
    }


def _pairs(table: pd.DataFrame, analysis: str, names: Mapping[str, str]) -> pd.DataFrame:
    """Rows on pairs of experts, with ``name`` (what people call the measure) and ``pair``."""
    rows = table[(table["analysis"] == analysis) & table["other"].notna() & table["measure"].isin(list(names))]
    rows = rows[["expert", "other", "layer", "role", "measure", "value", "elements"]]
    return rows.assign(name=rows["measure"].map(names), pair=rows["expert"].astype(str) + " – " + rows["other"].astype(str))


def _pictures(
    rows: pd.DataFrame, key: str, shades_of: Callable[[pd.DataFrame], dict[str, Shade]], question: str, caption: str
) -> dict[str, Picture]:
    pictures = {}
    whole = rows[(rows["role"] == "all") & rows["layer"].isna()]
    if not whole.empty:
        pictures[key] = Picture(f"{question}?", f"{caption} Over the whole model.", _squares(whole, shades_of(whole)))
    cells = place(rows)
    if not cells.empty:
        many = cells["pair"].nunique() > 1
        how = " Mean over all pairs of experts; on a page, a menu above the picture shows a single pair." if many else ""
        layers = _layers(cells, shades_of(cells))
        pictures[f"{key}_layers"] = Picture(f"{question}, by layer and role?", f"{caption}{how}", layers)
    return pictures


def _squares(whole: pd.DataFrame, shades: Mapping[str, Shade]) -> alt.ConcatChart:
    """Expert × expert, a panel for each measure."""
    experts = list(dict.fromkeys([*whole["expert"], *whole["other"]]))
    panels = []
    for name, shade in shades.items():
        pairs = whole[whole["name"] == name]
        if not pairs.empty:
            tooltip: list[alt.Tooltip | str] = [
                "expert:N",
                "other:N",
                alt.Tooltip("value:Q", title=name, format=".4~g"),
                alt.Tooltip("elements:Q", format=","),
            ]
            panels.append(square(pairs[["expert", "other", "value", "elements"]], experts, shade, tooltip).properties(title=name))
    return _beside(panels, shades)


def _layers(cells: pd.DataFrame, shades: Mapping[str, Shade]) -> alt.ConcatChart:
    """Layer × role, a panel for each measure: the mean over all pairs, or on a page the pair that a menu picks."""
    import pandas as pd

    pairs = list(dict.fromkeys(cells["pair"]))
    columns = ["name", "pair", "row", "role", "layer", "value"]
    if len(pairs) > 1:
        keys = ["name", "row", "role", "layer"]
        mean = cells.groupby(keys, dropna=False, sort=False, as_index=False)["value"].mean().assign(pair=ALL_PAIRS)
        cells = pd.concat([mean, cells], ignore_index=True)
    tooltip: list[alt.Tooltip | str] = [
        alt.Tooltip("pair:N", title="experts"),
        alt.Tooltip("layer:Q", format="d"),
        alt.Tooltip("role:N"),
    ]
    panels = []
    for name, shade in shades.items():
        part = cells.loc[cells["name"] == name, columns].drop(columns="name").reset_index(drop=True)
        if not part.empty:
            said = alt.Tooltip("value:Q", title=name, format=".4~g")
            panels.append(grid(part, shade, [*tooltip, said]).transform_filter("datum.pair === experts").properties(title=name))
    first = ALL_PAIRS if len(pairs) > 1 else pairs[0]
    menu = alt.binding_select(options=[ALL_PAIRS, *pairs], name="pair of experts: ") if len(pairs) > 1 else alt.Undefined
    return _beside(panels, shades).add_params(alt.param(name="experts", value=first, bind=menu))


def _beside(panels: list[alt.LayerChart], shades: Mapping[str, Shade]) -> alt.ConcatChart:
    """Panels with one legend, where all have the same colours, else with one each."""
    same = len(set(shades.values())) == 1
    return alt.concat(*panels, columns=3).resolve_scale(color="shared" if same else "independent")
