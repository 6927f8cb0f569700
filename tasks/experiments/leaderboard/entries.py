"""The merges of an MLflow experiment that were scored, and which of them were scored alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ota_core.errors import OtaError
from tasks.experiments.leaderboard.stats import Interval, score_interval
from tasks.tracking.experiment import Experiment
from tasks.tracking.registered import TAG_DIGEST
from tasks.tracking.run import TAG_CAPABILITIES, TAG_LIMIT, TAG_SUITE, TAG_SUITE_KEY
from tasks.tracking.store import mlflow_names
from tasks.tracking.write import PARENT, TAG_ROLE

if TYPE_CHECKING:
    import pandas as pd

AVERAGE = "avg"
UNKNOWN = "unknown"
"""Of runs that older versions logged: they did not note what they were scored on."""
PARAMS = ("density", "power", "compression", "lambda")


class LeaderboardError(OtaError):
    """Nothing to compare, or it is not clear what."""


@dataclass(frozen=True)
class Model:
    """A model that was benchmarked, with its scores by capability."""

    name: str
    digest: str
    scores: dict[str, float]
    stderrs: dict[str, float]
    documents: dict[str, int]

    def interval(self, capability: str) -> Interval | None:
        """Of a score that the model has; None where nothing tells how wide it is."""
        return score_interval(self.scores[capability], self.stderrs.get(capability), self.documents.get(capability))


@dataclass(frozen=True)
class Entry:
    """A merge that was scored."""

    run_id: str
    started: pd.Timestamp
    name: str
    """How it was merged, without the experts."""
    method: str
    experts: str
    inputs: str
    """Names and digests of base and experts in eight hex digits."""
    base_label: str
    params: dict[str, str]
    merged: Model
    base: Model | None
    retention: dict[str, float]
    own: dict[str, Model]
    """Capability to the best of its own experts, which retention is taken against."""
    suite: str
    suite_key: str
    limit: str


def entries(experiment: Experiment) -> tuple[list[Entry], list[str]]:
    """Every merge with scores, newest first, and notes on those that have none."""
    below: dict[str, list[Any]] = {}
    for row in _rows(experiment.models):
        below.setdefault(row[f"tags.{PARENT}"], []).append(row)
    found, unfinished, unscored = [], 0, 0
    for row in _rows(experiment.merges):
        if row["status"] != "FINISHED":
            unfinished += 1
        elif not _scores(row, _capabilities(row)):
            unscored += 1
        else:
            found.append(_entry(row, below.get(row["run_id"], [])))
    notes = [
        f"{count} run{'s' if count > 1 else ''} left out: {why}."
        for count, why in ((unscored, "no scores"), (unfinished, "logging is not finished"))
        if count
    ]
    return found, notes


def select(found: Sequence[Entry], suite: str | None, experiment: str) -> list[Entry]:
    """The entries that were scored on one suite: the only one, or the one that ``suite`` names, by name or key.

    Raises LeaderboardError where there is nothing, or more than one to choose from.
    """
    if not found:
        raise LeaderboardError(
            f"experiment {experiment!r} holds no merge with scores that fits; run merges with a suite, or widen the filter"
        )
    groups: dict[str, list[Entry]] = {}
    for one in found:
        groups.setdefault(one.suite_key, []).append(one)
    fitting = {
        key: group for key, group in groups.items() if suite is None or group[0].suite == suite or key.startswith(suite)
    }  # fmt: skip
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    lines = [
        f"  {key}  suite {group[0].suite}, limit {group[0].limit}: {len(group)} merge{'s' if len(group) > 1 else ''}, "
        f"newest {max(one.started for one in group):%Y-%m-%d %H:%M}"
        for key, group in sorted(groups.items(), key=lambda item: max(one.started for one in item[1]), reverse=True)
    ]
    what = f"{suite!r} names {len(fitting)} of them" if suite is not None else "their scores do not compare"
    raise LeaderboardError(
        f"the merges of {experiment!r} were scored on {len(groups)} different suites or data ({what}); choose one with --suite, "
        "by its name or key:\n" + "\n".join(lines)
    )


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries without their gaps."""
    import pandas as pd

    return [{key: value for key, value in row.items() if not pd.isna(value)} for row in table.to_dict("records")]


