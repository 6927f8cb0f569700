"""The picture of the benchmark: time and memory against parameters and against experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tasks.local.speed.cases import MERGES
from tasks.local.speed.results import Bench, CaseResult
from tasks.pages.plots import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette ("Color Universal Design", 2008); markers tell the lines apart without colour.
_STYLES = (
    ("#000000", "o"), ("#e69f00", "s"), ("#56b4e9", "^"), ("#009e73", "D"), ("#0072b2", "v"), ("#d55e00", "P"), ("#cc79a7", "X"),
    ("#7f7f7f", "<"), ("#b8860b", ">"), ("#4b0082", "*"), ("#2f4f4f", "h"),
)  # fmt: skip
DRAWN = ("compress", "mask", *MERGES)


def bench_chart(bench: Bench) -> Figure:
    """Four panels: wall time and peak memory, each against parameters (at one number of experts) and against experts (at one size).

    Points are medians, of memory the largest; thin bars go from the fastest to the slowest run. An open marker: inputs that the page cache cannot hold.
    """
    from matplotlib.figure import Figure

    results = [one for c in bench.combinations for one in c.cases if one.runs and one.name in DRAWN]
    counts = Counter(one.name for one in results)
    # A case that was measured at one size alone shows no growth; where there is but one size, every case is shown.
    names = [name for name in DRAWN if counts[name] > 1 or (counts[name] and len(bench.combinations) == 1)]
    results = [one for one in results if one.name in names]
    styles = dict(zip(names, _STYLES, strict=False))
    experts, parameters = _most([one.experts for one in results]), _most([one.parameters for one in results])
    figure = Figure(figsize=(11.5, 8.4), dpi=110, facecolor="white")
    panels = figure.subplots(2, 2, squeeze=True)
    at_experts = [one for one in results if one.experts == experts]
    at_size = [one for one in results if one.parameters == parameters]
    size = f"{parameters / 1e9:.2g} B parameters"
    sides: list[tuple[list[CaseResult], Callable[[CaseResult], float], str, str]] = [
        (at_experts, lambda one: one.parameters / 1e9, "parameters (billion)", f"{experts} experts"),
        (at_size, lambda one: one.experts, "experts", size),
    ]
    for column, (chosen, place, label, fixed) in enumerate(sides):
        for row, (what, unit) in enumerate((("Wall time", "seconds"), ("Peak resident memory", "MiB"))):
            panel = panels[row][column]
            for name in names:
                _line(panel, name, [one for one in chosen if one.name == name], place, row == 1, styles[name])
            if row == 1:
                panel.axhline(1024, color=INK, linestyle=(0, (4, 3)), linewidth=0.9)
                panel.text(
                    1,
                    1024,
                    "target 1024 MiB",
                    transform=panel.get_yaxis_transform(),
                    fontsize=8,
                    color=INK,
                    ha="right",
                    va="bottom",
                )
                panel.set_ylim(top=max(1150.0, panel.get_ylim()[1]))
            _dress(panel, f"{what} at {fixed}", label, unit)
            if column == 1:
                panel.set_xticks(sorted({one.experts for one in chosen}))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, frameon=False, fontsize=9, bbox_to_anchor=(0.5, 0.025))
    figure.text(
        0.5, 0.008, "points: medians, of memory the largest; thin bars: fastest to slowest run; open: inputs not in the page cache",
        ha="center", fontsize=8.5, color=INK,
    )  # fmt: skip
    figure.suptitle(f"ota bench: {bench.machine.cpu}, {bench.machine.cores} cores", x=0.02, ha="left", fontsize=12, color=INK)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.91, bottom=0.15, hspace=0.33, wspace=0.17)
    return figure


def _most(values: Sequence[int]) -> int:
    """The value that comes most often; the panel of it has most points."""
    return max(sorted(set(values)), key=values.count, default=0)


def _line(
    panel: Axes, name: str, results: list[CaseResult], place: Callable[[CaseResult], float], memory: bool, style: tuple[str, str]
) -> None:
    """One case: a line through its points in the order of the axis."""
    if not results:
        return
    results = sorted(results, key=place)
    x = [place(one) for one in results]
    y = [(one.peak_bytes or 0) / 2**20 if memory else (one.seconds or 0.0) for one in results]
    color, marker = style
    panel.plot(x, y, color=color, marker=marker, markersize=6, linewidth=1.4, label=name, zorder=3)
    absent = [i for i, one in enumerate(results) if not one.in_page_cache]
    panel.plot(
        [x[i] for i in absent],
        [y[i] for i in absent],
        color=color,
        marker=marker,
        markersize=6,
        markerfacecolor="white",
        linestyle="",
        zorder=4,
    )
    if not memory and any(len(one.runs) > 1 for one in results):
        low = [min(run.seconds for run in one.runs) for one in results]
        high = [max(run.seconds for run in one.runs) for one in results]
        panel.vlines(x, low, high, color=color, linewidth=1, zorder=2)


def _dress(panel: Any, title: str, label: str, unit: str) -> None:
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)
    panel.set_title(title, fontsize=10.5, color=INK, loc="left")
    panel.set_xlabel(label, fontsize=9.5, color=INK)
    panel.set_ylabel(unit, fontsize=9.5, color=INK)
    panel.grid(color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8.5, colors=INK)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
