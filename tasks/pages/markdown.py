"""Tables as GitHub-flavoured Markdown."""

from collections.abc import Sequence

from ota_core.engine import markdown
from tasks.pages.tables import Cells, Table

cell = markdown.cell


def table(shown: Table | Cells) -> str:
    """The table alone."""
    cells = shown.cells() if isinstance(shown, Table) else shown
    return markdown.table(cells.header, cells.rows, numbers=cells.numbers, strong=cells.strong)


def captioned(*tables: Table) -> str:
    """Tables, each with its caption below."""
    return "\n".join(paragraphs([text for one in tables for text in (table(one), cell(" ".join(one.caption))) if text]))


def paragraphs(texts: Sequence[str]) -> list[str]:
    """Lines with an empty one after each text."""
    return [line for text in texts for line in (text, "")]
