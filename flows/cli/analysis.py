"""``ota analyse``: where the masks of a recipe lie, how alike its experts are, what compressions lose; tables in a folder."""

import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from flows.cli.common import Fetch, Home, Memory, Out, Overwrite, Recipe, progress_bars, recipe_inputs, show, user_errors


def analyse(
    recipe: Recipe,
    out: Out,
    density: Annotated[
        float | None,
        typer.Option(
            help="Density of masks that the recipe does not decide: of experts that it does not mask, of the overlap between experts, of the "
            "comparison of compressions.",
            show_default="the recipe's, or 0.4",
        ),
    ] = None,
    compressions: Annotated[
        str, typer.Option(help="Compressions to compare with the full second moments, with commas between them; '-' for none.")
    ] = "none,rank1,log8,rank_k",
    curvature: Annotated[
        str,
        typer.Option(
            help="auto: of every expert whose second moments are at hand; require: an expert without is an error; off: edits alone."
        ),
    ] = "auto",
    memory: Memory = "2GiB",
    overwrite: Overwrite = False,
    fetch: Fetch = False,
    home: Home = None,
) -> None:
    """Analyse the experts of RECIPE as its merge would see them, and write tables and pictures into the folder OUT. No server is needed."""
    from ota_core.analysis import analyse as analyse_models
    from ota_core.compute.stream import parse_memory
    from ota_core.merge.output import check_apart, check_free, new_folder
    from ota_core.recipe.recipe import load_recipe
    from tasks.analyse import analysis_options
    from tasks.pages.analysis import PICTURES, write_tables
    from tasks.pages.pictures.analysis import pictures_of
    from tasks.pages.pictures.page import Section, to_html

    with user_errors():
        options = analysis_options(density=density, compressions=compressions, curvature=curvature)
        loaded = load_recipe(recipe)
        parse_memory(memory)
        check_free(out, overwrite=overwrite)
        started = time.perf_counter()
        with (
            progress_bars() as progress,
            recipe_inputs(
                loaded,
                recipe,
                home=home,
                memory=memory,
                fetch=fetch,
                progress=progress,
                optional_moments=options.curvature != "off",
            ) as (inputs, notes),
        ):
            check_apart(out, inputs)
            with new_folder(out, overwrite=overwrite) as folder:
                found = analyse_models(loaded, inputs, options, memory=memory, scratch=folder, progress=progress)
                table = write_tables(folder, found)
                pictures = [*pictures_of(table).values()]
                sections = [Section("Analysis", [*found.notes, *(f"Left out: {what}" for what in found.left_out), *pictures])]
                (folder / PICTURES).write_text(to_html(f"Analysis of {recipe.name}", sections), encoding="utf-8")
        for item in _summary(table):
            show(item)
        for note in [*notes, *found.notes]:
            typer.echo(f"note: {note}")
        for missing in found.left_out:
            typer.echo(f"left out: {missing}")
        typer.echo(
            f"{out}: {len(table):,} numbers (analysis.parquet, analysis.csv), {PICTURES} in {time.perf_counter() - started:.1f} s"
        )


def _summary(table: Any) -> Iterator[Any]:
    """What one wants to know first, as rich tables: where the masks lie, how alike the experts are, what compressions lose."""
    from pandas import isna

    from tasks.pages.analysis import densest_cells, whole_model

    cells = densest_cells(table)
    if len(cells):
        yield _table(
            "Where FFG keeps most (mean of the experts)",
            ["layer", "role", *(f"{name} %" for name in cells.columns[2:])],
            [
                ["–" if isna(layer) else str(layer), role, *(f"{100 * share:.1f}" for share in shares)]
                for layer, role, *shares in cells.itertuples(index=False)
            ],
        )
    pairs = []
    for analysis, measure, label in (
        ("curvature_overlap", "cosine_sqrt_v", "curvature: cosine of √v"),
        ("curvature_overlap", "spearman", "curvature: rank correlation of v"),
        ("curvature_overlap", "jaccard", "curvature: Jaccard of the largest v"),
        ("task_vector", "cosine", "edits: cosine"),
        ("task_vector", "sign_conflict", "edits: sign conflict"),
    ):
        whole = whole_model(table, analysis, measure)
        values = whole.value
        if len(values):
            if measure == "jaccard":
                label += f" (density {whole['at'].iloc[0]:.3g})"
            pairs.append([label, *(f"{x:.3f}" for x in (values.min(), values.mean(), values.max()))])
    if pairs:
        yield _table("Pairs of experts, over the whole model", ["", "least", "mean", "most"], pairs)
    lost = whole_model(table[table.analysis == "compression"], "compression", "sqrt_error")
    if len(lost):
        measures = ["bytes_per_param", "sqrt_error", "mask_jaccard", "saliency_spearman"]
        means = table[table.analysis == "compression"].pivot_table(index="variant", columns="measure", values="value", sort=False)
        means = means.reindex(columns=[m for m in measures if m in means.columns])
        rows = [[str(name), *(f"{x:.4f}" for x in values)] for name, values in zip(means.index, means.to_numpy(), strict=True)]
        yield _table("Compressions of the second moments, mean of the experts", ["", *means.columns], rows)


def _table(title: str, columns: list[str], rows: list[list[str]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table
