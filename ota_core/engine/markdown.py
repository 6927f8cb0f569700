"""Tables in GitHub-flavoured Markdown: the one place that writes them, and that keeps text inside of its cell."""

from collections.abc import Collection, Sequence


def cell(text: object) -> str:
    """Text that opens no column and no line of its own."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Collection[int] = (), strong: Collection[int] = ()
) -> str:
    """Cells as they shall read. ``numbers``: columns that align right; ``strong``: rows whose first cell is bold; both from 0."""
    rule = ["---:" if i in numbers else "---" for i in range(len(header))]
    body = [[cell(one) for one in row] for row in rows]
    for i in strong:
        body[i][0] = f"**{body[i][0]}**"
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [[cell(name) for name in header], rule, *body])
