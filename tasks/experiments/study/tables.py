"""The tables of a study, each selected from the grid by what its cells differ in. A table for which the grid has no cells is left out."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from ota_core.recipe.methods import OF_REFINE
from ota_core.recipe.parameters import default
from tasks.experiments.study.cells import Cell, canonical, families, spelled
from tasks.experiments.study.losses import every_loss_table, losses_table
from tasks.experiments.study.rows import (
    DIFFERENCE,
    Row,
    StudyTable,
    errors_over,
    is_ffg,
    methods_of,
    model_rows,
    numbers,
    on_all,
    study_table,
    words,
    words_of_subset,
)
from tasks.experiments.study.scores import AVERAGE, BELOW, RETENTION, StudyResults
from tasks.merging.labels import FFG_SETTINGS, spell

_ESTIMATE = ("estimate", "missing_curvature")
_NAMES = {"none": "full", "rank1": "rank 1", "log8": "log8"}
CHOSEN = (
    "Of each method the first untuned merge of all experts in the grid, with and without FFG and row-space regression: not the best one, which would be chosen by the scores "
    "that it is compared on. Tuned ones, where there are any, were chosen on other documents."
)


def all_tables(results: StudyResults) -> list[StudyTable]:
    """Every table that the grid has cells for, in the order of docs/methods.md section 7."""
    builders: list[Callable[[StudyResults], list[StudyTable]]] = [
        methods_table, losses_table, every_loss_table, ffg_table, refine_table, density_table, grafting_table, compression_table, estimate_table, combination_table, sweep_tables, subsets_table,
        tuning_table,
    ]  # fmt: skip
    return [table for build in builders for table in build(results)]


def methods_table(results: StudyResults) -> list[StudyTable]:
    """Base, experts and one row a method: see ``methods_of``."""
    chosen = methods_of(results)
    if not chosen:
        return []
    rows = model_rows(results, chosen, partial(_scores, results), partial(_beside_scores, results))
    return _tables(results, "methods", "Methods and capabilities", f"{CHOSEN} {_explained(results)}", rows)


def density_families(cells: Sequence[Cell]) -> list[tuple[Cell | None, list[Cell]]]:
    """(cell without FFG, if the grid has it; cells that differ in density and metric alone), of each merge that FFG masks."""
    masked = [cell for cell in cells if is_ffg(cell) and "density" in cell.settings and not cell.chosen]
    groups: dict[str, list[Cell]] = {}
    for cell in masked:
        groups.setdefault(canonical(cell, without=("density", "metric")), []).append(cell)
    off = {
        canonical(cell, without=FFG_SETTINGS): cell
        for cell in cells
        if cell.method == "ota" and not is_ffg(cell) and not cell.chosen
    }
    return [(off.get(canonical(group[0], without=FFG_SETTINGS)), group) for group in groups.values()]


def ffg_table(results: StudyResults) -> list[StudyTable]:
    """The same recipe without FFG and with it, at each density."""
    rows: list[Row] = []
    for off, group in density_families(on_all(results)):
        with_ffg = [cell for cell in group if cell.settings["metric"] == "curvature"]
        if off is None or not with_ffg:
            continue
        recipe = words(off, skip=FFG_SETTINGS)
        rows.append({"recipe": recipe, "FFG": "off"} | _merge(results, off))
        for cell in with_ffg:
            row = {"recipe": recipe, "FFG": f"density {spell(cell.settings['density'])}"} | _merge(results, cell)
            rows.append(row | numbers(DIFFERENCE, results.difference(cell, off)))
    caption = f"{DIFFERENCE}: of the average to the same recipe without FFG{_paired(results)}. {_explained(results)}"
    return _tables(results, "ffg", "FFG on and off", caption, rows)


def refine_table(results: StudyResults) -> list[StudyTable]:
    """The same recipe without a row-space regression and with it, at its default settings."""
    rows: list[Row] = []
    plain = [
        cell
        for cell in on_all(results)
        if all(cell.settings.get(key) in {None, default(cell.method, key)} for key in OF_REFINE) or "refine" not in cell.settings
    ]
    for group in families(plain, ("refine", *OF_REFINE)):
        off = next((cell for cell in group if "refine" not in cell.settings), None)
        if off is None:
            continue
        recipe = words(off)
        rows.append({"recipe": recipe, "row spaces": "off"} | _merge(results, off))
        for cell in (one for one in group if one is not off):
            row = {"recipe": recipe, "row spaces": "on"} | _merge(results, cell)
            rows.append(row | numbers(DIFFERENCE, results.difference(cell, off)))
    caption = (
        f"{DIFFERENCE}: of the average to the same recipe without row-space regression{_paired(results)}. {_explained(results)}"
    )
    return _tables(results, "refine", "Row-space regression on and off", caption, rows)


def density_table(results: StudyResults) -> list[StudyTable]:
    """The density sweep of merges of all experts: FFG beside magnitude."""
    rows: list[Row] = []
    for off, every in density_families(on_all(results)):
        # Densities that differ between the experts are no point of an axis; the table of FFG on and off has them.
        group = [cell for cell in every if not isinstance(cell.settings["density"], tuple)]
        if not group or len({cell.settings["density"] for cell in [*group, *([off] if off else [])]}) < 2:
            continue
        recipe = words(group[0], skip=("density", "metric"))
        for density in sorted({cell.settings["density"] for cell in group}):
            by = {cell.settings["metric"]: cell for cell in group if cell.settings["density"] == density}
            row: Row = {"recipe": recipe, "density": density}
            for metric, name in (("curvature", "FFG"), ("magnitude", "magnitude")):
                row |= numbers(name, results.average(results.models(by[metric])) if metric in by else None)
                row |= numbers(f"{name} retention", results.retention(by[metric]) if metric in by else None)
            both = results.difference(by["curvature"], by["magnitude"]) if len(by) == 2 else None
            rows.append(row | numbers(DIFFERENCE, both))
        if off:
            alike = numbers("FFG", results.average(results.models(off))) | numbers("FFG retention", results.retention(off))
            rows.append({"recipe": recipe, "density": 1.0} | alike | {k.replace("FFG", "magnitude"): v for k, v in alike.items()})
    names = ("FFG", "FFG retention", "magnitude", "magnitude retention", DIFFERENCE)
    caption = (
        f"Average over capabilities of merges of all experts. Density: the fraction of each expert's elements that is kept, ranked by √v·|Δ| (FFG) "
        f"or by |Δ| (magnitude); at 1 nothing is masked. {DIFFERENCE}: FFG less magnitude{_paired(results)}. {_explained(results)}"
    )
    return _tables(results, "density", "Density: FFG against magnitude", caption, rows, only=names)


def grafted(results: StudyResults) -> dict[str, list[Cell]]:
    """Expert to the cells that graft it alone onto the base, in the grid's order."""
    return {
        name: [cell for _, group in density_families([c for c in results.cells if c.experts == (name,)]) for cell in group]
        for name, capability in results.experts.items()
        if capability in results.capabilities
    }


