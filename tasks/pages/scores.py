"""The tables of scores: base, experts and merges beside each other, and one model by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tasks.evaluation.scores import AVERAGE, LOSS, STDERR, ModelScores, capability_columns
from tasks.evaluation.tiers import DEVELOPMENT, TIERS
from tasks.pages import markdown
from tasks.pages.tables import BITS, COUNT, PERCENT, Column, Table

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, str | float | None]
NONE = "none"


def scores(table: pd.DataFrame, title: str = "Scores") -> Table:
    """A frame of ``scores_table``, or its rows: scores with their standard errors, retention, and where a merge falls below the base."""
    frame = _with_models(table)
    if "below_base" in frame:
        merges = (frame["role"] == "merge") & (frame["role"] == "base").any()
        frame["below_base"] = frame["below_base"].mask(merges & (frame["below_base"] == ""), NONE)
    names = capability_columns(frame)
    columns = [Column("model"), *(_number(name) for name in names)]
    columns += [Column("retention", unit=PERCENT, absent="")] if "retention" in frame else []
    columns += [Column("below_base")] if "below_base" in frame else []
    errors = any(column.error in frame for column in columns if column.error)
    said = caption(frame, errors=errors)
    return Table(title, frame, columns, said, strong=(frame["role"] == "merge").tolist(), group="role")


def losses(table: pd.DataFrame) -> list[Table]:
    """The table of the held-out losses; none where no model has one."""
    frame = _with_models(table)
    names = [name for name in frame if name.startswith(LOSS) and not name.endswith(STDERR)]
    if not names:
        return []
    columns = [
        Column("model"),
        *(Column(name, name.removeprefix(LOSS).replace("_", " "), BITS, f"{name}{STDERR}") for name in names),
    ]
    errors = " ± one standard error." if any(column.error in frame for column in columns[1:]) else ""
    said = f"Loss in bits per byte of held-out text; less is better.{errors}"
    return [Table("Loss on held-out text", frame, columns, [said], strong=(frame["role"] == "merge").tolist(), group="role")]


def narrow(table: pd.DataFrame, title: str = "Scores") -> Table:
    """For 80 columns of a terminal: without standard errors, of losses the average alone, what falls below the base in the caption."""
    whole = scores(table, title)
    columns = [
        *(one._replace(error="", title="avg" if one.name == AVERAGE else "") for one in whole.columns[:-1]),
        *([Column(f"{LOSS}{AVERAGE}", "loss", BITS)] if f"{LOSS}{AVERAGE}" in table else []),
        Column("negative_transfer", "below", COUNT, absent=""),
    ]
    fallen = [f"{name}: below the base on {below}" for name, below in table["below_base"].items() if below]
    said = caption(table)
    said += (
        ["Loss in bits per byte of held-out text, mean over capabilities; less is better."]
        if len(columns) > len(whole.columns)
        else []
    )
    return Table(title, whole.frame, columns, [*fallen, *said], group="role")


def of_one(name: str, found: ModelScores) -> Table:
    """One model's scores and losses, a row a capability, with standard errors and numbers of documents."""
    import pandas as pd

    rows: list[dict[str, object]] = [
        {"capability": capability, "score": one.score, "score_stderr": one.stderr, "documents": one.n_samples,
         "loss": found.losses.get(capability), "loss_stderr": found.loss_stderr.get(capability)}
        for capability, one in found.capabilities.items()
    ]  # fmt: skip
    rows.append({"capability": AVERAGE, "score": found.average, "loss": found.average_loss})
    tiers = found.tier_averages()
    rows += [{"capability": f"tier {tier}", "score": value} for tier, value in tiers.items()]
    columns = [
        Column("capability"),
        Column("score", unit=PERCENT, error="score_stderr"),
        Column("documents", unit=COUNT, absent=""),
    ]
    columns += [Column("loss", unit=BITS, error="loss_stderr")] if found.losses else []
    said = [f"Suite {found.suite}. Scores in percent, ± one standard error."]
    said += ["Loss in bits per byte of held-out text; less is better."] if found.losses else []
    said += ["The average is over the tier development."] if DEVELOPMENT in tiers else []
    said += ["Asked through its chat template."] if found.chat_template else []
    said += [f"Computed by {found.backend}."] if found.backend else []
    lengths = [f"{task} {mean:.0f}{f' ± {error:.0f}' if error else ''}" for task, (mean, error) in found.answer_lengths.items()]
    said += [f"Length of answers in characters: {', '.join(lengths)}."] if lengths else []
    said += [f"{capability}: {reason}." for capability, one in found.capabilities.items() for reason in one.skipped]
    strong = [False] * len(found.capabilities) + [True] + [False] * len(tiers)
    return Table(f"Scores of {name}", pd.DataFrame(rows), columns, said, strong)


def tiers(rows: pd.DataFrame) -> Table:
    """``tier_rows``, a row a model and a column a tier."""
    each = {value: rows.pivot(index="model", columns="tier", values=value) for value in ("score", "score_stderr")}
    names = [tier for tier in TIERS if tier in set(rows["tier"])]
    frame = each["score"][names].join(each["score_stderr"][names].add_suffix(STDERR)).loc[list(dict.fromkeys(rows["model"]))]
    counts = rows.drop_duplicates("tier").set_index("tier")["capabilities"]
    said = [
        f"Percent, mean over the capabilities of each tier ({', '.join(f'{name} {counts[name]}' for name in names)}); {DEVELOPMENT} decides."
    ]
    return Table("Tiers", frame.reset_index(), [Column("model"), *(_number(name) for name in names)], said)


def of_card(rows: Sequence[Row], merged: ModelScores) -> dict[str, Any]:
    """What a model card tells of the scores: ``rows`` of base, experts and merge. Keyword arguments of ``model_card``."""
    import pandas as pd

    counts = ", ".join(f"{name} {count:,}" for name, count in merged.documents.items())
    shown = scores(pd.DataFrame(rows))
    said = [
        f"Percent, measured with lm-eval on the suite {merged.suite}, ± one standard error over documents.",
        f"Documents: {counts}.",
        "Retention: the merge's score by the expert's own, on the capability that each expert was trained for, on average.",
    ]
    quick = (
        f"> **A quick look:** the benchmark stopped at {merged.limit:,} documents of each task; these are not the suite's scores."
        if merged.limit is not None
        else ""
    )
    measured = {name: value for name, value in merged.by_capability().items() if value is not None}
    return {
        "scores": "\n\n".join(filter(None, [markdown.table(shown), quick, " ".join(said)])),
        "measured": {} if quick else measured,
        "suite": merged.suite,
    }


def caption(table: pd.DataFrame, *, errors: bool = False) -> list[str]:
    """What the scores are, and what the average leaves out."""
    said = [
        "Scores and retention (merge / expert on the expert's own capability) in percent"
        + (", ± one standard error." if errors else ".")
    ]
    names = [name for name in capability_columns(table) if name != AVERAGE]
    left_out = [name for name in names if table[name].isna().any()]
    if left_out:
        counted = f"{len(names) - len(left_out)} of {len(names)}"
        said.append(f"Average over {counted} capabilities; not measured for every model: {', '.join(left_out)}.")
    return said


def _number(name: str) -> Column:
    return Column(name, unit=PERCENT, error=f"{name}{STDERR}")


def _with_models(table: pd.DataFrame) -> pd.DataFrame:
    """A frame of its own, with the models' names as a column."""
    return table.copy() if "model" in table else table.reset_index()
