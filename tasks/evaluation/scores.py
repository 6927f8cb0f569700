"""Scores of models on a suite, and the frame that compares merges with their base and experts. No lm-eval in here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ota_core.frozen import Frozen
from tasks.evaluation.tiers import DEVELOPMENT, TIERS, Tier, deciding

if TYPE_CHECKING:  # a flow without a benchmark does not wait for them
    import pandas as pd

ROLES = ("base", "expert", "merge")
AVERAGE = "average"
STDERR = "_stderr"
"""Ends the names of columns that hold the standard errors of another."""
ANSWER_LENGTH = "answer_characters"
"""Among a task's numbers: how long the model's answers are."""
LOSS = "loss/"
"""Begins the names of columns that hold losses."""
_NO_CAPABILITY = frozenset({"model", "role", "capability", "digest", "n", "retention", "negative_transfer", "seconds"})


class CapabilityScore(Frozen):
    """One capability: the weighted mean of its tasks' metrics."""

    score: float | None
    """0..1; None when no task could run (see ``skipped``)."""
    stderr: float | None
    """Standard error of ``score`` where lm-eval gives one for every task."""
    n_samples: int
    """Documents that were really scored, after any limit."""
    tasks: dict[str, dict[str, float]]
    """Task to all its numbers, under names such as exact_match.strict-match and exact_match_stderr.strict-match."""
    skipped: tuple[str, ...] = ()
    """Why tasks of this capability did not run."""


class ModelScores(Frozen):
    """All that is kept of one model's run over a suite."""

    suite: str
    suite_digest: str
    capabilities: dict[str, CapabilityScore]
    samples: dict[str, dict[str, dict[str, float]]]
    """Capability to task to document hash to score. The hash names the same document for every model (paired tests)."""
    limit: int | None
    lm_eval_version: str
    seconds: float
    losses: dict[str, float] = Field({})
    """Capability to bits per byte of held-out text, where the suite measures it; less is better."""
    loss_stderr: dict[str, float] = Field({})
    """Capability to the standard error of its loss, over documents."""
    loss_samples: dict[str, dict[str, tuple[float, int]]] = Field({})
    """Capability to document hash to (log-likelihood, natural logarithm; bytes) of what its loss is of. The hash as in ``samples``."""
    tiers: dict[str, Tier] = Field({})
    """Capability to its tier, of those that are not for development."""
    chat_template: bool | None = None
    """Whether the model was asked through its chat template; None in what was kept before this was."""
    backend: str | None = None
    """What computed the answers, with its version where that is known: lm-eval's name, where it was not ``hf``."""

    @property
    def average(self) -> float | None:
        """Mean over the capabilities for development that were measured (without such: over all); None when none was."""
        values = self.by_capability()
        found = [value for name in deciding(values, self.tiers) if (value := values[name]) is not None]
        return fmean(found) if found else None

    @property
    def measured(self) -> tuple[str, ...]:
        """The capabilities of all tiers that have a score."""
        return tuple(name for name, value in self.by_capability().items() if value is not None)

    def by_tier(self) -> dict[Tier, tuple[str, ...]]:
        """Tier to its capabilities that were measured, for tiers that have any, in the order of ``TIERS``."""
        named = {tier: tuple(n for n in self.measured if self.tiers.get(n, DEVELOPMENT) == tier) for tier in TIERS}
        return {tier: names for tier, names in named.items() if names}

    def tier_averages(self) -> dict[Tier, float]:
        """Tier to the mean over its capabilities that were measured; nothing of a suite that names no tiers."""
        values = self.by_capability()
        named = self.by_tier() if self.tiers else {}
        return {tier: fmean(value for name in names if (value := values[name]) is not None) for tier, names in named.items()}

    @property
    def answer_lengths(self) -> dict[str, tuple[float, float | None]]:
        """Task that generates to how long answers to it are on average, in characters, and the standard error over documents."""
        tasks = {task: numbers for one in self.capabilities.values() for task, numbers in one.tasks.items()}
        return {
            task: (numbers[ANSWER_LENGTH], numbers.get(f"{ANSWER_LENGTH}{STDERR}"))
            for task, numbers in tasks.items()
            if ANSWER_LENGTH in numbers
        }

    @property
    def average_loss(self) -> float | None:
        """Mean over the capabilities for development that have a loss; None when none has. Never mixed with ``average``."""
        return fmean(self.losses[name] for name in deciding(self.losses, self.tiers)) if self.losses else None

    @property
    def documents(self) -> dict[str, int]:
        """Capability to how many documents were scored, where it was measured."""
        return {name: one.n_samples for name, one in self.capabilities.items() if one.score is not None}

    def by_capability(self) -> dict[str, float | None]:
        """Capability to score."""
        return {name: capability.score for name, capability in self.capabilities.items()}

    def objective(self) -> dict[str, float | None]:
        """What a search makes as large as it can, 0..1 by capability for development: of one with a loss the likelihood of a byte (2 to the minus bits
        per byte, a geometric mean), which tells models apart by far fewer documents than a count of right answers; else the score."""
        values = self.by_capability()
        names = deciding(values, self.tiers)
        return {name: 2.0 ** -self.losses[name] if name in self.losses else values[name] for name in names}

    def asked(self) -> dict[str, str]:
        """How the model was asked where that is not the default: in plain text, by ``hf``."""
        return ({"chat_template": "true"} if self.chat_template else {}) | ({"backend": self.backend} if self.backend else {})

    def metrics(self) -> dict[str, float]:
        """What is logged of a model: ``score/<capability>`` and ``loss/<capability>`` where measured, and ``avg`` of either;
        ``tier/<tier>`` where the suite names tiers, ``answer_characters/<task>`` of tasks that generate."""
        values = {f"score/{name}": value for name, value in self.by_capability().items() if value is not None}
        values |= {"score/avg": self.average} if self.average is not None else {}
        values |= {f"loss/{name}": value for name, value in self.losses.items()}
        values |= {"loss/avg": self.average_loss} if self.average_loss is not None else {}
        values |= {f"tier/{tier}": value for tier, value in self.tier_averages().items()}
        return values | {f"{ANSWER_LENGTH}/{mlflow_metric_name(task)}": mean for task, (mean, _) in self.answer_lengths.items()}


