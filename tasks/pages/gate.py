"""The gate's decision as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tasks.evaluation.gate import Choice, GateDecision
from tasks.pages import markdown
from tasks.pages.tables import COUNT, P_VALUE, PERCENT, Column, Table, Unit

_POINTS = Unit("percentage points", ".2f", 100, signed=True)
_SIZE = Unit("percentage points", ".2f", 100)


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


def tables(decision: GateDecision) -> Iterator[Table]:
    """Every comparison; tiers with a margin, and how one of several candidates was chosen, where there is such a thing."""
    yield checks(decision)
    if decision.tiers:
        yield _tiers(decision)
    if decision.choice:
        yield _choice(decision.candidate, decision.choice)


def _tiers(decision: GateDecision) -> Table:
    import pandas as pd

    rows = [
        one.model_dump() | {"capabilities": ", ".join(one.capabilities), "holds": "yes" if one.holds else "no"}
        for one in decision.tiers
    ]
    columns = [
        Column("tier"), Column("capabilities"), Column("reference", "against"), Column("n", "documents", COUNT),
        Column("difference", unit=_POINTS), Column("lower_bound", "not below", _POINTS), Column("margin", unit=_SIZE), Column("holds", "shown"),
    ]  # fmt: skip
    said = (
        f"Tiers with a margin. One passes where the difference is shown, at {100 * decision.confidence:g} % one-sided confidence, to be no more than the margin below "
        "zero: the paired interval of Agresti and Min."
    )
    return Table("Tiers with a margin", pd.DataFrame(rows), columns, [said], strong=[not one.holds for one in decision.tiers])


def _choice(candidate: str, choice: Choice) -> Table:
    import pandas as pd

    rows = [{"candidate": name, "average": average} for name, average in choice.averages.items()]
    if choice.how == "held_out":
        said = (
            f"The candidates side by side, by their averages on the {choice.choosing:,} documents that choose: {choice.chosen} was chosen, and tested once on {choice.confirming:,} "
            f"others (digest {choice.documents})."
        )
    else:
        said = f"The candidates side by side, by their averages on all {choice.confirming:,} documents (digest {choice.documents}). {choice.why}".rstrip()
    columns = [Column("candidate"), Column("average", unit=PERCENT)]
    return Table(
        "The candidates side by side", pd.DataFrame(rows), columns, [said], strong=[name == candidate for name in choice.averages]
    )


def to_markdown(decision: GateDecision, *, run_url: str | None = None) -> str:
    """Headline, reasons and the table of the checks, with the way to the candidate's run."""
    lines = [f"# {markdown.cell(decision.candidate)}: {headline(decision).lower()}", ""]
    lines += [*(f"- {markdown.cell(reason)}" for reason in decision.reasons), ""]
    lines += [markdown.captioned(table) for table in tables(decision)]
    return "\n".join([*lines, *([f"[MLflow run]({run_url})", ""] if run_url else [])])


def others(decisions: Mapping[str, GateDecision], urls: Mapping[str, str | None]) -> str:
    """Candidates that became neither champion nor challenger: a line each, with the way to its run, which holds its whole decision."""
    lines = []
    for name, decision in decisions.items():
        shown = f"[{markdown.cell(name)}]({urls[name]})" if urls[name] else markdown.cell(name)
        lines.append(f"- {shown}: average {PERCENT.text(decision.average)} %. {markdown.cell(' '.join(decision.decisive))}")
    return "\n".join(["# The other candidates", "", *lines, ""])
