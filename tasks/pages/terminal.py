"""Tables for the terminal, as rich draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table as Drawn

    from tasks.pages.tables import Cells, Table


def table(shown: Table, *, turned: bool = False) -> Drawn:
    """The table with its title above and its caption below. ``turned``: its columns as rows."""
    cells = shown.cells()
    return draw(cells.turned() if turned else cells, title=shown.title, caption=shown.caption)


def draw(cells: Cells, *, title: str = "", caption: Sequence[str] = ()) -> Drawn:
    """Cells as a table: where it is too wide, headings and texts break between words, numbers never do."""
    from rich import box
    from rich.table import Table as Drawn
    from rich.text import Text

    drawn = Drawn(
        title=title or None, title_justify="left", caption="\n".join(caption) or None, caption_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for i, name in enumerate(cells.header):
        heading = name.replace("_", " ")  # names such as precise_if may break there
        column, number = [row[i] for row in cells.rows], i in cells.numbers
        whole = column if number else [word for text in column for word in text.split()]
        widest = max(map(len, [*heading.split(), *whole]), default=0)
        drawn.add_column(
            Text(heading), justify="right" if number else "left", overflow="fold", width=widest if number else None,
            min_width=min(widest, 40),
        )  # fmt: skip
    for i, row in enumerate(cells.rows):
        style = "bold" if i in cells.strong else None
        drawn.add_row(*map(Text, row), end_section=i in cells.breaks, style=style)
    return drawn
