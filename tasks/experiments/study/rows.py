"""What the tables of a study share: a table, its numbers with standard errors, and how rows name a cell."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from tasks.evaluation.scores import ModelScores
from tasks.experiments.study.cells import Cell, subset_label
from tasks.experiments.study.scores import RETENTION, Estimate, StudyResults
from tasks.merging.labels import spell, unusual
from tasks.pages.tables import BITS, BITS_MORE, NOT_MEASURED, NUMBER, PERCENT, POINTS, TEXT, Column, Table

ERROR = "_se"
"""A column's standard errors stand in the column of its name and this."""
DIFFERENCE, RECOVERED = "difference", "recovered"
Row = dict[str, Any]


@dataclass(frozen=True)
class StudyTable(Table):
    """A table of a study."""

    key: str = ""
    """Name of its files."""


def study_table(
    key: str, title: str, caption: str, frame: pd.DataFrame, percent: Sequence[str] = (), bits: Sequence[str] = ()
) -> StudyTable:
    """Every column of the frame but the kind of model and the errors. ``percent``: the ones that are fractions; ``bits``: bits per byte."""
    names = [name for name in frame if not name.endswith(ERROR) and name != "kind"]
    return StudyTable(
        title, frame, [_column(frame, name, percent, bits) for name in names], [caption] if caption else [], key=key
    )


def _column(frame: pd.DataFrame, name: str, percent: Sequence[str], bits: Sequence[str]) -> Column:
    if name in percent or name in bits:
        plain, signed = (PERCENT, POINTS) if name in percent else (BITS, BITS_MORE)
        # Nothing is compared with itself, and base and experts retain nothing.
        absent = "" if name in {DIFFERENCE, RETENTION, RECOVERED} else NOT_MEASURED
        return Column(name, unit=signed if name == DIFFERENCE else plain, error=f"{name}{ERROR}", absent=absent)
    return Column(name, unit=NUMBER if pd.api.types.is_numeric_dtype(frame[name]) else TEXT, absent="")


def is_ffg(cell: Cell) -> bool:
    """Whether Fast Fisher Grafting masks any expert of this cell."""
    return any(cell.recipes[0].ffg(i) for i in range(len(cell.experts)))


def on_all(results: StudyResults) -> list[Cell]:
    """The cells that merge all experts."""
    return [cell for cell in results.cells if len(cell.experts) == len(results.experts)]


def methods_of(results: StudyResults) -> list[Cell]:
    """Of each method the first untuned cell on all experts in the grid's order, with and without FFG, row-space regression and estimated second
    moments, and every tuned or learned one.

    What was tuned was chosen on other documents, so that all may stand beside each other; of a sweep the best would be chosen by
    the scores that it is compared on.
    """
    chosen: dict[tuple[str, bool, bool, bool, str], Cell] = {}
    for cell in on_all(results):
        refined = "refine" in cell.settings
        estimated = "estimate" in cell.settings
        chosen.setdefault((cell.method, is_ffg(cell), refined, estimated, cell.label if cell.chosen else ""), cell)
    return list(chosen.values())


def words(cell: Cell, skip: Sequence[str] = ()) -> str:
    """A cell's method and the settings that are not the method's defaults, but for those of ``skip``: ``ota density=0.4 compression=rank1``."""
    said = set(unusual(cell.method, cell.settings))
    if cell.method == "ota" and cell.tune and "density" not in cell.tune:
        said.add("density")  # also one of 1: it says something where others of the method search theirs
    settings = [f"{key}={spell(value)}" for key, value in cell.settings.items() if key in said - set(skip)]
    return " ".join([cell.method, *([cell.chosen] if cell.chosen else []), *settings])


def words_of_subset(results: StudyResults, cell: Cell) -> str:
    """``words``, and which experts are merged where it is not all of them: ``ota tuned without math``."""
    names = list(results.experts)
    return " ".join([words(cell), *subset_label([names.index(name) for name in cell.experts], names)])


def model_rows(
    results: StudyResults, cells: Sequence[Cell], measure: Callable[[Sequence[ModelScores]], Row], of_merge: Callable[[Cell], Row]
) -> list[Row]:
    """A row each for base, experts and these merges: what ``measure`` tells of any model, and ``of_merge`` of a merge besides."""
    rows: list[Row] = [{"model": "base", "kind": "base"} | measure(results.models())]
    rows += [{"model": name, "kind": "expert"} | measure(results.models(expert=name)) for name in results.experts]
    return rows + [{"model": words(cell), "kind": "merge"} | measure(results.models(cell)) | of_merge(cell) for cell in cells]


def numbers(name: str, found: Estimate | None) -> Row:
    """A number and its standard error as two columns of a row; NaN where there is none."""
    mean, error = found or (math.nan, math.nan)
    return {name: mean, f"{name}{ERROR}": error}


def errors_over(results: StudyResults, unit: str) -> str:
    """What numbers in ``unit`` are, and what their errors are over."""
    many = len(results.replicates)
    if many > 1:
        return f"{unit}{'' if unit.endswith(';') else ','} mean ± standard error over {many} replicates."
    return f"{unit} ± standard error over documents (one replicate)."
