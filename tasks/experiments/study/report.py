"""A study as files: results.md, its tables as CSV and Parquet, figures as PNG, one self-contained page. The same results give the same bytes."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from tasks.evaluation.scores import NOT_MEASURED
from tasks.experiments.study.pictures import pictures
from tasks.experiments.study.rows import DIFFERENCE, ERROR, StudyTable
from tasks.experiments.study.scores import AVERAGE, BELOW, RETENTION, StudyResults
from tasks.experiments.study.tables import all_tables
from tasks.merging.labels import spell
from tasks.pages.pictures.page import Block, Picture, Section, table, to_html, to_png

TABLES, FIGURES = "tables", "figures"
RESULTS, PAGE = "results.md", "study.html"


def write_study(results: StudyResults, folder: Path, *, command: str) -> list[StudyTable]:
    """Fill the folder, replacing what an earlier run left there; returns the tables. ``command``: what makes them again."""
    tables = all_tables(results)
    drawn = pictures(results, tables)
    for name in (TABLES, FIGURES):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    frames = {one.key: one.frame for one in tables} | {"scores": results.tidy(), "cells": results.settings()}
    for name, frame in frames.items():
        frame.to_csv(folder / TABLES / f"{name}.csv", index=False, lineterminator="\n")
        frame.to_parquet(folder / TABLES / f"{name}.parquet", index=False)
    for name, picture in drawn.items():
        to_png(picture.chart, folder / FIGURES / f"{name}.png")
    (folder / RESULTS).write_text(results_markdown(results, tables, drawn, figures=FIGURES, command=command), encoding="utf-8")
    made = Markup("<p>Made as it stands by <code>{}</code>.</p>").format(command)
    sections = [Section("Study", [*_facts(results), made, *_notes(results)])]
    for one in tables:
        header, rows = text_rows(one)
        numbers = [i for i, name in enumerate(header) if _is_number(one, name)]
        blocks: list[Block] = [one.caption, table(header, rows, numbers=numbers)]
        sections.append(Section(one.title, [*blocks, *(found for key, found in drawn.items() if _belongs(key, one.key))]))
    (folder / PAGE).write_text(to_html(f"Study {results.name}", sections), encoding="utf-8")
    return tables


def write_results(folder: Path, results: StudyResults, tables: Sequence[StudyTable], file: Path, *, command: str) -> None:
    """``file`` (Markdown) with the study's figures beside it, in a folder of its name."""
    beside = file.with_suffix("")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(folder / FIGURES, beside)
    text = results_markdown(results, tables, pictures(results, tables), figures=beside.name, command=command)
    file.write_text(text, encoding="utf-8")


def results_markdown(
    results: StudyResults, tables: Sequence[StudyTable], drawn: dict[str, Picture], *, figures: str, command: str
) -> str:
    """The study as one Markdown page; ``figures``: the folder of the PNG files, relative to it."""
    lines = [
        f"# Results of the study {results.name}",
        "",
        *(f"{line}\n" for line in [*_facts(results), f"Made as it stands by `{command}`."]),
    ]
    for one in tables:
        lines += [f"## {one.title}", "", one.caption, "", to_markdown(one), ""]
        for key, picture in drawn.items():
            if _belongs(key, one.key):
                lines += [f"![{picture.title}]({figures}/{key}.png)", "", f"*{picture.title}. {picture.caption}*", ""]
    notes = _notes(results)
    return "\n".join(lines + (["## Notes", "", *(f"- {note}" for note in notes), ""] if notes else []))


def _belongs(picture: str, table_key: str) -> bool:
    """Figures are named after the table whose numbers they draw."""
    return picture == table_key or picture.startswith(f"{table_key}-")


def _facts(results: StudyResults) -> list[str]:
    found = {name: [one.capabilities[name].n_samples for one in results.base.values()] for name in results.capabilities}
    counts = ", ".join(f"{name} {n[0] if len(set(n)) == 1 else spell(tuple(n))}" for name, n in found.items())
    counts += " (one number a replicate where they differ)" if any(len(set(n)) > 1 for n in found.values()) else ""
    experts = ", ".join(f"{name} ({own})" if own and own != name else name for name, own in results.experts.items())
    many = (
        f", each on {len(results.replicates)} replicates ({', '.join(results.replicates)})" if len(results.replicates) > 1 else ""
    )
    return [
        f"{len(results.cells)} merges{many}, of the experts {experts}.",
        f"Scored on the suite {results.suite}; documents of each capability: {counts}.",
    ]


