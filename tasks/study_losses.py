"""The table of held-out losses of a study, where its suite measures them."""

from collections.abc import Sequence
from functools import partial

import pandas as pd

from tasks.scores import ModelScores
from tasks.study_rows import Row, StudyTable, errors_over, methods_of, model_rows, numbers
from tasks.study_scores import AVERAGE, StudyResults

RECOVERED = "recovered"


def losses_table(results: StudyResults) -> list[StudyTable]:
    """Bits per byte of held-out text by capability: base, experts, and the merges of the methods' table."""
    chosen = methods_of(results)
    if not chosen or not results.lossy:
        return []
    rows = model_rows(results, chosen, partial(_losses, results), lambda cell: numbers(RECOVERED, results.recovered(cell)))
    caption = (
        f"{errors_over(results, 'Bits per byte of held-out text, less is better;')} Every model reads the same documents, so that differences are "
        f"more certain than the errors of the numbers. {RECOVERED}: (base − merge) / (base − expert) on the experts' own capabilities, the best expert "
        "where several share one, their mean, in percent; 100 is as good as every expert on its own text."
    )
    # The merges of this table are of all experts: what one leaves out, all do.
    if left_out := results.unrecoverable(chosen[0]):
        caption += f" It leaves out {', '.join(left_out)}: no expert is better than the base there, so there is no gain to keep."
    bits = (*results.lossy, AVERAGE)
    return [StudyTable("losses", "Loss on held-out text", caption, pd.DataFrame(rows), percent=(RECOVERED,), bits=bits)]


def _losses(results: StudyResults, models: Sequence[ModelScores]) -> Row:
    row: Row = {}
    for name in results.lossy:
        row |= numbers(name, results.loss(models, name))
    return row | numbers(AVERAGE, results.average_loss(models))
