"""Pictures of scores. Matplotlib's object interface only: no global state, so that several threads may draw at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ota_core.errors import OtaError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROLES = ("base", "expert", "merge")
STDERR_SUFFIX = "_stderr"
# Columns that a table of scores may hold beside the capabilities.
NOT_CAPABILITIES = frozenset({"model", "role", "capability", "digest", "n", "retention", "negative_transfer", "seconds"})
AVERAGE = "average"
OWN = "own"

# Okabe and Ito's palette ("Color Universal Design", 2008), told apart with every common form of colour blindness and, by their
# lightness, in print without colour. The expert on its own capability has the full colour, on the others a lighter one.
FACE = {"base": "#7f7f7f", "expert": "#a9d6f2", OWN: "#0072b2", "merge": "#d55e00"}
INK = "#222222"
NAME = {"base": "base", "expert": "expert", OWN: "expert on its own capability", "merge": "merge"}


def capability_columns(table: pd.DataFrame) -> list[str]:
    """The columns that hold scores, ``average`` last: numbers that are neither standard errors nor known for something else.

    A column without any value counts: it is a capability that was measured on no model.
    """
    numeric = set(table.select_dtypes(include="number").columns) | set(table.columns[table.isna().all()])
    names = [str(c) for c in table.columns if c in numeric - NOT_CAPABILITIES and not str(c).endswith(STDERR_SUFFIX)]
    return [n for n in names if n != AVERAGE] + [n for n in names if n == AVERAGE]


def score_chart(
    table: pd.DataFrame,
    *,
    capabilities: Sequence[str] | None = None,
    unit: Literal["fraction", "percent"] = "fraction",
    title: str = "",
) -> Figure:
    """Bars of capability × model: one panel per capability, one bar per model, in the same row in every panel.

    ``table`` has a row per model, with columns ``model``, ``role`` (base, expert or merge), optionally ``capability`` (the
    expert's own), one column per capability, and optionally ``<capability>_stderr`` (drawn as ± one standard error). Scores lie
    in 0…1, or 0…100 with ``unit="percent"``; a score that was not measured is NaN and its row says so. The axes are in percent.
    An ``average`` is drawn as given; where models lack capabilities it is taken to be over those that every model has, and its
    panel says over how many.
    Raises OtaError when a column is missing, a role is unknown or no capability is there.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = list(capabilities) if capabilities is not None else capability_columns(table)
    _check(table, columns)
    scale = 100.0 if unit == "fraction" else 1.0
    # Stable: models keep the table's order inside their role.
    table = table.assign(_order=table["role"].map(ROLES.index)).sort_values("_order", kind="stable").reset_index(drop=True)
    places = _rows_with_gaps(table["role"].tolist())
    longest = max(len(str(name)) for name in table["model"])

    left = 0.3 + 0.085 * longest  # inches for the models' names
    width = max(left + 1.75 * len(columns) + 0.2, 11.0)  # the legend's seven entries need 11 inches
    height = 1.6 + 0.3 * (places[-1] + 1)
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=left / width, right=1 - 0.2 / width, top=1 - 0.66 / height, bottom=0.95 / height, wspace=0.09)
    for panel, column in zip(panels, columns, strict=True):
        _draw_panel(panel, table, places, column, scale)
    measured = table[[c for c in columns if c != AVERAGE]].notna().all()
    if AVERAGE in columns and not measured.all():
        panels[columns.index(AVERAGE)].set_title(
            f"{AVERAGE} ({measured.sum()} of {len(measured)})", fontsize=10.5, color=INK, pad=5
        )
    panels[0].set_yticks(places, [str(name) for name in table["model"]], fontsize=9.5, color=INK)
    panels[0].set_ylim(places[-1] + 0.6, -0.6)  # the first model on top

    figure.suptitle(
        title or "Scores by capability", x=0.1 / width, y=1 - 0.1 / height, ha="left", va="top", fontsize=12, color=INK
    )
    figure.supxlabel("accuracy (%)", x=(left + (width - left) / 2) / width, y=0.42 / height, va="bottom", fontsize=9.5, color=INK)
    kinds = [k for k in FACE if (table["role"] == k).any() or (k == OWN and _has_own(table, columns))]
    handles: list[Any] = [Patch(facecolor=FACE[k], edgecolor="none", label=NAME[k]) for k in kinds]
    if (table["role"] == "base").any():
        handles.append(panels[0].plot([], [], color=INK, linestyle=(0, (4, 3)), linewidth=0.9, label="level of the base")[0])
    if any(f"{c}{STDERR_SUFFIX}" in table for c in columns):
        handles.append(panels[0].plot([], [], color=INK, linewidth=1.2, label="± 1 standard error")[0])
    if (table["role"] == "merge").sum() > 1:
        handles.append(Patch(alpha=0, label="bold: the best merge"))
    figure.legend(
        handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9, bbox_to_anchor=(0.5, 0.02 / height)
    )
    return figure


