"""The merges of an MLflow experiment as one leaderboard: methods × capabilities, with intervals, retention and negative transfer.

Only merges that were scored on the same tasks, settings and documents compare. A merge is a row; rows of equal names stay apart by
their experts. Scores and ratios are fractions; what was not measured or not logged is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tasks.evaluation.pairs import GateError
from tasks.evaluation.scores import negative_transfer
from tasks.experiments.leaderboard.entries import AVERAGE, PARAMS, Entry, LeaderboardError, Model, entries, select
from tasks.experiments.leaderboard.stats import Interval, holm, mean_interval, paired_difference, ratio_interval
from tasks.tracking.experiment import Experiment
from tasks.tracking.run import Benchmarked

if TYPE_CHECKING:
    import pandas as pd

BEST = "best"
_SHORT = 30
"""Characters of the experts' names in a label; beyond, their number stands for them."""

ReadDocuments = Callable[[str], Benchmarked | None]
"""The documents' scores of a run, None where it holds none."""


@dataclass(frozen=True)
class Leaderboard:
    """Merges that were scored alike, the best first, then the bases that they started from."""

    experiment: str
    experiment_id: str
    suite: str
    suite_key: str
    limit: str
    capabilities: list[str]
    averaged: list[str]
    """The capabilities that every merge was measured on, which ``score/avg`` is taken over."""
    table: pd.DataFrame
    """Columns: ``rank`` (merges only), ``kind`` (merge or base), ``label`` (unique), ``name``, ``method``, ``experts``, ``inputs``, ``base``,
    ``density``, ``power``, ``compression``, ``lambda``; ``score/<capability>`` and ``score/avg``, each with ``score_low/…``,
    ``score_high/…`` (95 %) and, for capabilities, ``score_stderr/…`` and ``retention/…``; ``retention`` (mean); ``retention_low…`` and ``retention_high…`` (95 %) of
    either, ``/<capability>`` or ``/avg``; ``negative_transfer`` (count), ``below_base`` (which); ``difference`` to the baseline with ``difference_low``, ``difference_high``, ``p_value``,
    ``p_holm`` and ``documents``; ``run_id``, ``started``."""
    baseline: str
    """The label of the row that differences are taken to."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    @property
    def merges(self) -> pd.DataFrame:
        return self.table[self.table["kind"] == "merge"]

    @property
    def best(self) -> pd.Series:
        """The row of the highest average."""
        return self.merges.iloc[0]


def leaderboard(
    experiment: Experiment, *, suite: str | None = None, baseline: str | None = None, read_documents: ReadDocuments | None = None
) -> Leaderboard:
    """Rank the merges of an experiment.

    ``baseline``: the merge that the others are compared with, by name, label or run id; the best by default. ``read_documents`` gives
    what paired comparisons need; without it there are none. Raises LeaderboardError.
    """
    import pandas as pd

    found, notes = entries(experiment)
    group = select(found, suite, experiment.name)
    others = len(found) - len(group)
    if others:
        notes.append(f"{others} run{'s' if others > 1 else ''} left out: scored on another suite or other data.")
    capabilities = list(dict.fromkeys(name for one in group for name in one.merged.scores))
    averaged = [name for name in capabilities if all(name in one.merged.scores for one in group)]
    if not averaged:
        raise LeaderboardError(f"no capability was measured for all {len(group)} merges; narrow them with --filter or --last")
    if len(averaged) < len(capabilities):
        missing = ", ".join(name for name in capabilities if name not in averaged)
        notes.append(f"The average is over {', '.join(averaged)}; not measured for every merge: {missing}.")
    group = sorted(group, key=lambda one: (-fmean(one.merged.scores[name] for name in averaged), one.started, one.run_id))
    labels = unique_labels(group)
    rows = [
        _merge_row(one, label, i + 1, capabilities, averaged) for i, (one, label) in enumerate(zip(group, labels, strict=True))
    ]
    chosen = find_baseline(group, labels, baseline)
    differences, why_not = _differences(group, chosen, averaged, read_documents)
    rows = [row | difference for row, difference in zip(rows, differences, strict=True)]
    notes += why_not
    rows += _base_rows(group, capabilities, averaged)
    if not all(f"score_low/{AVERAGE}" in row for row in rows if row["kind"] == "merge"):
        notes.append(
            "No interval where standard errors were not logged, as older versions did; log the merge again (ota run) to have them."
        )
    columns = _columns(capabilities)
    table = pd.DataFrame(rows).reindex(columns=columns)
    for name in columns:
        if name.startswith(("score", "retention", "difference", "p_")):
            table[name] = table[name].astype(float)
        elif name in {"rank", "negative_transfer", "documents"}:
            table[name] = table[name].astype("Int64")
    table[["density", "power", "lambda"]] = table[["density", "power", "lambda"]].apply(pd.to_numeric, errors="coerce")
    return Leaderboard(
        experiment=experiment.name, experiment_id=experiment.id, suite=group[0].suite, suite_key=group[0].suite_key,
        limit=group[0].limit, capabilities=capabilities, averaged=averaged, table=table, baseline=labels[chosen], notes=notes,
    )  # fmt: skip


def unique_labels(group: Sequence[Entry]) -> list[str]:
    """Names, with as much of experts, base and run as tells them apart."""
    labels = [one.name for one in group]
    if len({one.experts for one in group}) > 1:
        labels = [f"{label} · {_short(one.experts)}" for label, one in zip(labels, group, strict=True)]
    if len({one.base_label for one in group}) > 1 and len(set(labels)) < len(labels):
        labels = [f"{label} · {one.base_label}" for label, one in zip(labels, group, strict=True)]
    for more in (
        [f"#{one.inputs[:4]}" for one in group],
        [f"({one.run_id[:6]})" for one in group],
        [one.run_id for one in group],
    ):
        labels = [f"{label} {extra}" if labels.count(label) > 1 else label for label, extra in zip(labels, more, strict=True)]
    return labels


def find_baseline(group: Sequence[Entry], labels: Sequence[str], wanted: str | None) -> int:
    """The position of the baseline: the first, which is the best, or by label, name, or the beginning of a run id.

    Raises LeaderboardError for none or several.
    """
    if wanted is None or wanted == BEST:
        return 0
    fitting = [i for i, (one, label) in enumerate(zip(group, labels, strict=True)) if wanted in {label, one.run_id}]
    fitting = fitting or [i for i, one in enumerate(group) if one.name == wanted]
    fitting = fitting or [i for i, one in enumerate(group) if len(wanted) >= 6 and one.run_id.startswith(wanted)]
    if len(fitting) == 1:
        return fitting[0]
    listed = "\n".join(f"  {group[i].run_id}  {labels[i]}" for i in fitting or range(len(group)))
    which = f"fits {len(fitting)} merges; give the run" if fitting else "is none of the merges compared; give a name or a run"
    raise LeaderboardError(f"baseline {wanted!r} {which}:\n{listed}")


def _short(experts: str) -> str:
    return experts if len(experts) <= _SHORT else f"{experts.count('+') + 1} experts"


def _score_cells(model: Model, capabilities: Sequence[str], averaged: Sequence[str]) -> dict[str, float]:
    cells: dict[str, float] = {}
    intervals = {name: model.interval(name) for name in model.scores}
    for name in capabilities:
        if name not in model.scores:
            continue
        cells[f"score/{name}"] = model.scores[name]
        if name in model.stderrs:
            cells[f"score_stderr/{name}"] = model.stderrs[name]
        if (interval := intervals[name]) is not None:
            cells[f"score_low/{name}"], cells[f"score_high/{name}"] = interval
    if all(name in model.scores for name in averaged):
        cells[f"score/{AVERAGE}"] = fmean(model.scores[name] for name in averaged)
        interval = mean_interval([model.scores[name] for name in averaged], [intervals[name] for name in averaged])
        if interval is not None:
            cells[f"score_low/{AVERAGE}"], cells[f"score_high/{AVERAGE}"] = interval
    return cells


def _merge_row(one: Entry, label: str, rank: int, capabilities: Sequence[str], averaged: Sequence[str]) -> dict[str, Any]:
    below = negative_transfer(one.merged.scores, one.base.scores) if one.base else None
    kept = {name: one.retention[name] for name in capabilities if name in one.retention}
    sure = {name: _retention_interval(one, name) for name in kept}
    sure[AVERAGE] = mean_interval(list(kept.values()), list(sure.values()))
    ends = {f"retention_{end}/{name}": found[i] for name, found in sure.items() if found for i, end in enumerate(("low", "high"))}
    return {
        "rank": rank, "kind": "merge", "label": label, "name": one.name, "method": one.method, "experts": one.experts,
        "inputs": one.inputs, "base": one.base_label, **one.params, **_score_cells(one.merged, capabilities, averaged),
        **{f"retention/{name}": value for name, value in kept.items()}, "retention": fmean(kept.values()) if kept else None,
        **ends, "negative_transfer": None if below is None else len(below), "below_base": ", ".join(below or []), "run_id": one.run_id,
        "started": one.started,
    }  # fmt: skip


def _retention_interval(one: Entry, capability: str) -> Interval | None:
    expert, merged = one.own.get(capability), one.merged
    if expert is None or capability not in merged.scores:
        return None
    above, below = merged.scores[capability], expert.scores[capability]
    return ratio_interval(above, merged.interval(capability), below, expert.interval(capability))


def _base_rows(group: Sequence[Entry], capabilities: Sequence[str], averaged: Sequence[str]) -> list[dict[str, Any]]:
    """The bases as rows to compare with, each once."""
    bases = {one.base.digest: (one.base_label, one.base) for one in group if one.base}
    several = len(bases) > 1
    return [
        {
            "kind": "base", "label": f"base · {label} #{digest[-4:]}" if several else "base", "name": "base", "method": "", "experts": "",
            "inputs": "", "base": label, "below_base": "", **_score_cells(model, capabilities, averaged),
        }
        for digest, (label, model) in bases.items()
    ]  # fmt: skip


def _differences(
    group: Sequence[Entry], chosen: int, averaged: Sequence[str], read_documents: ReadDocuments | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Per entry its difference to the baseline, where both runs hold their documents' scores, and notes on the others."""
    cells: list[dict[str, Any]] = [{} for _ in group]
    if read_documents is None or len(group) == 1:
        return cells, []
    reference = read_documents(group[chosen].run_id)
    if reference is None:
        return cells, ["No paired comparison: the baseline was logged without its documents' scores, as older versions did."]
    notes, without = [], 0
    for i, one in enumerate(group):
        if i == chosen:
            continue
        documents = read_documents(one.run_id)
        if documents is None:
            without += 1
            continue
        try:
            found = paired_difference(documents, reference, averaged)
        except GateError as error:
            notes.append(f"{one.name} ({one.run_id[:8]}) is not compared in pairs: {error}.")
            continue
        cells[i] = {"difference": found.value, "difference_low": found.low, "difference_high": found.high,
                    "p_value": found.p_value, "documents": found.documents}  # fmt: skip
    compared = [i for i, one in enumerate(cells) if one]
    for i, adjusted in zip(compared, holm([cells[i]["p_value"] for i in compared]), strict=True):
        cells[i]["p_holm"] = adjusted
    if without:
        notes.append(f"{without} run{'s' if without > 1 else ''} not compared in pairs: logged without documents' scores.")
    return cells, notes


def _columns(capabilities: Sequence[str]) -> list[str]:
    scores = [f"{what}/{name}" for name in (AVERAGE, *capabilities) for what in ("score", "score_low", "score_high")]
    return [
        "rank", "kind", "label", "name", "method", "experts", "inputs", "base", *PARAMS, *scores,
        *(f"score_stderr/{name}" for name in capabilities), "retention", *(f"retention/{name}" for name in capabilities),
        *(f"retention_{end}/{name}" for name in (AVERAGE, *capabilities) for end in ("low", "high")),
        "negative_transfer", "below_base", "difference", "difference_low", "difference_high", "p_value", "p_holm", "documents", "run_id",
        "started",
    ]  # fmt: skip
