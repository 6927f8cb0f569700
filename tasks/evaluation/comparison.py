"""Base, experts and merges of one set side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from tasks.evaluation.scores import ModelScores, scores_table
from tasks.evaluation.subject import Subject

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
