"""Scores of models on a suite, and the table that compares merges with their base and experts. No lm-eval in here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:  # a flow without a benchmark does not wait for them
    import pandas as pd
    from rich.table import Table

NOT_MEASURED = "–"


class CapabilityScore(BaseModel):
    """One capability: the weighted mean of its tasks' metrics."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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


class ModelScores(BaseModel):
    """All that is kept of one model's run over a suite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    suite: str
    suite_digest: str
    capabilities: dict[str, CapabilityScore]
    samples: dict[str, dict[str, dict[str, float]]]
    """Capability to task to document hash to score. The hash names the same document for every model (paired tests)."""
    limit: int | None
    lm_eval_version: str
    seconds: float
    losses: dict[str, float] = {}
    """Capability to bits per byte of held-out text, where the suite measures it; less is better."""
    loss_stderr: dict[str, float] = {}
    """Capability to the standard error of its loss, over documents."""
    loss_samples: dict[str, dict[str, tuple[float, int]]] = {}
    """Capability to document hash to (log-likelihood, natural logarithm; bytes) of what its loss is of. The hash as in ``samples``."""

    @property
    def average(self) -> float | None:
        """Mean over the capabilities that were measured; None when none was."""
        values = [value for value in self.by_capability().values() if value is not None]
        return fmean(values) if values else None

    @property
    def measured(self) -> tuple[str, ...]:
        """The capabilities that ``average`` is taken over."""
        return tuple(name for name, value in self.by_capability().items() if value is not None)

    @property
    def average_loss(self) -> float | None:
        """Mean over the capabilities that have a loss; None when none has. Never mixed with ``average``."""
        return fmean(self.losses.values()) if self.losses else None

    @property
    def documents(self) -> dict[str, int]:
        """Capability to how many documents were scored, where it was measured."""
        return {name: one.n_samples for name, one in self.capabilities.items() if one.score is not None}

    def by_capability(self) -> dict[str, float | None]:
        """Capability to score."""
        return {name: capability.score for name, capability in self.capabilities.items()}

    def objective(self) -> dict[str, float | None]:
        """What a search makes as large as it can, 0..1 by capability: of one with a loss the likelihood of a byte (2 to the minus bits
        per byte, a geometric mean), which tells models apart by far fewer documents than a count of right answers; else the score."""
        return {name: 2.0 ** -self.losses[name] if name in self.losses else score for name, score in self.by_capability().items()}

    def metrics(self) -> dict[str, float]:
        """What is logged of a model: ``score/<capability>`` and ``loss/<capability>`` where measured, and ``avg`` of either."""
        values = {f"score/{name}": value for name, value in self.by_capability().items() if value is not None}
        values |= {"score/avg": self.average} if self.average is not None else {}
        values |= {f"loss/{name}": value for name, value in self.losses.items()}
        return values | ({"loss/avg": self.average_loss} if self.average_loss is not None else {})


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


def scores_table(base: Scores, experts: Mapping[str, tuple[str, Scores]], merges: Mapping[str, Scores]) -> pd.DataFrame:
    """One row a model: base, experts, merges (index ``model``). Scores and ratios as fractions, NaN where not measured.

    Columns: ``kind``, the capabilities, ``average``, ``retention`` (mean of ``retention()``, merges only), ``negative_transfer``
    (count, merges only) and ``below_base`` (the capabilities counted, comma-separated). The average is taken over
    the capabilities that every row has, so that rows compare; ``attrs["averaged"]`` names them. Where models have losses, columns
    ``loss/<capability>`` and ``loss/avg``, over the capabilities that every row has a loss of; ``attrs["losses"]`` names them.
    Raises ValueError when two models share a name.
    """
    import pandas as pd

    models: list[tuple[str, str, Scores]] = [("base", "base", base)]
    models += [(name, "expert", scores) for name, (_, scores) in experts.items()]
    models += [(name, "merge", scores) for name, scores in merges.items()]
    names = [name for name, _, _ in models]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"models of one table need different names ('base' is the base's), got twice: {', '.join(twice)}")

    plain = [scores.by_capability() if isinstance(scores, ModelScores) else scores for _, _, scores in models]
    capabilities = list(dict.fromkeys(name for scores in plain for name in scores))
    averaged = [name for name in capabilities if all(scores.get(name) is not None for scores in plain)]
    of_all = [_losses(scores) for _, _, scores in models]
    losses = list(dict.fromkeys(name for found in of_all for name in found))
    averaged_losses = [name for name in losses if all(name in found for found in of_all)]
    rows = []
    for (_, kind, scores), listed in zip(models, plain, strict=True):
        row: dict[str, object] = {"kind": kind, **{name: listed.get(name) for name in capabilities}}
        row["average"] = fmean(_values(scores)[name] for name in averaged) if averaged else None
        kept = list(retention(scores, experts).values()) if kind == "merge" else []
        below = negative_transfer(scores, base) if kind == "merge" else None
        row["retention"] = fmean(kept) if kept else None
        row["negative_transfer"] = None if below is None else len(below)
        row["below_base"] = "" if below is None else ", ".join(below)
        own = _losses(scores)
        row |= {f"loss/{name}": own.get(name) for name in losses}
        row |= {"loss/avg": fmean(own[name] for name in averaged_losses) if averaged_losses else None} if losses else {}
        rows.append(row)
    table = pd.DataFrame(rows, index=pd.Index(names, name="model"))
    numbers = [*capabilities, "average", "retention", *_loss_columns(losses)]
    table[numbers] = table[numbers].astype(float)
    table["negative_transfer"] = table["negative_transfer"].astype("Int64")
    table.attrs |= {"capabilities": capabilities, "averaged": averaged, "losses": losses}
    return table


def _losses(scores: Scores) -> Mapping[str, float]:
    return scores.losses if isinstance(scores, ModelScores) else {}


def _loss_columns(losses: Sequence[str]) -> list[str]:
    return [*(f"loss/{name}" for name in losses), "loss/avg"] if losses else []


def text_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and cells as people read them: percent with one decimal, a dash where nothing was measured.

    Of losses the average alone; ``loss_rows`` has them all.
    """
    import pandas as pd

    numbers = [*table.attrs["capabilities"], "average", "retention"]
    rows = []
    for name, row in table.iterrows():
        cells = [NOT_MEASURED if pd.isna(row[column]) else f"{100 * row[column]:.1f}" for column in numbers]
        count = row["negative_transfer"]
        below = "" if pd.isna(count) else f"{count} ({row['below_base']})" if count else "0"
        # Retention and negative transfer say nothing about base and experts: blank, not a dash.
        cells[-1] = cells[-1] if row["kind"] == "merge" else ""
        mean_loss = [_bits(row["loss/avg"])] if table.attrs.get("losses") else []
        rows.append([str(name), *cells, *mean_loss, below])
    return ["model", *numbers, *(["loss"] if table.attrs.get("losses") else []), "below base"], rows


