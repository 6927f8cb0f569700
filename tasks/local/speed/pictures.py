"""The picture of the benchmark: time and memory against parameters and against experts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import altair as alt
import pandas as pd

from tasks.local.speed.cases import MEMORY_TARGET, MERGES
from tasks.local.speed.results import Bench
from tasks.pages.pictures.style import CATEGORIES, INK, SHAPES

DRAWN = ("compress", "mask", *MERGES)


def frame_of(bench: Bench) -> pd.DataFrame:
    """A row a case that is drawn: name, parameters, experts, wall seconds (median, ``low``, ``high``), peak MiB, whether the page cache held it."""
    rows = [
        {
            "case": one.name, "parameters": one.parameters / 1e9, "experts": one.experts, "seconds": one.seconds,
            "low": min(run.seconds for run in one.runs), "high": max(run.seconds for run in one.runs),
            "memory": (one.peak_bytes or 0) / 2**20, "cached": one.in_page_cache,
        }
        for combination in bench.combinations
        for one in combination.cases
        if one.runs and one.name in DRAWN
    ]  # fmt: skip
    counts = Counter(row["case"] for row in rows)
    # A case that was measured at one size alone shows no growth; where there is but one size, every case is shown.
    kept = [row for row in rows if counts[row["case"]] > 1 or len(bench.combinations) == 1]
    return pd.DataFrame(kept, columns=["case", "parameters", "experts", "seconds", "low", "high", "memory", "cached"])


def bench_chart(bench: Bench) -> alt.TopLevelMixin:
    """Four panels: wall time and peak memory, each against parameters (at one number of experts) and against experts (at one size).

    Points are medians, of memory the largest; thin bars go from the fastest to the slowest run. A hollow point: inputs that the page cache
    cannot hold.
    """
    frame = frame_of(bench)
    names = [name for name in DRAWN if name in set(frame["case"])]
    experts, parameters = _most(frame["experts"]), _most(frame["parameters"])
    sides = (
        (frame[frame["experts"] == experts], "parameters", "parameters (billion)", f"{experts:g} experts"),
        (frame[frame["parameters"] == parameters], "experts", "experts", f"{parameters:.2g} B parameters"),
    )
    rows = [
        alt.hconcat(*(_panel(part, names, x, label, measure, f"{what} at {fixed}") for part, x, label, fixed in sides))
        for measure, what in (("seconds", "Wall time (s)"), ("memory", "Peak resident memory (MiB)"))
    ]
    said = "points: medians, of memory the largest; thin bars: fastest to slowest run; hollow: inputs not in the page cache"
    title = alt.TitleParams(f"ota bench: {bench.machine.cpu}, {bench.machine.cores} cores", subtitle=said)
    return alt.vconcat(*rows, title=title)


def _panel(
    part: pd.DataFrame, names: Sequence[str], x: str, label: str, measure: str, title: str
) -> alt.LayerChart | alt.FacetChart:
    places = sorted(set(part[x])) if x == "experts" else alt.Undefined
    order = range(len(names))  # no two are alike in both colour and shape
    scales = [
        alt.Scale(domain=list(names), range=[CATEGORIES[i % len(CATEGORIES)] for i in order]),
        alt.Scale(domain=list(names), range=[SHAPES[(i + i // len(SHAPES)) % len(SHAPES)] for i in order]),
    ]
    base = alt.Chart(part).encode(
        x=alt.X(
            f"{x}:Q",
            title=label,
            axis=alt.Axis(values=places),
            scale=alt.Scale(domain=[0, 1.06 * float(part[x].max())], nice=False),
        )
    )
    base = base.encode(color=alt.Color("case:N", title=None, scale=scales[0], legend=alt.Legend(columns=6)))
    y = alt.Y(f"{measure}:Q", title=None, scale=alt.Scale(zero=True))
    layers: list[alt.Chart] = [base.mark_line(strokeWidth=1.5).encode(y=y)]
    if measure == "seconds":
        layers.append(base.mark_rule(strokeWidth=1).encode(y=alt.Y("low:Q", title=None), y2="high:Q"))
    else:
        target = pd.DataFrame({"target": [MEMORY_TARGET / 2**20], "text": [f"target {MEMORY_TARGET / 2**20:.0f} MiB"]})
        line = alt.Chart(target).mark_rule(strokeDash=[4, 3], color=INK).encode(y="target:Q")
        layers += [
            line,
            alt.Chart(target).mark_text(align="left", dx=4, dy=-7, color=INK).encode(y="target:Q", x=alt.value(0), text="text:N"),
        ]
    fill = alt.condition("datum.cached", "case:N", alt.value("white"), scale=scales[0], legend=None)
    shape = alt.Shape("case:N", title=None, scale=scales[1])
    layers.append(base.mark_point(filled=False, size=60, strokeWidth=1.5, opacity=1).encode(y=y, shape=shape, fill=fill))
    return alt.layer(*layers).properties(width=420, height=260, title=title)


def _most(values: pd.Series[float]) -> float:
    """The value that comes most often, of several the smallest; the panel of it has most points."""
    return float(values.mode().min()) if len(values) else 0.0
