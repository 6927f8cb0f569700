"""Every result ends as one tidy frame and what its columns are; here, and nowhere else, its numbers become text.

The frame holds numbers in full: scores and retention as fractions, losses in bits per byte, sizes in bytes, times in seconds; NaN where
something was not measured. A ``Column`` says in which unit a number is read, and which other columns of the frame hold its standard
error or the ends of its interval. ``markdown``, ``terminal`` and ``html`` draw what ``Table.cells`` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

NOT_MEASURED = "–"


@dataclass(frozen=True)
class Unit:
    """How a number is read."""

    name: str
    format: str
    """Python's, of the number times ``scale``."""
    scale: float = 1.0
    signed: bool = False

    def text(self, value: float) -> str:
        """The number, with a minus that is one."""
        return f"{self.scale * value:{'+' if self.signed else ''}{self.format}}".replace("-", "−")

    def size(self, value: float) -> str:
        """The number of a standard error, which has no sign."""
        return f"{self.scale * value:{self.format}}"


class _PValue(Unit):
    def text(self, value: float) -> str:
        return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


class _Short(Unit):
    """Three digits or so, of numbers of any size."""

    def text(self, value: float) -> str:
        value *= self.scale
        digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
        return f"{value:.{digits}f}".replace("-", "−")


TEXT = Unit("", "")
PERCENT = Unit("percent", ".1f", 100)
POINTS = Unit("percentage points", ".1f", 100, signed=True)
BITS = Unit("bits per byte", ".3f")
BITS_MORE = Unit("bits per byte", ".4f", signed=True)
"""Differences: losses of the same documents differ by less than either is sure of."""
COUNT = Unit("", ",.0f")
NUMBER = Unit("", ".3g")
P_VALUE = _PValue("", "")
SECONDS = _Short("s", "")
MIB = Unit("MiB", ".0f", 2**-20)
GB = _Short("GB", "", 1e-9)
RATIO = _Short("", "")


class Column(NamedTuple):
    """A column as people read it."""

    name: str
    """Of the frame's column."""
    title: str = ""
    """Its heading; the name, where that says it."""
    unit: Unit = TEXT
    error: str = ""
    """The frame's column with standard errors: ``67.8 ± 0.4``."""
    ends: tuple[str, str] | None = None
    """The frame's columns with the ends of an interval: ``67.8 (60.1 to 72.0)``."""
    mark: str = ""
    """The frame's column that says whether a star follows: ``29.0*``."""
    absent: str = NOT_MEASURED
    """What stands where there is no number; nothing, where there could not be one."""

    @property
    def heading(self) -> str:
        return self.title or self.name.replace("_", " ")

    @property
    def is_number(self) -> bool:
        return self.unit is not TEXT

    def read(self, row: dict[str, Any]) -> str:
        """The cell of a row of the frame, None where the frame has a gap."""
        value = row.get(self.name)
        if not self.is_number:
            return "" if value is None else value if isinstance(value, str) else str(value)
        if value is None:
            return self.absent
        text = self.unit.text(float(value))
        if self.error and (error := row.get(self.error)) is not None:
            text += f" ± {self.unit.size(float(error))}"
        if self.ends and row.get(self.ends[0]) is not None:
            low, high = (self.unit.text(float(row[name])) for name in self.ends)
            text += f" ({low} to {high})"
        return f"{text}*" if self.mark and row[self.mark] else text


class Cells(NamedTuple):
    """A table as it is read, ready to be drawn."""

    header: list[str]
    rows: list[list[str]]
    numbers: frozenset[int] = frozenset()
    """Columns that align right."""
    strong: frozenset[int] = frozenset()
    """Rows in bold."""
    breaks: frozenset[int] = frozenset()
    """Rows that a line follows."""

    def turned(self) -> Cells:
        """Columns as rows."""
        whole = [list(column) for column in zip(self.header, *self.rows, strict=True)]
        return Cells(whole[0], whole[1:], frozenset(range(1, len(whole[0]))))


@dataclass(frozen=True)
class Table:
    """A frame and how it is read."""

    title: str
    frame: pd.DataFrame
    columns: Sequence[Column]
    caption: Sequence[str] = ()
    """What the numbers are, and what was left out: sentences, which stand below."""
    strong: Sequence[bool] = field(default=())
    """Which rows stand out."""
    group: str = ""
    """The frame's column that a line parts: base, experts, merges."""

    def cells(self) -> Cells:
        """Header and rows as people read them."""
        gapless = self.frame.astype(object).where(self.frame.notna(), None)
        rows: list[dict[str, Any]] = gapless.to_dict("records")
        groups = [row[self.group] for row in rows] if self.group else []
        return Cells(
            [column.heading for column in self.columns],
            [[column.read(row) for column in self.columns] for row in rows],
            numbers=frozenset(i for i, column in enumerate(self.columns) if column.is_number),
            strong=frozenset(i for i, bold in enumerate(self.strong) if bold),
            breaks=frozenset(i for i, (one, other) in enumerate(pairwise(groups)) if one != other),
        )