def loss_rows(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the losses in bits per byte, a row a model; no rows where no model has a loss."""
    losses = table.attrs.get("losses", [])
    rows = [[str(name), *(_bits(row[column]) for column in _loss_columns(losses))] for name, row in table.iterrows()]
    return ["model", *losses, "average"], rows if losses else []


def _bits(value: float) -> str:
    return NOT_MEASURED if value != value else f"{value:.3f}"


def caption(table: pd.DataFrame, *, losses: bool = True) -> str:
    """What the numbers are, and what the average leaves out; ``losses``: of the column of losses, too."""
    capabilities: Sequence[str] = table.attrs["capabilities"]
    averaged: Sequence[str] = table.attrs["averaged"]
    text = "Scores and retention (merge / expert on the expert's own capability) in percent."
    if losses and table.attrs.get("losses"):
        text += " Loss in bits per byte of held-out text, mean over capabilities; less is better."
    if len(averaged) < len(capabilities):
        left_out = ", ".join(name for name in capabilities if name not in averaged)
        text += f" Average over {len(averaged)} of {len(capabilities)} capabilities; not measured for every model: {left_out}."
    return text


def render(table: pd.DataFrame, title: str = "Scores") -> Table:
    """The table for the terminal, narrow enough for 80 columns, with a line between base, experts and merges."""
    from rich import box
    from rich.table import Table

    header, rows = text_rows(table)
    lists = [f"{name}: below the base on {below}" for name, below in table["below_base"].items() if below]
    drawn = Table(title=title, caption="\n".join([*lists, caption(table)]), caption_justify="left", box=box.SIMPLE_HEAD)
    drawn.show_edge, drawn.padding = False, (0, 1, 0, 0)
    short = {"average": "avg", "below base": "below"}
    for i, column in enumerate(short.get(name, name) for name in header):
        # Names such as precise_if may break at the underscore; numbers never break.
        words = column.replace("_", " ")
        drawn.add_column(words, justify="right" if i else "left", no_wrap=i == 0, min_width=max(map(len, words.split())))
    kinds = list(table["kind"])
    for i, cells in enumerate(rows):
        cells = [*cells[:-1], cells[-1].split(" ")[0]]  # the count; the names stand in the caption
        drawn.add_row(*cells, end_section=i + 1 < len(rows) and kinds[i] != kinds[i + 1])
    return drawn


def to_markdown(table: pd.DataFrame) -> str:
    """The table as GitHub-flavoured Markdown, with its caption below."""
    header, rows = text_rows(table)
    lines = [*_markdown_lines(header, rows, last_is_text=True), "", caption(table), ""]
    header, rows = loss_rows(table)
    if rows:
        lines += [*_markdown_lines(header, rows), "", "Bits per byte of held-out text; less is better.", ""]
    return "\n".join(lines)


def _markdown_lines(header: list[str], rows: list[list[str]], *, last_is_text: bool = False) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    if last_is_text:
        rule[-1] = "---"
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in [header, rule, *rows]]


def to_markdown_of_one(name: str, scores: ModelScores) -> str:
    """One model's scores, a row a capability, with standard errors and numbers of documents."""
    lines = [f"# {name}", "", "| capability | score | standard error | documents |", "| --- | ---: | ---: | ---: |"]
    losses = [
        f"- {capability}: {value:.3f} bits per byte of held-out text"
        + (f" (standard error {scores.loss_stderr[capability]:.3f})" if capability in scores.loss_stderr else "")
        for capability, value in scores.losses.items()
    ]
    for capability, found in scores.capabilities.items():
        score, error = ((NOT_MEASURED if value is None else f"{100 * value:.1f}") for value in (found.score, found.stderr))
        lines.append(f"| {capability} | {score} | {error} | {found.n_samples:,} |")
    skipped = [f"- {capability}: {reason}" for capability, found in scores.capabilities.items() for reason in found.skipped]
    average = NOT_MEASURED if scores.average is None else f"{100 * scores.average:.1f}"
    return "\n".join(
        [*lines, f"| **average** | {average} | | |", "", *skipped, *losses, "", f"Suite {scores.suite}, percent.", ""]
    )


def to_csv(table: pd.DataFrame) -> str:
    """All columns, fractions in full precision, empty where not measured."""
    text: str = table.to_csv()
    return text
