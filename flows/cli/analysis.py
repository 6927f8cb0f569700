"""``ota analyse``: where the masks of a recipe lie, how alike its experts are, what compressions lose. ``ota preflight``: will it merge?"""

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from flows.cli.common import Fetch, Home, Memory, Out, Overwrite, Recipe, TrackingUri, recipe_inputs, show


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
    from ota_core.engine.output import check_apart
    from ota_core.files.place import check_free, made_of, new_folder
    from ota_core.recipe.recipe import load_recipe
    from tasks.analyse import analysis_options
    from tasks.pages.analysis import CSV, PARQUET, PICTURES, SETTINGS, write_tables
    from tasks.pages.html import Section, to_html
    from tasks.pages.pictures.analysis import pictures_of
    from tasks.pages.terminal import table as drawn

    options = analysis_options(density=density, compressions=compressions, curvature=curvature)
    loaded = load_recipe(recipe)
    parse_memory(memory)
    is_analysis = made_of(SETTINGS, PARQUET, CSV, PICTURES)
    check_free(out, overwrite=overwrite, is_output=is_analysis, keep=[recipe])
    started = time.perf_counter()
    wanted = options.curvature != "off"
    with recipe_inputs(loaded, recipe, home=home, memory=memory, fetch=fetch, optional_moments=wanted) as (
        inputs,
        notes,
        progress,
    ):
        check_apart(out, inputs)
        with new_folder(out, overwrite=overwrite, is_output=is_analysis) as folder:
            found = analyse_models(loaded, inputs, options, memory=memory, scratch=folder, progress=progress)
            table = write_tables(folder, found)
            pictures = [*pictures_of(table).values()]
            sections = [Section("Analysis", [*found.notes, *(f"Left out: {what}" for what in found.left_out), *pictures])]
            (folder / PICTURES).write_text(to_html(f"Analysis of {recipe.name}", sections), encoding="utf-8")
    for item in _summary(table):
        show(drawn(item))
    for note in [*notes, *found.notes]:
        typer.echo(f"note: {note}")
    for missing in found.left_out:
        typer.echo(f"left out: {missing}")
    typer.echo(
        f"{out}: {len(table):,} numbers (analysis.parquet, analysis.csv), {PICTURES} in {time.perf_counter() - started:.1f} s"
    )


def preflight(
    recipe: Recipe,
    suite: Annotated[
        str | None,
        typer.Option(help="Suite whose scores of base and experts count.", show_default="that of the newest merge of them"),
    ] = None,
    memory: Memory = "2GiB",
    fetch: Fetch = False,
    home: Home = None,
    tracking_uri: TrackingUri = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one line of JSON.")] = False,
) -> None:
    """Say before a merge whether the experts of RECIPE will merge: how they overlap, λ, the retention to expect, and who hurts.

    Predictions learn from the merges that MLflow holds here and from those of our studies. Nothing is merged or written.
    """
    from ota_core.analysis.preflight import preflight as measure
    from ota_core.compute.stream import parse_memory
    from ota_core.recipe.recipe import load_recipe
    from tasks.experiments.preflight import page
    from tasks.experiments.preflight.history import examples, scored
    from tasks.experiments.preflight.outlook import outlook
    from tasks.pages.analysis import frame, said
    from tasks.pages.terminal import table as drawn
    from tasks.settings import places
    from tasks.tracking.store import resolve_store

    loaded = load_recipe(recipe)
    parse_memory(memory)
    store = resolve_store(tracking_uri=tracking_uri, root=places(home).tracking)
    with recipe_inputs(loaded, recipe, home=home, memory=memory, fetch=fetch) as (inputs, notes, progress):
        measured = measure(loaded, inputs, memory=memory, progress=progress)
        known, capabilities = scored(store, inputs, suite)
    found = outlook(frame(measured.rows), said(measured), examples(store), known, capabilities)
    if as_json:
        typer.echo(json.dumps(page.to_json(found)))
        return
    for item in (page.experts_table(found), page.pairs_table(found)):
        if item is not None:
            show(drawn(item))
    for line in page.sentences(found):
        typer.echo(line)
    for note in [*notes, *measured.notes]:
        typer.echo(f"note: {note}")
    for missing in measured.left_out:
        typer.echo(f"left out: {missing}")


def _summary(table: Any) -> Iterator[Any]:
    """What one wants to know first: where the masks lie, how alike the experts are, what compressions lose."""
    from pandas import DataFrame

    from tasks.pages.analysis import densest_cells, whole_model
    from tasks.pages.tables import PERCENT, TEXT, Column, Table, Unit

    ratio = Unit("", ".3f")
    cells = densest_cells(table)
    if len(cells):
        densities = [Column(name, f"{name} %", PERCENT) for name in cells.columns[2:]]
        yield Table(
            "Where FFG keeps most (mean of the experts)",
            cells,
            [Column("layer", unit=Unit("", ".0f")), Column("role"), *densities],
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
            pairs.append({"measure": label, "least": values.min(), "mean": values.mean(), "most": values.max()})
    if pairs:
        numbers = [Column(name, unit=ratio) for name in ("least", "mean", "most")]
        yield Table("Pairs of experts, over the whole model", DataFrame(pairs), [Column("measure"), *numbers])
    lost = table[table.analysis == "compression"]
    if len(whole_model(lost, "compression", "sqrt_error")):
        means = lost.pivot_table(index="variant", columns="measure", values="value", sort=False).reset_index()
        measures = ["bytes_per_param", "sqrt_error", "mask_jaccard", "saliency_spearman"]
        columns = [
            Column(name, name, Unit("", ".4f") if name != "variant" else TEXT) for name in ["variant", *measures] if name in means
        ]
        yield Table("Compressions of the second moments, mean of the experts", means, columns)
