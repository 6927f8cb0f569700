"""A leaderboard as people read it: in the terminal, as Markdown, as a page, and as the files that go with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.evaluation.scores import NOT_MEASURED
from tasks.experiments.leaderboard.entries import AVERAGE
from tasks.experiments.leaderboard.leaderboard import Leaderboard

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

CSV, PARQUET, MARKDOWN, PNG, HTML = (f"leaderboard.{kind}" for kind in ("csv", "parquet", "md", "png", "html"))

RETAINED = (
    "Merge / expert on the expert's own capability, in percent, with 95 % intervals (MOVER-R; as if the two were independent, which makes "
    "them wider than need be)."
)


def percent(value: Any, *, sign: bool = False) -> str:
    """A fraction in percent with one decimal, a dash where there is none."""
    import pandas as pd

    if pd.isna(value):
        return NOT_MEASURED
    text = f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"
    return text.replace("-", "−")


def interval(row: pd.Series, name: str, of: str = "score") -> str:
    """The 95 % interval of a score or of ``retention`` in percent, empty where it is not known."""
    import pandas as pd

    low, high = row[f"{of}_low/{name}"], row[f"{of}_high/{name}"]
    return "" if pd.isna(low) else f"{percent(low)} to {percent(high)}"


def p_value(value: Any) -> str:
    import pandas as pd

    return "" if pd.isna(value) else "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def text_rows(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Header and cells: rank, label, capabilities, average with its interval, retention, what fell below the base, the comparison in pairs."""
    import pandas as pd

    paired = board.table["difference"].notna().any()
    header = ["#", "merge", *board.capabilities, "average", "95 % interval", "retention", "below base"]
    header += ["difference", "95 % interval of it", "p (Holm)"] if paired else []
    rows = []
    for _, row in board.table.iterrows():
        count = row["negative_transfer"]
        below = "" if pd.isna(count) else f"{count} ({row['below_base']})" if count else "0"
        merge = row["kind"] == "merge"
        cells = [
            str(row["rank"]) if merge else "", row["label"], *(percent(row[f"score/{name}"]) for name in board.capabilities),
            percent(row[f"score/{AVERAGE}"]), interval(row, AVERAGE) or NOT_MEASURED, percent(row["retention"]) if merge else "", below,
        ]  # fmt: skip
        if paired:
            known = not pd.isna(row["difference"])
            cells += [
                percent(row["difference"], sign=True) if known else "baseline" if row["label"] == board.baseline else "",
                f"{percent(row['difference_low'], sign=True)} to {percent(row['difference_high'], sign=True)}" if known else "",
                p_value(row["p_holm"]),
            ]
        rows.append(cells)
    return header, rows


def caption(board: Leaderboard) -> list[str]:
    """What the numbers are, and what was left out, a sentence or two each."""
    lines = [
        "Scores and retention (merge / expert on the expert's own capability) in percent. Below base: capabilities on which the merge "
        "scores less than the base."
    ]
    merges = board.merges
    if merges[f"score_low/{AVERAGE}"].notna().any():
        lines.append("Intervals are 95 %: Wilson's for a capability, MOVER for their average, over documents.")
    if board.table["difference"].notna().any():
        lines.append(
            f"Differences are to '{board.baseline}', over the same {int(merges['documents'].max()):,} documents in pairs; p is of a two-sided "
            f"sign-flip test, adjusted for {int(merges['difference'].notna().sum())} comparisons (Holm). "
            "The best was chosen by these documents, so that its lead is somewhat flattered."
        )
    if merges["experts"].nunique() > 1:
        lines.append("Retention is the mean over the capabilities of the experts in a merge, which not all share.")
    elif merges["experts"].iloc[0]:
        lines.append(f"All merge {merges['experts'].iloc[0].replace('+', ', ')}.")
    lines.append(f"Suite {board.suite}, limit {board.limit}, key {board.suite_key}; experiment {board.experiment}.")
    return lines + board.notes


def summary(board: Leaderboard) -> str:
    """Which is the best, in a sentence."""
    best, count = board.best, len(board.merges)
    sure = f" (95 % interval {interval(best, AVERAGE)})" if interval(best, AVERAGE) else ""
    return f"Best of {count} merge{'s' if count > 1 else ''}: {best['label']}, {percent(best[f'score/{AVERAGE}'])} % on average{sure}."


def to_markdown(board: Leaderboard) -> str:
    """The leaderboard as GitHub-flavoured Markdown, with its caption below."""
    header, rows = text_rows(board)
    rule = ["---:", "---", *["---:"] * (len(header) - 2)]
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in [header, rule, *rows]]
    return "\n".join([*lines, "", *(f"{line}\n" for line in caption(board))])