def grafting_table(results: StudyResults) -> list[StudyTable]:
    """Single experts grafted onto the base: score on their own capability against density, FFG and magnitude."""
    cells = {name: found for name, found in grafted(results).items() if found}
    if not cells:
        return []
    own = {name: str(results.experts[name]) for name in cells}
    rows: list[Row] = [{"grafted by": "base", "density": 0.0}]
    for name in cells:
        rows[0] |= numbers(name, results.score(results.models(), own[name]))
    points = dict.fromkeys((str(c.settings["metric"]), c.settings["density"]) for found in cells.values() for c in found)
    for metric, density in sorted(points, key=lambda point: (point[0], point[1])):
        row: Row = {"grafted by": {"curvature": "FFG"}.get(metric, metric), "density": density}
        for name, found in cells.items():
            cell = next((c for c in found if (c.settings["metric"], c.settings["density"]) == (metric, density)), None)
            row |= numbers(name, results.score(results.models(cell), own[name]) if cell else None)
        rows.append(row)
    last: Row = {"grafted by": "expert", "density": 1.0}
    for name in cells:
        last |= numbers(name, results.score(results.models(expert=name), own[name]))
    caption = (
        "Each expert alone, only its best elements grafted onto the base: score on its own capability. The base is density 0, the whole expert "
        f"density 1. {_explained(results, retention=False)}"
    )
    return _tables(results, "grafting", "Single experts grafted onto the base", caption, [*rows, last], only=tuple(cells))


def estimate_table(results: StudyResults) -> list[StudyTable]:
    """The same recipe with second moments as training left them, and with estimated ones."""
    rows: list[Row] = []
    for group in families(on_all(results), _ESTIMATE):
        kept = next((cell for cell in group if "estimate" not in cell.settings), None)
        if kept is None:
            continue
        recipe = words(kept)
        rows.append({"recipe": recipe, "second moments": "from training"} | _merge(results, kept))
        for cell in (one for one in group if one is not kept):
            row = {"recipe": recipe, "second moments": f"estimated, {cell.settings['estimate']}"} | _merge(results, cell)
            rows.append(row | numbers(DIFFERENCE, results.difference(cell, kept)))
    caption = (
        f"Estimated: the mean squared gradient of each expert's loss over so many documents. {DIFFERENCE}: of the average to the same recipe with "
        f"the second moments from training{_paired(results)}. {_explained(results)}"
    )
    return _tables(results, "estimate", "Second moments from training and estimated", caption, rows)


