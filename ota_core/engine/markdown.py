"""Text and tables in GitHub-flavoured Markdown: the one place that keeps what others have named from being read as Markdown or HTML."""

import re
from collections.abc import Collection, Sequence


def cell(text: object) -> str:
    """Text as it reads: on one line, in one column, without links, pictures, code or HTML of its own.

    Underscores and stars stay: within words they mean nothing, and names are full of them.
    """
    line = " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", str(text)).split())
    return re.sub(r"([\\`\[\]<>|])", r"\\\1", line)


def fenced(text: str, language: str = "") -> str:
    """A block of code; its fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Collection[int] = (), strong: Collection[int] = ()
) -> str:
    """Cells as they shall read. ``numbers``: columns that align right; ``strong``: rows whose first cell is bold; both from 0."""
    rule = ["---:" if i in numbers else "---" for i in range(len(header))]
    body = [[cell(one) for one in row] for row in rows]
    for i in strong:
        body[i][0] = f"**{body[i][0]}**"
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [[cell(name) for name in header], rule, *body])