def _notes(results: StudyResults) -> list[str]:
    notes = [f"Left out, because it failed: {line}" for line in results.failed]
    for cell in results.cells:
        if cell.equal:
            notes.append(f"{cell.label} is the same merge as {', '.join(cell.equal)}, and was run once.")
    return notes


def text_rows(one: StudyTable) -> tuple[list[str], list[list[str]]]:
    """Header and cells as people read them: ``67.8 ± 0.4``, a dash where nothing was measured."""
    names = [name for name in one.frame.columns if not name.endswith(ERROR) and name != "kind"]
    rows = [[_cell(one, name, row) for name in names] for _, row in one.frame.iterrows()]
    return [name.replace("_", " ") for name in names], rows


def _cell(one: StudyTable, name: str, row: "pd.Series[object]") -> str:
    value = row[name]
    if isinstance(value, str):
        return value
    if value is None or pd.isna(value):
        # Retention says nothing of base and experts, nor a difference of what it is the difference to.
        blank = row.get("kind") in {"base", "expert"} or name not in one.percent or name == DIFFERENCE
        return "" if blank else NOT_MEASURED
    if name == BELOW:
        return f"{value:g}" if float(value).is_integer() else f"{value:.1f}"
    if name not in {*one.percent, *one.bits}:
        return f"{value:.3g}"
    error = row.get(f"{name}{ERROR}")
    sign = "+" if name == DIFFERENCE else ""
    # Losses of the same documents differ by less than either is sure of: one digit more.
    scale, digits = (1, 4 if sign else 3) if name in one.bits else (100, 1)
    text = f"{scale * float(value):{sign}.{digits}f}"
    return text if error is None or math.isnan(error) else f"{text} ± {scale * float(error):.{digits}f}"


def _is_number(one: StudyTable, header: str) -> bool:
    names = {name.replace("_", " "): name for name in one.frame.columns}
    return (
        header == BELOW.replace("_", " ")
        or names[header] in one.percent
        or pd.api.types.is_numeric_dtype(one.frame[names[header]])
    )


def to_markdown(one: StudyTable) -> str:
    """The table as GitHub-flavoured Markdown."""
    header, rows = text_rows(one)
    rule = ["---:" if _is_number(one, name) else "---" for name in header]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in [header, rule, *rows])


def render(folder: Path, written: Path | None) -> list[object]:
    """What the command prints at the end: the averages of the merges of all experts, and where everything is."""
    from rich import box
    from rich.table import Table

    methods = folder / TABLES / "methods.csv"
    lines: list[object] = []
    if methods.is_file():
        frame = pd.read_csv(methods)
        drawn = Table(
            title="Methods: percent ± standard error", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False
        )
        drawn.add_column("model")  # a long name breaks between its words; numbers never break
        for name in (AVERAGE, RETENTION):
            drawn.add_column(name, justify="right", no_wrap=True)
        shown = StudyTable("methods", "", "", frame, (AVERAGE, RETENTION))
        rows = [[str(row["model"]), *(_cell(shown, name, row) for name in (AVERAGE, RETENTION))] for _, row in frame.iterrows()]
        losses = folder / TABLES / "losses.csv"
        if losses.is_file():
            of = StudyTable("losses", "", "", pd.read_csv(losses), bits=(AVERAGE, DIFFERENCE))
            shown_losses = [name for name in of.bits if name in of.frame]
            for title in ("loss,\nbits/byte", "to the best")[: len(shown_losses)]:
                drawn.add_column(title, justify="right", no_wrap=True)
            for cells, (_, row) in zip(rows, of.frame.iterrows(), strict=True):  # the same models in the same order
                cells.extend(_cell(of, name, row) for name in shown_losses)
        for cells in rows:
            drawn.add_row(*cells)
        lines.append(drawn)
    return [*lines, f"results: {written or folder / RESULTS}", f"page: {folder / PAGE}"]
