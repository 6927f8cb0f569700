"""A leaderboard as people read it: in the terminal, as Markdown, as a page, and as the files that go with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tasks.experiments.leaderboard.entries import AVERAGE
from tasks.experiments.leaderboard.leaderboard import Leaderboard
from tasks.pages.markdown import captioned
from tasks.pages.scores import NONE
from tasks.pages.tables import COUNT, NUMBER, P_VALUE, PERCENT, POINTS, Column, Table

CSV, PARQUET, MARKDOWN, PNG, HTML = (f"leaderboard.{kind}" for kind in ("csv", "parquet", "md", "png", "html"))

RETAINED = (
    "Merge / expert on the expert's own capability, in percent, with 95 % intervals (MOVER-R; as if the two were independent, which makes "
    "them wider than need be)."
)
_P = "p (Holm)"


def ranking(board: Leaderboard, *, narrow: bool = False) -> Table:
    """Rank, label, capabilities, average with its interval, retention, what fell below the base, the comparison in pairs.

    ``narrow``: for the terminal, with short headings; what is unknown of every merge goes.
    """
    frame = board.table.assign(
        below=board.table["below_base"].replace("", NONE).where(board.table["negative_transfer"].notna(), "")
    )
    columns = [
        Column("rank", "#", COUNT, absent=""), Column("label", "merge"), *(_score(name) for name in board.capabilities),
        _score(AVERAGE, "avg" if narrow else "average")._replace(ends=_ends("score", AVERAGE)),
        Column("retention", "kept" if narrow else "", PERCENT, absent=""),
        Column("negative_transfer", "below", COUNT, absent="") if narrow else Column("below", "below base"),
    ]  # fmt: skip
    columns += _compared(board)
    if narrow:
        columns = [one._replace(ends=None, title="diff") if one.name == "difference" else one for one in columns]
        columns = [one for one in columns if not one.is_number or frame[one.name].notna().any()]
    strong = [i == 0 for i in range(len(frame))]
    return Table(f"Leaderboard of {board.experiment}", frame, columns, caption(board), () if narrow else strong, group="kind")


def details(board: Leaderboard) -> list[Table]:
    """What the page has besides: the comparison in pairs, scores and retention with their intervals, how each was merged."""
    label = Column("label", "merge")
    made = board.merges.assign(experts=board.merges["experts"].str.replace("+", ", ", regex=False))
    settings = [Column(name, unit=NUMBER) for name in ("density", "power")]
    settings += [Column("compression"), Column("lambda", unit=NUMBER)]
    scores = [_score(name)._replace(ends=_ends("score", name)) for name in board.capabilities]
    kept = [Column(f"retention/{name}", name, PERCENT, ends=_ends("retention", name)) for name in board.capabilities]
    kept.append(Column("retention", "mean", PERCENT, ends=_ends("retention", AVERAGE)))
    paired = (
        [
            Table(
                f"Compared with {board.baseline}",
                board.merges.dropna(subset="difference"),
                [label, *compared],
                _of_differences(board),
            )
        ]
        if (compared := _compared(board))
        else []
    )
    return [
        *paired,
        Table("Scores with their intervals", board.table, [label, *scores]),
        Table("Retention", board.merges, [label, *kept], [RETAINED]),
        Table("How they were merged", made, [label, Column("experts"), Column("base"), *settings, Column("run_id", "run")]),
    ]


def _score(name: str, title: str = "") -> Column:
    return Column(f"score/{name}", title or name, PERCENT)


def _ends(of: str, name: str) -> tuple[str, str]:
    return f"{of}_low/{name}", f"{of}_high/{name}"


def _compared(board: Leaderboard) -> list[Column]:
    """The comparison in pairs, where there is one."""
    if board.table["difference"].isna().all():
        return []
    ends = ("difference_low", "difference_high")
    return [Column("difference", unit=POINTS, ends=ends, absent=""), Column("p_holm", _P, P_VALUE, absent="")]


def caption(board: Leaderboard) -> list[str]:
    """What the numbers are, and what was left out, a sentence or two each."""
    lines = [
        "Scores and retention (merge / expert on the expert's own capability) in percent. Below base: capabilities on which the merge "
        "scores less than the base."
    ]
    merges = board.merges
    if merges[f"score_low/{AVERAGE}"].notna().any():
        lines.append("Intervals are 95 %: Wilson's for a capability, MOVER for their average, over documents.")
    lines += _of_differences(board)
    if merges["experts"].nunique() > 1:
        lines.append("Retention is the mean over the capabilities of the experts in a merge, which not all share.")
    elif merges["experts"].iloc[0]:
        lines.append(f"All are merges of {merges['experts'].iloc[0].replace('+', ', ')}.")
    lines.append(f"Suite {board.suite}, limit {board.limit}, key {board.suite_key}; experiment {board.experiment}.")
    return lines + board.notes


def _of_differences(board: Leaderboard) -> list[str]:
    """What the comparison in pairs is, where there is one."""
    if board.table["difference"].isna().all():
        return []
    merges = board.merges
    return [
        f"Differences are to '{board.baseline}', over the same {int(merges['documents'].max()):,} documents in pairs; p is of a two-sided "
        f"sign-flip test, adjusted for {int(merges['difference'].notna().sum())} comparisons (Holm). "
        "The best was chosen by these documents, so that its lead is somewhat flattered."
    ]


def summary(board: Leaderboard) -> str:
    """Which is the best, in a sentence."""
    best, count = board.best, len(board.merges)
    low, high = (best[name] for name in _ends("score", AVERAGE))
    sure = f" (95 % interval {PERCENT.text(low)} to {PERCENT.text(high)})" if low == low else ""
    average = PERCENT.text(best[f"score/{AVERAGE}"])
    return f"Best of {count} merge{'s' if count > 1 else ''}: {best['label']}, {average} % on average{sure}."


def to_page(board: Leaderboard) -> str:
    """One HTML page with everything inside: the picture, the table, every interval."""
    from tasks.experiments.leaderboard.pictures import leaderboard_chart
    from tasks.pages.html import Section, to_html
    from tasks.pages.pictures.picture import Picture

    picture = Picture(
        "Average and capabilities",
        "The average with its 95 % interval where it is known, the line is the base; beside it each capability in percent, ↓: below the base.",
        leaderboard_chart(board),
    )
    main, compared = ranking(board), _compared(board)
    of_differences = _of_differences(board)
    main = replace(  # the differences have a section of their own
        main,
        columns=[column for column in main.columns if column not in compared],
        caption=[line for line in main.caption if line not in of_differences],
    )
    first = Section("Leaderboard", [summary(board), picture, main])
    return to_html(f"Leaderboard of {board.experiment}", [first, *(Section(one.title, [one]) for one in details(board))])


def write_files(board: Leaderboard, folder: Path) -> list[Path]:
    """Write table (CSV, Parquet, Markdown), picture (PNG) and page (HTML) into a folder, which is made; earlier ones are replaced."""
    from tasks.experiments.leaderboard.pictures import leaderboard_chart
    from tasks.pages.pictures.picture import png

    page = to_page(board)  # what can fail comes before the first file
    folder.mkdir(parents=True, exist_ok=True)
    board.table.to_csv(folder / CSV, index=False)
    board.table.to_parquet(folder / PARQUET, index=False)
    (folder / MARKDOWN).write_text(captioned(ranking(board)), encoding="utf-8")
    (folder / PNG).write_bytes(png(leaderboard_chart(board)))
    (folder / HTML).write_text(page, encoding="utf-8")
    return [folder / name for name in (CSV, PARQUET, MARKDOWN, PNG, HTML)]