def render(board: Leaderboard) -> Table:
    """The leaderboard for the terminal; the intervals of scores and differences stand in the files."""
    from rich import box
    from rich.table import Table

    header, rows = text_rows(board)
    shown = [
        i
        for i, name in enumerate(header)
        if name != "95 % interval of it" and any(row[i] not in {"", NOT_MEASURED} for row in rows)
    ]
    table = Table(
        title=f"Leaderboard of {board.experiment}", caption="\n".join(caption(board)), caption_justify="left", box=box.SIMPLE_HEAD
    )
    table.show_edge, table.padding = False, (0, 1, 0, 0)
    short = {
        "average": "avg",
        "below base": "below",
        "95 % interval": "95 %",
        "difference": "diff",
        "p (Holm)": "p",
        "retention": "kept",
    }
    for i in shown:
        # Names such as precise_if may break at the underscore; numbers never break.
        words = short.get(header[i], header[i]).replace("_", " ")
        table.add_column(
            words,
            justify="left" if i == 1 else "right",
            overflow="fold",
            no_wrap=words == "p",
            min_width=_widest(words, *(row[1] for row in rows if i == 1)),
        )
    kinds = list(board.table["kind"])
    below = header.index("below base")
    for i, cells in enumerate(rows):
        cells = [cell.split(" ")[0] if j == below else cell for j, cell in enumerate(cells)]
        table.add_row(*(cells[j] for j in shown), end_section=i + 1 < len(rows) and kinds[i] != kinds[i + 1])
    return table


def _widest(*texts: str) -> int:
    """The longest word: nothing narrower can hold it in one line."""
    return max(len(word) for text in texts for word in text.split())


def to_page(board: Leaderboard) -> str:
    """One HTML page with everything inside: the picture, the table, every interval."""
    from tasks.experiments.leaderboard.pictures import leaderboard_chart
    from tasks.pages.pictures.page import Picture, Section, table, to_html

    header, rows = text_rows(board)
    ends = header.index("below base") + 1
    main = table(header[:ends], [cells[:ends] for cells in rows], numbers=[i for i in range(ends - 1) if i != 1], strong=[0])
    picture = Picture(
        "Average and capabilities",
        "Left: the average with its 95 % interval where it is known; the line is the base. Right: each capability in percent; ↓: below the base.",
        leaderboard_chart(board),
    )
    intervals = table(
        ["merge", *board.capabilities],
        [[row["label"], *(f"{percent(row[f'score/{n}'])} ({interval(row, n) or NOT_MEASURED})" for n in board.capabilities)]
         for _, row in board.table.iterrows()],
        numbers=range(1, len(board.capabilities) + 1),
    )  # fmt: skip
    kept = table(
        ["merge", *board.capabilities, "mean"],
        [[row["label"], *(_with_interval(row, f"retention/{n}", n) for n in board.capabilities), _with_interval(row, "retention", AVERAGE)]
         for _, row in board.merges.iterrows()],
        numbers=range(1, len(board.capabilities) + 2),
    )  # fmt: skip
    settings = ["density", "power", "compression", "lambda"]
    made = table(
        ["merge", "experts", "base", *settings, "run"],
        [[row["label"], row["experts"].replace("+", ", "), row["base"], *(_setting(row[name]) for name in settings), row["run_id"]]
         for _, row in board.merges.iterrows()],
    )  # fmt: skip
    sections = [Section("Leaderboard", [summary(board), picture, main, *caption(board)])]
    if header[ends:]:
        paired = table(
            ["merge", *header[ends:]],
            [[cells[1], *cells[ends:]] for cells in rows[: len(board.merges)]],
            numbers=range(1, len(header) - ends + 1),
        )
        sections.append(Section(f"Compared with {board.baseline}", [paired]))
    sections += [
        Section("Scores with their intervals", [intervals]),
        Section("Retention", [RETAINED, kept]),
        Section("How they were merged", [made]),
    ]
    return to_html(f"Leaderboard of {board.experiment}", sections)


def _with_interval(row: pd.Series, column: str, name: str) -> str:
    ends = interval(row, name, "retention")
    return f"{percent(row[column])} ({ends})" if ends else percent(row[column])


def _setting(value: Any) -> str:
    import pandas as pd

    return NOT_MEASURED if pd.isna(value) else f"{value:g}" if isinstance(value, float) else str(value)


def write_files(board: Leaderboard, folder: Path) -> list[Path]:
    """Write table (CSV, Parquet, Markdown), picture (PNG) and page (HTML) into a folder, which is made; earlier ones are replaced."""
    from tasks.experiments.leaderboard.pictures import leaderboard_chart
    from tasks.pages.pictures.page import to_png

    page = to_page(board)  # what can fail comes before the first file
    folder.mkdir(parents=True, exist_ok=True)
    board.table.to_csv(folder / CSV, index=False)
    board.table.to_parquet(folder / PARQUET, index=False)
    (folder / MARKDOWN).write_text(to_markdown(board), encoding="utf-8")
    to_png(leaderboard_chart(board), folder / PNG)
    (folder / HTML).write_text(page, encoding="utf-8")
    return [folder / name for name in (CSV, PARQUET, MARKDOWN, PNG, HTML)]