def compression_table(results: StudyResults) -> list[StudyTable]:
    """The same recipe on full and on compressed second moments."""
    rows: list[Row] = []
    for group in families(on_all(results), ("compression", "rank")):
        recipe = words(group[0], skip=("compression", "rank"))
        for cell in group:
            found = results.of(cell)
            row: Row = {"recipe": recipe, "second moments": moments_name(cell)} | _merge(results, cell)
            row |= _against(results, cell, group, "compression")
            row["bytes/parameter"] = sum(one.bytes_per_param for one in found) / len(found)
            # max() would pass over a NaN that is not its first value.
            row["√v error"] = float(np.max([one.sqrt_error for one in found]))
            rows.append(row)
    said = "bytes/parameter: what the stored second moments take, mean over the experts. √v error: ‖√ṽ − √v‖ / ‖√v‖, the largest of all experts. "
    if any(pd.isna(row["bytes/parameter"]) for row in rows):
        said += "Both are blank where the stored second moments are no longer among the artifacts. "
    return _varied(results, "compression", "Full and compressed second moments", said, "full second moments", rows)


def moments_name(cell: Cell) -> str:
    """How a cell stores second moments, for people: full, rank 1, log8, rank 4."""
    compression = str(cell.settings.get("compression", ""))
    return f"rank {cell.settings['rank']}" if compression == "rank_k" else _NAMES.get(compression, compression)


def combination_table(results: StudyResults) -> list[StudyTable]:
    """How masked task vectors are combined: weighed by curvature (precond), linear, ties."""
    said = "The same masks, then the masked task vectors weighed by curvature (precond), averaged (linear) or merged as TIES does (ties). "
    rows = _family_rows(results, "masked_merge", "combined by")
    return _varied(results, "combination", "Precond, linear and ties after FFG", said, "precond", rows)


def sweep_tables(results: StudyResults) -> list[StudyTable]:
    """Each other parameter that the grid varies alone: λ, power, the density of methods without FFG, …"""
    covered = {"merge_method", *_ESTIMATE, "compression", "rank", "masked_merge", *FFG_SETTINGS}
    keys = dict.fromkeys(key for cell in on_all(results) for key in cell.settings)
    found: list[StudyTable] = []
    for key in [*(key for key in keys if key not in covered), "density"]:
        rows = _family_rows(results, key, key, lambda cell: key != "density" or cell.method != "ota")  # noqa: B023 - used at once
        rows.sort(key=lambda row: (row["recipe"], _place(row[key])))
        rows = [row | {key: value} for row, value in zip(rows, spelled([row[key] for row in rows]), strict=True)]
        title = {
            "lambda": "Scale λ of the merged task vector",
            "power": "Power of the curvature",
            "density": "Density of other methods",
        }.get(key, f"Parameter {key}")
        found += _varied(results, "sweep-density" if key == "density" else key, title, "", f"the default {key}", rows)
    return found


def _family_rows(results: StudyResults, key: str, column: str, keep: Callable[[Cell], bool] = lambda cell: True) -> list[Row]:
    rows: list[Row] = []
    for group in families([cell for cell in on_all(results) if keep(cell)], (key,)):
        rows += [
            {"recipe": words(cell, skip=(key,)), column: cell.settings.get(key)}
            | _merge(results, cell)
            | _against(results, cell, group, key)
            for cell in group
        ]
    return rows


def _against(results: StudyResults, cell: Cell, family: Sequence[Cell], key: str) -> Row:
    """The difference of a cell's average to that of the cell of its family with the default ``key``, on the same replicates.

    No column where the grid has no such cell, and none with one replicate: there is nothing to pair, and an error as if the two were
    independent would be too large.
    """
    usual = next((one for one in family if one.settings.get(key) == default(one.method, key)), None)
    if usual is None or len(results.replicates) < 2:
        return {}
    return numbers(DIFFERENCE, None if usual is cell else results.difference(cell, usual))


def _varied(results: StudyResults, key: str, title: str, said: str, reference: str, rows: list[Row]) -> list[StudyTable]:
    """The table of rows that are compared by ``_against``; ``said`` begins its caption, which names what they are compared with, if they are."""
    if any(DIFFERENCE in row for row in rows):
        said += f"{DIFFERENCE}: of the average to the same recipe with {reference}{_paired(results)}. "
    return _tables(results, key, title, f"{said}{_explained(results)}", rows)