Scores = ModelScores | Mapping[str, float | None]
"""A model's scores in full, or capability to score (0..1, None when not measured)."""


def mlflow_metric_name(name: str) -> str:
    """A name in MLflow's alphabet (letters, digits, ``_-. :/``): ``exact_match,strict`` becomes ``exact_match.strict``.

    MLflow also refuses names that would not be a clean relative path, such as ``/a`` or ``a//b``: such parts fall away.
    """
    safe = re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name.replace(",", ".").replace("@", "_at_"))
    return "/".join(part for part in safe.split("/") if part not in {"", ".", ".."}) or "_"


def _values(scores: Scores) -> dict[str, float]:
    """Capability to score, measured ones only."""
    plain = scores.by_capability() if isinstance(scores, ModelScores) else scores
    return {name: value for name, value in plain.items() if value is not None}


def best_experts(experts: Mapping[str, tuple[str, Scores]]) -> dict[str, float]:
    """Capability to the score of its own expert, of several the best; capabilities without a measured expert are absent."""
    best: dict[str, float] = {}
    for capability, scores in experts.values():
        value = _values(scores).get(capability)
        if value is not None:
            best[capability] = max(value, best.get(capability, value))
    return best


def retention(merged: Scores, experts: Mapping[str, tuple[str, Scores]]) -> dict[str, float]:
    """Capability to merged / expert on the expert's own capability (docs/methods.md section 7).

    Capabilities where it is not defined are absent: the expert scores 0, or either side was not measured.
    """
    values = _values(merged)
    return {name: values[name] / own for name, own in best_experts(experts).items() if own > 0 and name in values}


def negative_transfer(merged: Scores, base: Scores) -> list[str]:
    """The capabilities on which the merge falls below the base, in the base's order; only where both were measured."""
    values = _values(merged)
    return [name for name, value in _values(base).items() if name in values and values[name] < value]


