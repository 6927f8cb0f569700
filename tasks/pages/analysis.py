"""The tables of an analysis: one number a row in a pandas DataFrame, as Parquet, CSV and JSON."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ota_core.analysis import Analysis, Row
from ota_core.artifact import ArtifactRef
from ota_core.errors import ArtifactError
from tasks.artifacts.store import store_of
from tasks.settings import Places

PARQUET, CSV, SETTINGS = "analysis.parquet", "analysis.csv", "analysis.json"
PICTURES = "pictures.html"
"""What ``ota analyse`` writes beside the tables."""
TYPES = {
    "analysis": "string", "expert": "string", "other": "string", "layer": "Int64", "role": "string", "variant": "string",
    "measure": "string", "at": "float64", "value": "float64", "unit": "string", "elements": "Int64",
}  # fmt: skip
"""The columns of the table, in their order, with their pandas types. ``ota_core.analysis.Row`` says what each holds."""


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The tidy table: the columns of ``Row``, null where a row has none."""
    return pd.DataFrame.from_records(list(rows), columns=list(TYPES)).astype(TYPES)


def write_tables(folder: Path, analysis: Analysis) -> pd.DataFrame:
    """``analysis.parquet``, ``analysis.csv`` and ``analysis.json`` (settings, what was left out, notes) in an existing folder."""
    table = frame(analysis.rows)
    table.to_parquet(folder / PARQUET, index=False)
    table.to_csv(folder / CSV, index=False)
    (folder / SETTINGS).write_text(json.dumps(said(analysis), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return table


def said(analysis: Analysis) -> dict[str, Any]:
    """Settings, what was left out, and notes."""
    return {"settings": analysis.settings, "left_out": analysis.left_out, "notes": analysis.notes}


def read_tables(folder: Path) -> pd.DataFrame:
    """The table that ``write_tables`` left. Raises ArtifactError when the folder holds none, or one with other columns."""
    path = folder / PARQUET
    if not path.is_file():
        raise ArtifactError(f"{folder} holds no {PARQUET}; make it with ota analyse")
    table = pd.read_parquet(path)
    if list(table.columns) != list(TYPES):
        raise ArtifactError(
            f"{path} has the columns {', '.join(table.columns)}; expected {', '.join(TYPES)}: make it again with this version"
        )
    return table.astype(TYPES)


def read_settings(folder: Path) -> dict[str, Any]:
    """``settings``, ``left_out`` and ``notes`` of the analysis in a folder."""
    found: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    return found


def read_analysis(where: Places, ref: ArtifactRef) -> pd.DataFrame:
    """The table that an artifact of kind ``analysis`` holds."""
    return read_tables(store_of(where).local_path(ref))


def densest_cells(table: pd.DataFrame, count: int = 8) -> pd.DataFrame:
    """Where FFG keeps the largest share of a cell, all experts together; norms are too small to count. Most first.

    Columns: layer, role, ``size`` (share of the model's elements), and of each variant ``<variant> density``, the kept share of the cell.
    """
    cells = table[(table.analysis == "localisation") & ~table.role.isin(["all", "norm"])]
    variants = [v for v in ("curvature", "magnitude") if (cells.variant == v).any()]
    if not variants:
        return pd.DataFrame()
    cells = cells.assign(kept=cells.value * cells.elements.astype(float), elements=cells.elements.astype(float))
    found = (
        cells.groupby(["layer", "role", "variant"], dropna=False)[["kept", "elements"]].sum().unstack("variant", fill_value=0.0)
    )
    result = pd.DataFrame({"size": found["elements", variants[0]] / found["elements", variants[0]].sum()})
    for variant in variants:
        result[f"{variant} density"] = found["kept", variant] / found["elements", variant]
    return result.sort_values(f"{variants[0]} density", ascending=False).head(count).reset_index()


def whole_model(table: pd.DataFrame, analysis: str, measure: str) -> pd.DataFrame:
    """The rows of a measure over the whole model."""
    return table[(table.analysis == analysis) & (table.measure == measure) & (table.role == "all") & table.layer.isna()]
