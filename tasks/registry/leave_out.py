"""Whether a merge is better without one of its experts: two merges on the same documents, judged as the gate judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ota_core.errors import raise_all
from tasks.evaluation.gate import GateSettings, choosing_documents
from tasks.evaluation.pairs import GateError, paired, sign_flips
from tasks.evaluation.scores import ModelScores
from tasks.evaluation.suites import Suite
from tasks.evaluation.tiers import deciding

if TYPE_CHECKING:
    from tasks.pages.tables import Table


@dataclass(frozen=True)
class Trial:
    """A merge with and without one expert. Averages over the suite's capabilities, 0..1."""

    expert: str
    with_it: float
    without_it: float
    standard_error: float
    """Of the difference, over documents as pairs."""
    p_value: float
    """One-sided: how likely a fall by the expert at least this large is by chance, if it changes nothing."""
    leave_out: bool


def try_without(whole: ModelScores, without: Mapping[str, ModelScores], suite: Suite, settings: GateSettings) -> list[Trial]:
    """The merge against those without one expert, by its name. An expert is left out whose inclusion lowers the average beyond the noise, at the
    gate's confidence, shared out among the experts that are tried (Bonferroni). Documents that confirm the night's candidate have no part in it. Raises GateError for scores that do not compare."""
    trials = []
    for expert, scores in without.items():
        if whole.measured != scores.measured or whole.average is None or scores.average is None:
            raise_all(
                [f"the merge without {expert} was measured on other capabilities; benchmark both on the same suite"], GateError
            )
            continue
        averaged = deciding(whole.measured, whole.tiers)
        found = paired(suite, averaged, f"merge without {expert}", whole, scores, choosing_documents(whole, suite, settings))
        p_value = sign_flips(found.parts, resamples=settings.resamples, seed=settings.seed)
        with_it, without_it = found.means
        lower = with_it < without_it and p_value <= (1 - settings.confidence) / len(without)
        trials.append(Trial(expert, with_it, without_it, found.error, p_value, lower))
    return trials


def trials_table(trials: list[Trial]) -> Table:
    """What was tried."""
    import pandas as pd

    from tasks.pages.tables import P_VALUE, PERCENT, POINTS, Column, Table

    rows = [
        {"expert": one.expert, "with": one.with_it, "without": one.without_it, "difference": one.without_it - one.with_it,
         "error": one.standard_error, "p": one.p_value, "left out": "yes" if one.leave_out else "no"}
        for one in trials
    ]  # fmt: skip
    columns = [
        Column("expert", "without"), Column("with", "average with it %", PERCENT), Column("without", "average without it %", PERCENT),
        Column("difference", unit=POINTS, error="error"), Column("p", unit=P_VALUE), Column("left out"),
    ]  # fmt: skip
    said = "Differences in points ± standard error over paired documents; paired sign-flip test, one-sided, corrected for the number of experts tried."
    return Table("Merged without", pd.DataFrame(rows), columns, [said], strong=[one.leave_out for one in trials])