def mean_error(errors: Sequence[float | None]) -> float | None:
    """The standard error of a mean over capabilities, whose documents are independent; None where that of one is not known."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if known and len(known) == len(errors) else None


def scores_table(base: Scores | None, experts: Mapping[str, tuple[str, Scores]], merges: Mapping[str, Scores]) -> pd.DataFrame:
    """One row a model: base, experts, merges (index ``model``). Scores and ratios as fractions, losses in bits per byte, NaN where not measured.

    Columns: ``role``, ``capability`` (an expert's own), the capabilities, ``average``, ``retention`` (mean of ``retention()``, merges only),
    ``negative_transfer`` (count, merges only) and ``below_base`` (the capabilities counted, comma-separated); where models have losses,
    ``loss/<capability>`` and ``loss/average``. Standard errors stand in the columns of these names with ``_stderr``, where there are any.
    Averages are over the capabilities for development (without such: over all) that every row has, so that rows compare. Without a base there is no such row, and nothing is above or
    below it. Raises ValueError when two models share a name.
    """
    import pandas as pd

    models: list[tuple[str, str, str | None, Scores]] = [("base", "base", None, base)] if base is not None else []
    models += [(name, "expert", own, scores) for name, (own, scores) in experts.items()]
    models += [(name, "merge", None, scores) for name, scores in merges.items()]
    names = [name for name, *_ in models]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"models of one table need different names ('base' is the base's), got twice: {', '.join(twice)}")

    every = [scores for *_, scores in models]
    tiers = {name: tier for one in every if isinstance(one, ModelScores) for name, tier in one.tiers.items()}
    measured, lost = _columns([_score(one) for one in every], tiers), _columns([_loss(one) for one in every], tiers, LOSS)
    rows = []
    for i, (_, role, own, scores) in enumerate(models):
        kept = list(retention(scores, experts).values()) if role == "merge" else []
        below = negative_transfer(scores, base) if role == "merge" and base is not None else None
        beside: dict[str, str | float | None] = {
            "retention": fmean(kept) if kept else None,
            "negative_transfer": None if below is None else len(below),
        }
        rows.append({"role": role, "capability": own} | measured[i] | beside | {"below_base": ", ".join(below or [])} | lost[i])
    table = pd.DataFrame(rows, index=pd.Index(names, name="model"))
    table = table.astype({name: float for name in [*measured[0], "retention", *lost[0]]} | {"negative_transfer": "Int64"})
    return table.drop(columns=[name for name in table if name.endswith(STDERR) and table[name].isna().all()])


_Measured = Mapping[str, tuple[float | None, float | None]]
"""Capability to value and standard error."""


def _columns(models: Sequence[_Measured], tiers: Mapping[str, Tier], prefix: str = "") -> list[dict[str, Any]]:
    """A model each: values and errors by column, and their average over the deciding capabilities that every model has. Nothing where nobody
    has any."""
    listed = list(dict.fromkeys(name for one in models for name in one))
    shared = [name for name in deciding(listed, tiers) if all(one.get(name, (None, None))[0] is not None for one in models)]
    rows = []
    for one in models:
        values, errors = (
            {name: one.get(name, (None, None))[0] for name in listed},
            {name: one.get(name, (None, None))[1] for name in listed},
        )
        if listed:
            values[AVERAGE] = fmean(value for name in shared if (value := values[name]) is not None) if shared else None
            errors[AVERAGE] = mean_error([errors[name] for name in shared])
        rows.append({f"{prefix}{name}{end}": found[name] for name in values for end, found in (("", values), (STDERR, errors))})
    return rows


def _score(scores: Scores) -> _Measured:
    if isinstance(scores, ModelScores):
        return {name: (one.score, one.stderr) for name, one in scores.capabilities.items()}
    return {name: (value, None) for name, value in scores.items()}


def _loss(scores: Scores) -> _Measured:
    if not isinstance(scores, ModelScores):
        return {}
    return {name: (value, scores.loss_stderr.get(name)) for name, value in scores.losses.items()}


def rows_of(table: pd.DataFrame) -> list[dict[str, str | float | None]]:
    """The table without losses as rows that survive JSON, for MLflow, the report and its pictures: None where there is no number."""
    kept = [name for name in table if not name.startswith(LOSS) and name not in {"negative_transfer", "below_base"}]
    return _records(table[kept])


def loss_rows(table: pd.DataFrame) -> list[dict[str, str | float | None]]:
    """The losses alone, likewise; no rows where no model has one."""
    losses = [name for name in table if name.startswith(LOSS)]
    return _records(table[["role", *losses]]) if losses else []


def _records(table: pd.DataFrame) -> list[dict[str, str | float | None]]:
    """Without the errors that a row does not have."""
    rows: list[dict[str, str | float | None]] = table.astype(object).where(table.notna(), None).reset_index().to_dict("records")
    return [{name: value for name, value in row.items() if value is not None or not name.endswith(STDERR)} for row in rows]


def capability_columns(table: pd.DataFrame) -> list[str]:
    """The columns of a table of scores that hold them, ``average`` last: numbers that are neither errors, losses nor known for something else.

    A column without any value counts: it is a capability that was measured on no model.
    """
    numeric = set(table.select_dtypes(include="number").columns) | set(table.columns[table.isna().all()])
    names = [
        n for n in map(str, table.columns) if n in numeric - _NO_CAPABILITY and not n.endswith(STDERR) and not n.startswith(LOSS)
    ]
    return [n for n in names if n != AVERAGE] + [n for n in names if n == AVERAGE]
