"""The tables of an analysis: one number a row in a pandas DataFrame, as Parquet, CSV and JSON; and the analysis as a cached stage."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ota_core.analysis.table import Row

PARQUET, CSV, SETTINGS = "analysis.parquet", "analysis.csv", "analysis.json"
_TYPES = {
    "analysis": "string", "expert": "string", "other": "string", "layer": "Int64", "role": "string", "variant": "string",
    "measure": "string", "at": "float64", "value": "float64", "unit": "string", "elements": "Int64",
}  # fmt: skip


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The tidy table: the columns of ``Row``, null where a row has none."""
    return pd.DataFrame.from_records(list(rows), columns=list(Row._fields)).astype(_TYPES)


def write_tables(folder: Path, table: pd.DataFrame, settings: Mapping[str, Any]) -> None:
    """``analysis.parquet``, ``analysis.csv`` and ``analysis.json`` (settings and what was left out) in an existing folder."""
    table.to_parquet(folder / PARQUET, index=False)
    table.to_csv(folder / CSV, index=False)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_tables(folder: Path) -> pd.DataFrame:
    """The table that ``write_tables`` left."""
    return pd.read_parquet(folder / PARQUET).astype(_TYPES)
