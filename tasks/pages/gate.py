"""The gate's decision as people read it."""

from __future__ import annotations

from tasks.evaluation.gate import GateDecision
from tasks.pages import markdown
from tasks.pages.tables import COUNT, P_VALUE, PERCENT, Column, Table, Unit

_POINTS = Unit("percentage points", ".2f", 100, signed=True)


def headline(decision: GateDecision) -> str:
    """What became of the candidate."""
    return "Promoted to champion" if decision.promoted else "Kept as challenger"


def checks(decision: GateDecision) -> Table:
    """Every capability against champion and base."""
    import pandas as pd

    frame = pd.DataFrame([one.model_dump() for one in decision.checks])
    columns = [
        Column("capability"), Column("reference", "against"), Column("n", "documents", COUNT), Column("candidate_score", "candidate", PERCENT),
        Column("reference_score", "reference", PERCENT), Column("difference", unit=_POINTS, error="standard_error"),
        Column("p_value", "p", P_VALUE), Column("falls_below"),
    ]  # fmt: skip
    frame["falls_below"] = frame["falls_below"].map({True: "yes", False: "no"})
    said = f"Suite {decision.suite}. Scores in percent; differences in points, ± standard error over paired documents. {decision.test}."
    return Table("The gate's decision", frame, columns, [said], strong=[one.falls_below for one in decision.checks])


def to_markdown(decision: GateDecision, *, run_url: str | None = None) -> str:
    """Headline, reasons and the table of the checks, with the way to the candidate's run."""
    lines = [f"# {markdown.cell(decision.candidate)}: {headline(decision).lower()}", ""]
    lines += [*(f"- {markdown.cell(reason)}" for reason in decision.reasons), "", markdown.captioned(checks(decision))]
    return "\n".join([*lines, *([f"[MLflow run]({run_url})", ""] if run_url else [])])
