"""The picture of λ by layer and role, of a merge whose λ was found from the row spaces of its task vectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt

from ota_core.plan.roles import place_of
from tasks.pages.pictures.grids import Shade, grid, place
from tasks.pages.pictures.picture import Picture


def scale_picture(found: Mapping[str, Any]) -> Picture | None:
    """``found``: ``results.lambda`` of a merge's record. None where no matrix lies where a grid has a cell for it."""
    import pandas as pd

    places = [(place_of(name), value) for name, value in found["per_tensor"].items()]
    tensors = pd.DataFrame([{"layer": at.layer, "role": at.role, "value": value} for at, value in places])
    # A mixture's experts share a cell, which shows their mean.
    cells = place(tensors.groupby(["layer", "role"], dropna=False, sort=False, as_index=False)["value"].mean())
    if cells.empty:
        return None
    tooltip: list[alt.Tooltip | str] = [
        alt.Tooltip("layer:Q", format="d"),
        "role:N",
        alt.Tooltip("value:Q", title="λ", format=".3f"),
    ]
    return Picture(
        f"Where do the row spaces ask for which λ? On average {found['value']:.3f}",
        "λ of each matrix, by layer and role: the factor at which its merged edit does best what every expert's own edit does to the "
        "inputs that this expert saw. Above 1 where averaging made the edits smaller than their experts need them.",
        grid(cells, Shade.of(cells["value"], "λ", ".2f"), tooltip),
    )
