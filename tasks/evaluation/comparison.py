"""Base, experts and merges of one set side by side."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING

from tasks.evaluation.scores import ModelScores, mean_error, scores_table
from tasks.evaluation.subject import Subject
from tasks.evaluation.tiers import TIERS

if TYPE_CHECKING:  # a flow without a benchmark does not wait for it
    import pandas as pd


def own_capability(subject: Subject, scores: ModelScores) -> str | None:
    """The capability that is an expert's own: the one that the recipe or its manifest states, else the one that it is named after."""
    if subject.role != "expert":
        return None
    return subject.capability or (subject.name if subject.name in scores.capabilities else None)


def experts_of(found: Mapping[str, ModelScores], subjects: Mapping[str, Subject]) -> dict[str, tuple[str, ModelScores]]:
    """Expert's name to its own capability and its scores, as tables and ``retention`` take them; one without has its name there,
    which nobody measures."""
    return {
        s.name: (own_capability(s, found[key]) or s.name, found[key])
        for key, s in subjects.items()
        if s.role == "expert" and key in found
    }


def comparison(found: dict[str, ModelScores], subjects: dict[str, Subject]) -> pd.DataFrame:
    """The table of one merge: base, experts, merge."""
    return scores_table(found.get("base"), experts_of(found, subjects), {subjects["merged"].name: found["merged"]})


def tier_rows(found: Mapping[str, ModelScores], subjects: Mapping[str, Subject]) -> pd.DataFrame:
    """The averages of each tier, a row a model and tier: ``model``, ``role``, ``tier``, ``score`` (0..1, the mean over its capabilities),
    ``score_stderr`` (over documents; NaN where one has none), ``capabilities`` (their number) and ``documents``.

    Only capabilities count that all models were measured on, so that the rows of a tier compare.
    """
    import pandas as pd

    columns = ["model", "role", "tier", "score", "score_stderr", "capabilities", "documents"]
    rows = []
    for tier in TIERS:
        each = [set(scores.by_tier().get(tier, ())) for scores in found.values()]
        names = sorted(set.intersection(*each)) if each else []
        for key, scores in found.items() if names else ():
            parts = [scores.capabilities[name] for name in names]
            average = fmean(one.score for one in parts if one.score is not None)
            error, documents = mean_error([one.stderr for one in parts]), sum(one.n_samples for one in parts)
            rows.append([subjects[key].name, subjects[key].role, tier, average, error, len(names), documents])
    return pd.DataFrame(rows, columns=columns).astype({"score": float, "score_stderr": float})
