"""The table of held-out losses of a study, where its suite measures them, and which merge the others are compared with."""

from collections.abc import Sequence
from functools import partial

import pandas as pd

from tasks.evaluation.scores import ModelScores
from tasks.experiments.study.cells import Cell
from tasks.experiments.study.rows import (
    DIFFERENCE,
    RECOVERED,
    Row,
    StudyTable,
    errors_over,
    methods_of,
    model_rows,
    numbers,
    on_all,
    study_table,
    words,
)
from tasks.experiments.study.scores import AVERAGE, StudyResults


def ranked(results: StudyResults) -> list[Cell]:
    """The merges of the table, lowest average loss first: the others are compared with that one. None where there are no two to compare."""
    chosen = methods_of(results) if results.lossy else []
    by_loss = sorted(chosen, key=lambda cell: results.loss(results.models(cell), *results.lossy).mean)
    return by_loss if len(by_loss) > 1 else []


def losses_table(results: StudyResults) -> list[StudyTable]:
    """Bits per byte of held-out text by capability: base, experts, and the merges of the methods' table."""
    chosen = methods_of(results)
    if not chosen or not results.lossy:
        return []
    best = next(iter(ranked(results)), None)
    rows = model_rows(results, chosen, partial(_losses, results), partial(_beside_losses, results, best))
    parts = [errors_over(results, "Bits per byte of held-out text, less is better;")]
    if best is not None:
        parts.append(
            f"{DIFFERENCE}: of the average, to {words(best)}, which has the lowest of the merges; more is worse. It is the best by these very "
            "documents, which flatters its lead a little."
        )
    parts.append(
        f"{RECOVERED}: (base − merge) / (base − expert) on the experts' own capabilities, the best expert where several share one, their mean, in "
        "percent; 100 is as good as every expert on its own text."
    )
    what = f"{DIFFERENCE} and {RECOVERED}" if best is not None else RECOVERED
    if results.over == "replicates":
        parts.append(f"Errors of {what}: replicate by replicate.")
    else:
        parts.append(
            f"Errors of {what}: every model reads the same documents, and what they find hard alike cancels (paired document by document within "
            "each capability, linearised ratios of sums)."
        )
    # The merges of this table are of all experts: what one leaves out, all do.
    if left_out := results.unrecoverable(chosen[0]):
        parts.append(
            f"It leaves out {', '.join(left_out)}: no expert is better than the base there, so there is no gain to keep."
        )
    bits = (*results.lossy, AVERAGE, *([DIFFERENCE] if best is not None else []))
    return [study_table("losses", "Loss on held-out text", " ".join(parts), pd.DataFrame(rows), percent=(RECOVERED,), bits=bits)]


def every_loss_table(results: StudyResults) -> list[StudyTable]:
    """The average loss of every merge of all experts, lowest first, where the methods' table leaves some out: the sweeps by their losses."""
    cells = on_all(results) if results.lossy else []
    if len(cells) <= len(methods_of(results)):
        return []
    rows = [
        {"model": words(cell)} | numbers(AVERAGE, results.loss(results.models(cell), *results.lossy)) | numbers(RECOVERED, results.recovered(cell))
        for cell in cells
    ]  # fmt: skip
    frame = pd.DataFrame(rows).sort_values(AVERAGE, kind="stable", ignore_index=True)
    caption = f"{errors_over(results, 'Bits per byte of held-out text, average over the capabilities, less is better;')} {RECOVERED}: as above."
    return [study_table("every_loss", "Loss of every merge", caption, frame, percent=(RECOVERED,), bits=(AVERAGE,))]


def _losses(results: StudyResults, models: Sequence[ModelScores]) -> Row:
    row: Row = {}
    for name in results.lossy:
        row |= numbers(name, results.loss(models, name))
    return row | numbers(AVERAGE, results.loss(models, *results.lossy))


def _beside_losses(results: StudyResults, best: Cell | None, cell: Cell) -> Row:
    row: Row = {}
    if best is not None:
        row |= numbers(DIFFERENCE, results.loss_difference(cell, best, results.lossy) if cell is not best else None)
    return row | numbers(RECOVERED, results.recovered(cell))
