"""Pictures of scores: base, experts and merges on each capability, and what the merges retain of the experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import altair as alt

from ota_core.errors import OtaError
from tasks.evaluation.scores import ROLES, STDERR, capability_columns
from tasks.pages.pictures.grids import side_by_side
from tasks.pages.pictures.picture import Picture
from tasks.pages.pictures.style import FACE, INK, OWN, PANEL

if TYPE_CHECKING:
    import pandas as pd

NAME = {"base": "base", "expert": "expert", OWN: "expert on its own capability", "merge": "merge"}
_SCORES_WIDTH, _RETENTION_WIDTH = PANEL - 40, PANEL + 40

Row = Mapping[str, str | float | None]


def pictures_of_scores(rows: Sequence[Row] | pd.DataFrame) -> dict[str, Picture]:
    """Name to picture: ``scores``, and ``retention`` where a merge and an expert on its own capability were measured.

    ``rows`` are those that MLflow gets (``tasks.evaluation.scores.rows_of``): model, role (base, expert, merge), capability (the expert's own), a
    score in 0…1 for each capability or None, ``<capability>_stderr``, average. Raises OtaError for a table without a score or with an unknown role.
    """
    import pandas as pd

    table = pd.DataFrame(rows)
    missing = [column for column in ("model", "role") if column not in table]
    if missing or table.empty:
        raise OtaError(
            f"the table of scores has {len(table)} models and lacks the columns {missing}; pictures need one model and all columns"
        )
    unknown = sorted(set(table["role"]) - set(ROLES))
    if unknown:
        raise OtaError(f"the table of scores holds the roles {unknown}; expected {list(ROLES)}")
    capabilities = capability_columns(table)
    scores = _long(table, capabilities)
    if scores["score"].isna().all():
        raise OtaError(
            f"no model of the table has a score ({', '.join(capabilities) or 'no capability'}); benchmark one, then draw"
        )
    pictures = {"scores": _scores(table, scores)}
    kept = _retention(scores)
    if not kept.empty:
        pictures["retention"] = Picture(
            "How much of each expert does the merge retain?",
            "Score of the merge as a share of the expert's, on the expert's own capability. 100 %: as good as the expert. The black tick is "
            "where the base stands; where a bar ends before it, the merge is worse than the base.",
            _retention_bars(kept),
        )
    return pictures


def _long(table: pd.DataFrame, capabilities: Sequence[str]) -> pd.DataFrame:
    """One row for each model and capability, in the order of base, experts, merges. ``score`` is NaN where it was not measured."""
    import pandas as pd

    rows = []
    for role in ROLES:
        for _, row in table[table["role"] == role].iterrows():
            for capability in capabilities:
                own = role == "expert" and row.get("capability") == capability
                found = {
                    "score": row[capability],
                    "stderr": row.get(f"{capability}{STDERR}"),
                    "face": NAME[OWN if own else role],
                }
                rows.append({"model": row["model"], "role": role, "capability": capability, **found})
    scores = pd.DataFrame(rows, columns=["model", "role", "capability", "score", "stderr", "face"])
    return scores.astype({"score": float, "stderr": float})


def _scores(table: pd.DataFrame, scores: pd.DataFrame) -> Picture:
    models = [str(name) for role in ROLES for name in table.loc[table["role"] == role, "model"]]
    panels = list(dict.fromkeys(scores["capability"]))
    base = scores[scores["role"] == "base"].set_index("capability")["score"].dropna()
    scores = scores.assign(
        base=scores["capability"].map(base).astype(float),
        low=scores["score"] - scores["stderr"],
        high=scores["score"] + scores["stderr"],
    )
    tooltip: list[alt.Tooltip | str] = [
        "model:N",
        "capability:N",
        alt.Tooltip("score:Q", format=".4~p"),
        alt.Tooltip("stderr:Q", title="± standard error", format=".3~p"),
    ]
    y = alt.Y("model:N", title=None, sort=None, scale=alt.Scale(domain=models))
    chart = alt.Chart(scores).encode(y=y, tooltip=tooltip)
    measured = chart.transform_filter("isValid(datum.score)")
    faces = {NAME[key]: colour for key, colour in FACE.items() if (scores["face"] == NAME[key]).any()}
    x = alt.X(  # with room for the numbers behind the longest bars
        "score:Q", title="accuracy", scale=alt.Scale(domain=[0, 1.15]), axis=alt.Axis(format="%", values=[0, 0.25, 0.5, 0.75, 1])
    )
    colour = alt.Color(
        "face:N", legend=alt.Legend(title=None, columns=2), scale=alt.Scale(domain=list(faces), range=list(faces.values()))
    )
    layers = [
        _whole_row(chart, _SCORES_WIDTH),
        measured.mark_bar(height={"band": 0.78}).encode(x=x, color=colour),
        chart.transform_filter("isValid(datum.low)").mark_rule(color=INK, strokeWidth=1.2).encode(x="low:Q", x2="high:Q"),
    ]
    if len(base):
        layers.append(alt.Chart(scores).mark_rule(color=INK, strokeDash=[4, 3], strokeWidth=1).encode(x="mean(base):Q"))
    numbers = measured.transform_calculate(end="isValid(datum.high) ? datum.high : datum.score")
    for ink in (
        {"color": "white", "stroke": "white", "strokeWidth": 3},
        {"color": INK},
    ):  # readable where the base's line crosses them
        text = numbers.mark_text(align="left", dx=4, fontSize=11, **ink)
        layers.append(text.encode(x="end:Q", text=alt.Text("score:Q", format=".1%")))
    absent = chart.transform_filter("!isValid(datum.score)").mark_text(
        align="left", fontSize=11, fontStyle="italic", color="#595959"
    )
    layers.append(absent.encode(x=alt.value(4), text=alt.value("not measured")))
    panel = alt.layer(*layers).properties(width=_SCORES_WIDTH, height=alt.Step(19))
    what = "Accuracy of each model on each capability, in percent"
    what += "; thin lines: ± one standard error" if scores["stderr"].notna().any() else ""
    what += "; dashed: the base's level" if len(base) else ""
    return Picture("How good is the merge?", f"{what}.", side_by_side(panel, "capability", panels))


def _whole_row(chart: alt.Chart, width: int) -> alt.Chart:
    """Nothing to see, but to hover over: a bar of one percent is hard to hit."""
    return chart.mark_rect(opacity=0).encode(x=alt.value(0), x2=alt.value(width))


def _retention(scores: pd.DataFrame) -> pd.DataFrame:
    """One row for each merge and capability that has an expert of its own: retention, and the base's score on the same scale.

    Of several experts on a capability the best counts, as in ``tasks.evaluation.scores.retention``.
    """
    own = scores[scores["face"] == NAME[OWN]].groupby("capability")["score"].max()
    own = own[own > 0]
    base = scores[scores["role"] == "base"].set_index("capability")["score"]
    merges = scores[(scores["role"] == "merge") & scores["score"].notna()]
    kept = merges.loc[merges["capability"].isin(own.index), ["model", "capability", "score"]]
    expert = kept["capability"].map(own).astype(float)
    return kept.assign(expert=expert, retention=kept["score"] / expert, base=kept["capability"].map(base).astype(float) / expert)


def _retention_bars(kept: pd.DataFrame) -> alt.FacetChart:
    capabilities, models = (list(dict.fromkeys(kept[column])) for column in ("capability", "model"))
    most = max(1.0, float(kept[["retention", "base"]].max().max()))
    shown = {"retention": "retention", "score": "merge's score", "expert": "expert's score", "base": "base / expert"}
    tooltip: list[alt.Tooltip | str] = [alt.Tooltip("model:N", title="merge"), "capability:N"]
    tooltip += [alt.Tooltip(f"{field}:Q", title=title, format=".4~p") for field, title in shown.items()]
    y = alt.Y("capability:N", title=None, sort=None, scale=alt.Scale(domain=capabilities))
    chart = alt.Chart(kept).encode(y=y, tooltip=tooltip)
    scale = alt.Scale(domain=[0, most * 1.16], nice=False)  # the numbers stand at the right, where nothing crosses them
    x = alt.X("retention:Q", title="merge / expert", scale=scale, axis=alt.Axis(format="%", tickCount=6))
    numbers = chart.mark_text(align="right", fontSize=12, color=INK)
    layers = [
        _whole_row(chart, _RETENTION_WIDTH),
        chart.mark_bar(color=FACE["merge"], height={"band": 0.7}).encode(x=x),
        alt.Chart(kept).mark_rule(color=INK, strokeWidth=1.5).encode(x=alt.datum(1.0)),
        chart.transform_filter("isValid(datum.base)")
        .mark_tick(color="black", thickness=3, height={"band": 0.9})
        .encode(x="base:Q"),
        numbers.encode(x=alt.value(_RETENTION_WIDTH - 2), text=alt.Text("retention:Q", format=".0%")),
    ]
    panel = alt.layer(*layers).properties(width=_RETENTION_WIDTH, height=alt.Step(26))
    return side_by_side(panel, "model", models, columns=2)
