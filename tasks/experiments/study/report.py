"""A study as files: results.md, its tables as CSV and Parquet, figures as PNG, one self-contained page. The same results give the same bytes."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from tasks.experiments.study.pictures import pictures
from tasks.experiments.study.rows import DIFFERENCE, ERROR, StudyTable, study_table
from tasks.experiments.study.scores import AVERAGE, RETENTION, StudyResults, in_one_type
from tasks.experiments.study.tables import all_tables
from tasks.merging.labels import spell
from tasks.pages import markdown, terminal
from tasks.pages.html import Section, to_html
from tasks.pages.pictures.picture import Picture, png
from tasks.pages.tables import BITS, BITS_MORE, Column, Table

TABLES, FIGURES = "tables", "figures"
RESULTS, PAGE = "results.md", "study.html"


def write_study(results: StudyResults, folder: Path, *, command: str) -> list[StudyTable]:
    """Fill the folder, replacing what an earlier run left there; returns the tables. ``command``: what makes them again."""
    tables = all_tables(results)
    drawn = pictures(results, tables)
    for name in (TABLES, FIGURES):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    frames = {one.key: in_one_type(one.frame) for one in tables} | {"scores": results.tidy(), "cells": results.settings()}
    for name, frame in frames.items():
        frame.to_csv(folder / TABLES / f"{name}.csv", index=False, lineterminator="\n")
        frame.to_parquet(folder / TABLES / f"{name}.parquet", index=False)
    for name, picture in drawn.items():
        (folder / FIGURES / f"{name}.png").write_bytes(png(picture.chart))
    (folder / RESULTS).write_text(results_markdown(results, tables, drawn, figures=FIGURES, command=command), encoding="utf-8")
    made = Markup("<p>Made as it stands by <code>{}</code>.</p>").format(command)
    sections = [Section("Study", [*_facts(results), made, *_notes(results)])]
    for one in tables:
        sections.append(Section(one.title, [one, *(found for key, found in drawn.items() if _belongs(key, one.key))]))
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
        f"# Results of the study {markdown.cell(results.name)}",
        "",
        *(f"{line}\n" for line in [*_facts(results), f"Made as it stands by `{command}`."]),
    ]
    for one in tables:
        lines += [f"## {one.title}", "", markdown.captioned(one)]
        for key, picture in drawn.items():
            if _belongs(key, one.key):
                lines += [f"![{picture.title}]({figures}/{key}.png)", "", f"*{picture.title}. {picture.caption}*", ""]
    notes = _notes(results)
    return "\n".join(lines + (["## Notes", "", *(f"- {markdown.cell(note)}" for note in notes), ""] if notes else []))


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


def summary(folder: Path) -> list[Table]:
    """What the command prints at the end: averages, retention and losses of base, experts and the merges of all experts."""
    methods, losses = folder / TABLES / "methods.csv", folder / TABLES / "losses.csv"
    if not methods.is_file():
        return []
    frame = pd.read_csv(methods)
    shown = study_table("methods", "", "", frame, percent=(AVERAGE, RETENTION))
    columns = [column for column in shown.columns if column.name in {"model", AVERAGE, RETENTION}]
    if losses.is_file():
        lost = pd.read_csv(losses)  # the same models in the same order
        frame = frame.join(lost.add_prefix("loss "))
        columns.append(Column(f"loss {AVERAGE}", "loss, bits/byte", BITS, f"loss {AVERAGE}{ERROR}"))
        if DIFFERENCE in lost:
            columns.append(Column(f"loss {DIFFERENCE}", "to the best", BITS_MORE, f"loss {DIFFERENCE}{ERROR}", absent=""))
    return [Table("Methods: percent ± standard error", frame, columns, group="kind")]


def render(folder: Path, written: Path | None) -> list[object]:
    """``summary`` for the terminal, and where everything is."""
    return [*map(terminal.table, summary(folder)), f"results: {written or folder / RESULTS}", f"page: {folder / PAGE}"]
