"""From the table of a preflight to numbers by expert, as MLflow keeps them of a merge and as a prediction reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

OWN = ("reach", "disturbance", "fit")
OF_OTHERS = ("row_space", "interference", "sign_conflict")
"""By expert, the mean over the others; ``interference``: of the others on it."""
MEASURES = ("reach", "disturbance")
"""What a prediction reads of an expert. The fit follows from them, matrix by matrix; those of pairs made predictions of our studies worse."""
OF_PAIRS = ("row_space", "interference", "sign_conflict", "cosine", "cosine_sqrt_v", "mask_jaccard")
"""Of which a merge has the mean over all pairs."""
METRIC = "preflight/"
"""Begins the names of these numbers in MLflow: ``preflight/<measure>`` and ``preflight/<measure>/<expert>``."""

Features = dict[str, float]


def names_of(table: pd.DataFrame) -> list[str]:
    """The experts, in the recipe's order."""
    return [str(name) for name in table[table.measure == "norm"].expert]


def features(table: pd.DataFrame, without: str | None = None) -> dict[str, Features]:
    """Expert → ``OWN`` and ``OF_OTHERS`` in the merge, or in the merge without one of the experts. What was not measured is absent."""
    names = [name for name in names_of(table) if name != without]
    variant = f"without {without}" if without is not None else ""
    alone = table[table.measure.isin(OWN) & (table.variant == variant)]
    pairs = table[table.expert.isin(names) & table.other.isin(names)]
    found: dict[str, Features] = {}
    for name in names:
        mine = alone[alone.expert == name]
        own: Features = dict(zip(mine.measure.astype(str), mine.value.astype(float), strict=True))
        for measure in OF_OTHERS:
            rows = pairs[(pairs.measure == measure) & (pairs.expert == name)]
            if measure != "interference":  # the same both ways, and held once
                rows = pairs[(pairs.measure == measure) & ((pairs.expert == name) | (pairs.other == name))]
            own |= {measure: mean} if (mean := _mean(rows.value.tolist())) is not None else {}
        found[name] = own
    return found


def totals(table: pd.DataFrame) -> Features:
    """``lambda`` as the row spaces say, and the means over all pairs."""
    found: Features = {}
    scale = table[(table.measure == "lambda") & (table.variant == "auto")].value
    for measure, values in (("lambda", scale), *((one, table[table.measure == one].value) for one in OF_PAIRS)):
        found |= {measure: mean} if (mean := _mean(values.tolist())) is not None else {}
    return found


def metrics(table: pd.DataFrame) -> dict[str, float]:
    """What MLflow is told of a merge."""
    by_expert = {f"{METRIC}{measure}/{name}": value for name, own in features(table).items() for measure, value in own.items()}
    return {f"{METRIC}{measure}": value for measure, value in totals(table).items()} | by_expert


def of_metrics(values: Mapping[str, float], expert: str) -> Features | None:
    """An expert's measures from a run's metrics; None where one of them is missing, as in runs of earlier versions."""
    found = {measure: values.get(f"{METRIC}{measure}/{expert}") for measure in MEASURES}
    known = {measure: value for measure, value in found.items() if value is not None and not math.isnan(value)}
    return known if len(known) == len(MEASURES) else None


def _mean(values: list[float]) -> float | None:
    known = [float(value) for value in values if not math.isnan(value)]
    return fmean(known) if known else None