def _check(table: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [c for c in ("model", "role", *columns) if c not in table]
    if missing:
        raise OtaError(f"the table of scores lacks the columns {missing}; it has {list(table.columns)}")
    if not columns or table.empty:
        raise OtaError(f"the table of scores has {len(table)} models and {len(columns)} capabilities; a chart needs one of each")
    unknown = sorted(set(table["role"]) - set(ROLES))
    if unknown:
        raise OtaError(f"the table of scores holds the roles {unknown}; expected {list(ROLES)}")


def _rows_with_gaps(roles: Sequence[str]) -> list[float]:
    """Where each model's bar lies, top to bottom: half a row between two roles."""
    places, at = [], 0.0
    for i, role in enumerate(roles):
        at += 0.0 if i == 0 else 1.0 if role == roles[i - 1] else 1.5
        places.append(at)
    return places


def _owns(row: Any, column: str) -> bool:
    return bool(row["role"] == "expert" and row.get("capability") == column)


def _has_own(table: pd.DataFrame, columns: Sequence[str]) -> bool:
    return any(_owns(row, column) for _, row in table.iterrows() for column in columns)


def _draw_panel(panel: Axes, table: pd.DataFrame, places: Sequence[float], column: str, scale: float) -> None:
    """One capability: a bar per model, its value at its end, a dashed line at the level of the base."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]  # keeps numbers readable where the base's line crosses them
    scores = table[column].astype(float) * scale
    errors = (
        table[f"{column}{STDERR_SUFFIX}"].astype(float).fillna(0.0) * scale if f"{column}{STDERR_SUFFIX}" in table else scores * 0
    )
    merges = scores[table["role"] == "merge"].dropna()
    best = merges.max() if len(merges) > 1 else None
    for i, row in table.iterrows():
        y, score, error = places[i], scores[i], errors[i]
        if math.isnan(score):
            panel.text(
                2, y, "not measured", va="center", fontsize=8, style="italic", color="#555555", zorder=5, path_effects=halo
            )
            continue
        own = _owns(row, column)
        panel.barh(y, score, height=0.74, color=FACE[OWN if own else row["role"]], zorder=2)
        if error:
            panel.errorbar(score, y, xerr=error, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2, zorder=4)
        weight = "bold" if i in merges.index and score == best else "normal"
        label = f"{score:.1f}"
        panel.text(score + error + 2, y, label, va="center", fontsize=8, weight=weight, color=INK, zorder=5, path_effects=halo)
    base = scores[table["role"] == "base"].dropna()
    if len(base):
        panel.axvline(base.iloc[0], color=INK, linestyle=(0, (4, 3)), linewidth=0.9, zorder=3)
    panel.set_xlim(0, 122)  # room for the values beyond a bar of 100 %
    panel.set_xticks([0, 50, 100])
    panel.set_xticks([25, 75], minor=True)
    panel.grid(axis="x", which="both", color="#dddddd", linewidth=0.7, zorder=0)
    panel.set_axisbelow(True)
    panel.set_title(column, fontsize=10.5, color=INK, pad=5)
    panel.tick_params(axis="x", labelsize=8, colors=INK)
    panel.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        panel.spines[side].set_visible(False)
