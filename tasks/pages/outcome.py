"""What a merge led to, and several of them side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ota_core.artifact import ArtifactRef
from ota_core.errors import OtaError, raise_all
from ota_core.frozen import Frozen
from tasks.evaluation.kept import read_all, read_scores
from tasks.evaluation.scores import ModelScores, scores_table
from tasks.evaluation.smoke import Smoke
from tasks.pages.report_page import MergePage
from tasks.settings import Places
from tasks.tracking.run import LoggedRun

if TYPE_CHECKING:  # a flow without a benchmark does not wait for it
    import pandas as pd


class MergeOutcome(Frozen):
    """What a merge led to."""

    name: str
    """How it was merged, for the row of a table."""
    merged: ArtifactRef
    path: str
    """The merged model's folder: on this machine, or in S3 where it was made there and nothing here needs it."""
    digest: str
    scores: dict[str, ArtifactRef]
    """``base``, the experts' names and ``merged`` to their scores; empty without a benchmark."""
    capabilities: dict[str, str]
    """Expert's name to its own capability, where known."""
    densities: dict[str, float]
    logged: LoggedRun
    page: MergePage | None
    """What its report is made of; None without one."""
    smoke: Smoke | None = None
    """How it stood in the smoke test; None without a benchmark."""


def comparison_table(
    outcomes: Mapping[str, MergeOutcome], where: Places, more: Mapping[str, ModelScores] | None = None
) -> pd.DataFrame:
    """Base, experts and merges side by side. All outcomes are of the same base and experts; ``more``: scores of other merges.

    Raises OtaError for one that was not benchmarked.
    """
    raise_all(
        [
            f"{name} was not benchmarked. {one.smoke.said if one.smoke else ''}"
            for name, one in outcomes.items()
            if not one.scores
        ],
        OtaError,
    )
    first = next(iter(outcomes.values()))
    found = read_all(where, first.scores)
    names = {key: key.removeprefix("expert/") for key in found if key.startswith("expert/")}
    experts = {name: (first.capabilities.get(name, f"expert/{name}"), found[key]) for key, name in names.items()}
    merges = {name: read_scores(where, outcome.scores["merged"]) for name, outcome in outcomes.items()}
    return scores_table(found.get("base"), experts, {**merges, **(more or {})})