def _place(value: Any) -> tuple[float, ...]:
    """Where a value of a sweep stands among the others: numbers by their size, those of several experts by the first that differs.

    What is no number stays in the grid's order.
    """
    values = value if isinstance(value, tuple) else (value,)
    return values if all(isinstance(one, float) for one in values) else ()


def subsets_table(results: StudyResults) -> list[StudyTable]:
    """The same recipe on different subsets of at least two experts."""
    groups: dict[str, list[Cell]] = {}
    for cell in results.cells:
        if len(cell.experts) > 1 and not cell.chosen:
            groups.setdefault(canonical(cell, experts=False), []).append(cell)
    rows: list[Row] = []
    for group in (found for found in groups.values() if len(found) > 1):
        rows += [{"recipe": words(cell), "experts": _subset(results, cell)} | _merge(results, cell) for cell in group]
    caption = f"Retention is over the own capabilities of the experts that are merged. {_explained(results)}"
    return _tables(results, "experts", "Subsets of the experts", caption, rows)


def _subset(results: StudyResults, cell: Cell) -> str:
    missing = [name for name in results.experts if name not in cell.experts]
    return "all" if not missing else f"without {missing[0]}" if len(missing) == 1 else "+".join(cell.experts)


def tuning_table(results: StudyResults) -> list[StudyTable]:
    """What the searches of tuned cells found, on each replicate."""
    rows: list[Row] = []
    for cell in (cell for cell in results.cells if cell.tune):
        for one in results.of(cell):
            rows.append(
                {"model": words_of_subset(results, cell), "replicate": one.replicate or "–"}
                | {key: one.chosen.get(key) for key in cell.tune}
            )
    caption = "λ and density that each tuned method found on the validation suite, all with the same number of trials."
    found = [study_table("tuning", "What tuning found", caption, pd.DataFrame(rows))] if rows else []
    return found + _learned_table(results)


def _learned_table(results: StudyResults) -> list[StudyTable]:
    """How far the learning of scales came, on each replicate."""
    rows = [
        {
            "model": words_of_subset(results, cell), "replicate": one.replicate or "–", "step": one.chosen["step"],
            "as given": one.chosen["held_out_before"], "learned": one.chosen["held_out"],
        }
        for cell in results.cells if cell.learn for one in results.of(cell)
    ]  # fmt: skip
    caption = (
        "The step whose scales are kept, and the objective on validation documents that were held out of the learning: "
        "with the recipe as given, and with the scales."
    )
    return [study_table("learned", "What learning found", caption, pd.DataFrame(rows))] if rows else []


def _scores(results: StudyResults, models: Sequence[Any]) -> Row:
    row: Row = {}
    for name in results.capabilities:
        row |= numbers(name, results.score(models, name))
    return row | numbers(AVERAGE, results.average(models))


def _merge(results: StudyResults, cell: Cell) -> Row:
    return _scores(results, results.models(cell)) | _beside_scores(results, cell)


def _beside_scores(results: StudyResults, cell: Cell) -> Row:
    return numbers(RETENTION, results.retention(cell)) | {BELOW: results.below_base(cell).mean}


def _tables(
    results: StudyResults,
    key: str,
    title: str,
    caption: str,
    rows: list[Row],
    *,
    only: Sequence[str] = (),
) -> list[StudyTable]:
    """The table of these rows; none without any."""
    if not rows:
        return []
    frame = pd.DataFrame(rows)
    percent = tuple(only) or tuple(name for name in (*results.capabilities, AVERAGE, RETENTION, DIFFERENCE) if name in frame)
    if "recipe" in frame and frame["recipe"].nunique() == 1:  # it stands in the caption once
        caption = f"Recipe: {frame['recipe'].iloc[0]}. {caption}"
        frame = frame.drop(columns="recipe")
    return [study_table(key, title, caption, frame, percent)]


def _paired(results: StudyResults) -> str:
    return ", replicate by replicate" if results.over == "replicates" else ", its error as if the two were independent"


def _explained(results: StudyResults, *, retention: bool = True) -> str:
    """What the numbers are, and what the errors are over."""
    text = errors_over(results, "Percent")
    if len(results.averaged) < len(results.capabilities):
        left_out = ", ".join(name for name in results.capabilities if name not in results.averaged)
        text += f" The average leaves out what was not measured for every model: {left_out}."
    if retention:
        independent = ", its error as if merge and expert were independent" if results.over == "documents" else ""
        text += (
            f" Retention: merge / expert on the experts' own capabilities, the best expert where several share one{independent}. "
            "below base: capabilities on which the merge is worse than the base."
        )
    return text