def _capabilities(row: Mapping[str, Any]) -> list[str]:
    """What the run was last scored on, in the suite's order; older runs do not say: all that they have scores of."""
    listed = row.get(f"tags.{TAG_CAPABILITIES}")
    if listed:
        return [str(name) for name in json.loads(listed)]
    prefix = "metrics.score/"
    return sorted(key.removeprefix(prefix) for key in row if key.startswith(prefix) and key != f"{prefix}{AVERAGE}")


def _scores(row: Mapping[str, Any], capabilities: Sequence[str], metric: str = "score") -> dict[str, float]:
    """A metric of each capability, where the run has it."""
    keys = mlflow_names(f"{metric}/{name}" for name in capabilities)
    return {
        name: float(row[f"metrics.{keys[f'{metric}/{name}']}"])
        for name in capabilities
        if f"metrics.{keys[f'{metric}/{name}']}" in row
    }


def _model(row: Mapping[str, Any], capabilities: Sequence[str]) -> Model:
    return Model(
        name=row.get("tags.mlflow.runName", row["run_id"]),
        digest=row.get(f"tags.{TAG_DIGEST}", ""),
        scores=_scores(row, capabilities),
        stderrs=_scores(row, capabilities, "score_stderr"),
        documents={name: int(value) for name, value in _scores(row, capabilities, "documents").items()},
    )


def _entry(row: Mapping[str, Any], children: Sequence[Mapping[str, Any]]) -> Entry:
    capabilities = _capabilities(row)
    by_role: dict[str, list[Model]] = {}
    for child in children:
        by_role.setdefault(child[f"tags.{TAG_ROLE}"], []).append(_model(child, capabilities))
    base = next(iter(by_role.get("base", [])), None)
    experts = sorted(by_role.get("expert", []), key=lambda one: one.name)
    digests = [base.digest if base else "", *(f"{one.name}={one.digest}" for one in experts)]
    merged = _model(row, capabilities)
    suite, key = row.get(f"tags.{TAG_SUITE}", UNKNOWN), row.get(f"tags.{TAG_SUITE_KEY}")
    return Entry(
        run_id=row["run_id"],
        started=row["start_time"],
        name=_name(row, by_role.get("merge", [])),
        method=row.get("params.merge_method", UNKNOWN),
        experts=row.get("params.experts", "").replace(",", "+"),
        inputs=_digest(digests),
        base_label=row.get("params.base_model", "none").rstrip("/").rsplit("/", 1)[-1],
        params={name: row[f"params.{name}"] for name in PARAMS if f"params.{name}" in row},
        merged=merged,
        base=base,
        retention=_scores(row, capabilities, "retention"),
        own=_own(children, capabilities),
        suite=suite,
        suite_key=key or _unknown_suite(base, capabilities),
        limit=row.get(f"tags.{TAG_LIMIT}", UNKNOWN),
    )


def _own(children: Sequence[Mapping[str, Any]], capabilities: Sequence[str]) -> dict[str, Model]:
    best: dict[str, Model] = {}
    for child in children:
        name = child.get("params.capability")
        if child[f"tags.{TAG_ROLE}"] != "expert" or name not in capabilities:
            continue
        model = _model(child, capabilities)
        if name in model.scores and (name not in best or model.scores[name] > best[name].scores[name]):
            best[name] = model
    return best


def _name(row: Mapping[str, Any], merges: Sequence[Model]) -> str:
    """How it was merged: the name of the child run that is the merge itself, else the run's with the experts in it."""
    return merges[0].name if len(merges) == 1 else str(row.get("tags.mlflow.runName", row["run_id"]))


def _unknown_suite(base: Model | None, capabilities: Sequence[str]) -> str:
    """A key for a run that does not say what it was scored on: the same base had the same scores there.

    A base that scores alike on every capability, to the last document, has met the same documents, as far as such runs tell.
    """
    seen = [base.digest, *(f"{name}={value!r}" for name, value in base.scores.items())] if base else []
    return f"{UNKNOWN}-{_digest([*capabilities, *seen])}"


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
