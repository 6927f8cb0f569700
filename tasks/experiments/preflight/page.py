"""What a preflight says, as tables and sentences: on a terminal, as JSON, on a night's page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from tasks.experiments.preflight.outlook import Outlook
from tasks.experiments.preflight.predict import CONFIDENCE
from tasks.pages import markdown
from tasks.pages.tables import PERCENT, POINTS, RATIO, Column, Table

_PAIRS = {
    "row_space": ("row spaces", PERCENT), "interference": ("interference", RATIO), "sign_conflict": ("sign conflict", PERCENT),
    "cosine": ("edits: cosine", RATIO), "cosine_sqrt_v": ("curvature: cosine", RATIO), "mask_jaccard": ("masks: overlap", PERCENT),
}  # fmt: skip

MOST_PAIRS = 20
"""Rows that a table of pairs has: twenty experts are 190 pairs."""


def experts_table(found: Outlook, came_out: Mapping[str, float] | None = None) -> Table:
    """What is measured and predicted of each expert. came_out: expert → the retention that the merge then had, where it is there."""
    import pandas as pd

    rows = []
    for one in found.experts:
        row: dict[str, Any] = {
            "expert": one.name,
            **one.measured,
            "acts": one.acts,
            "others": one.others,
            "without": one.others_without,
        }
        if one.retention:
            row |= {"retention": one.retention.value, "low": one.retention.low, "high": one.retention.high}
        if came_out and one.name in came_out:
            row["came out"] = came_out[one.name]
        if one.change:
            row |= {"change": one.change[0], "error": one.change[1]}
        rows.append(row)
    columns = [Column("expert")]
    if found.learned:
        columns.append(Column("retention", "retention, predicted %", PERCENT, ends=("low", "high")))
    if came_out:
        columns.append(Column("came out", "retention, came out %", PERCENT))
    columns += [
        Column("reach", "reach %", PERCENT),
        Column("disturbance", "disturbance %", PERCENT),
        Column("row_space", "shared row space %", PERCENT),
        Column("acts", "acts on others", RATIO),
    ]
    if any(one.others_without is not None for one in found.experts):
        columns += [Column("others", "fit of others %", PERCENT), Column("without", "fit of others without it %", PERCENT)]
    if any(one.change for one in found.experts):
        columns.append(Column("change", "average without it, predicted", POINTS, error="error"))
    caption = [
        "Reach: how far the merged edit goes the way of an expert's own edit, on the inputs that it was trained on (100: as far), before any row-space "
        "regression; disturbance: what it does to them beside that. Fit: both in one, 1 − (1 − reach)² − disturbance², of the others. Shared row "
        "space: how much these inputs are those of the others. Acts on others: how strongly its edit acts on theirs, where their own act with 1."
    ]
    if found.learned:
        of = "of the average score" if found.in_scores else "of mean retention, no scores of these experts being known"
        caption.append(f"In parentheses {100 * CONFIDENCE:.0f} % intervals. Without it: change {of}, in points ± standard error.")
    return Table("Experts", pd.DataFrame(rows), columns, caption, strong=[one.surely for one in found.experts])


def pairs_table(found: Outlook) -> Table | None:
    """The pairs of experts; of many those that act on each other most. None where there is none."""
    import pandas as pd

    if not found.pairs:
        return None
    frame, caption = pd.DataFrame(found.pairs), list[str]()
    columns = [Column(name, title, unit) for name, (title, unit) in _PAIRS.items() if name in frame]
    if len(frame) > MOST_PAIRS:
        by = next((column for column in columns if column.name == "interference"), columns[0])
        caption = [f"The {MOST_PAIRS} of {len(frame)} pairs with the most {by.heading}; ota preflight --json has all."]
        frame = frame.sort_values(by.name, ascending=False, kind="stable").head(MOST_PAIRS)
    return Table("Pairs of experts", frame, [Column("expert"), Column("other", "and"), *columns], caption)


def sentences(found: Outlook) -> Iterator[str]:
    """The prediction, and who hurts."""
    if found.scale is not None:
        yield f"λ as the row spaces say: {found.scale:.3g}."
    if found.why_not:
        yield f"{found.why_not[0].upper()}{found.why_not[1:]}."
    if found.average and found.learned:
        count, here, error = found.learned
        low, high = (f"{100 * end:.0f}" if abs(end) < 10 else "unknown" for end in (found.average.low, found.average.high))
        yield (
            f"Mean retention, predicted: {100 * found.average.value:.0f} % ({low} to {high}). Learned from {count} values, {here} of them of this "
            f"installation; of experts that it has not seen it is typically off by {100 * error:.0f} points."
        )
    for one in found.hurting:
        yield f"{one.name} {'hurts' if one.surely else 'may hurt'}: {one.hurts}."
    if not found.hurting:
        yield "No expert is expected to hurt."


def to_markdown(found: Outlook, name: str, came_out: Mapping[str, float] | None = None) -> str:
    """A section of a night's page; ``came_out`` as for ``experts_table``."""
    tables = [table for table in (experts_table(found, came_out), pairs_table(found)) if table is not None]
    lines = [f"## Will it merge? {markdown.cell(name)}", "", *(f"- {markdown.cell(one)}" for one in sentences(found)), ""]
    return "\n".join([*lines, markdown.captioned(*tables)])


def to_json(found: Outlook) -> dict[str, Any]:
    """Everything, for programs; ``null`` where an interval has no end."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and value in {float("inf"), float("-inf")} else value

    return {"said": [*sentences(found)], **{key: plain(value) for key, value in asdict(found).items()}}
