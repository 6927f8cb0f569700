"""The chart shows each score of the table once, at its place and height."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from ota_core.errors import OtaError
from tasks.pages.plots import FACE, OWN, capability_columns, score_chart


def _table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "model": ["ota", "base", "math-expert", "linear"],
            "role": ["merge", "base", "expert", "merge"],
            "capability": [None, None, "math", None],
            "math": [0.6, 0.2, 0.9, 0.5],
            "math_stderr": [0.03, 0.02, 0.01, np.nan],
            "code": [0.4, 0.1, 0.1, np.nan],
            "average": [0.5, 0.15, 0.5, 0.5],
            "retention": [0.7, np.nan, np.nan, 0.6],
            "negative_transfer": [0, 0, 0, 0],
        }
    )


def _bars(figure: Figure, panel: int) -> list[tuple[str, float, str]]:
    """(model, percent, colour) of a panel's bars, top to bottom."""
    axes = figure.axes
    names = {round(t, 3): label.get_text() for t, label in zip(axes[0].get_yticks(), axes[0].get_yticklabels(), strict=True)}
    bars = [(p.get_y() + p.get_height() / 2, p.get_width(), to_hex(p.get_facecolor())) for p in axes[panel].patches]
    return [(names[round(y, 3)], round(width, 6), colour) for y, width, colour in sorted(bars)]


def test_every_score_is_a_bar_in_percent_with_the_colour_of_its_role() -> None:
    figure = score_chart(_table())
    assert [a.get_title() for a in figure.axes] == ["math", "code", "average (1 of 2)"]
    grey, light, own, merge = (FACE[k] for k in ("base", "expert", OWN, "merge"))
    assert _bars(figure, 0) == [("base", 20, grey), ("math-expert", 90, own), ("ota", 60, merge), ("linear", 50, merge)]
    assert _bars(figure, 1) == [("base", 10, grey), ("math-expert", 10, light), ("ota", 40, merge)]
    assert _bars(score_chart(_table().assign(math=lambda t: t.math * 100), capabilities=["math"], unit="percent"), 0)[1][1] == 90
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]  # the base on top
    assert "accuracy (%)" in {t.get_text() for t in figure.texts}


def test_what_was_not_measured_says_so() -> None:
    figure = score_chart(_table())
    texts = {panel.get_title(): {t.get_text(): t.get_fontweight() for t in panel.texts} for panel in figure.axes}
    assert "not measured" in texts["code"]
    assert capability_columns(_table().assign(code=None)) == ["math", "code", "average"]
    assert texts["math"]["60.0"] == "bold" and texts["math"]["50.0"] == "normal"


def test_standard_errors_are_drawn_where_they_are_given() -> None:
    figure = score_chart(_table())
    spans = [segment[:, 0] for c in figure.axes[0].collections for segment in c.get_segments()]
    assert sorted(tuple(np.round(s, 6)) for s in spans if len(s) == 2) == [(18, 22), (57, 63), (89, 91)]
    assert not figure.axes[1].collections


def test_texts_lie_inside_the_picture_and_do_not_overlap() -> None:
    names = [f"a-model-with-quite-a-long-name-{i}" for i in range(14)]
    table = pd.DataFrame({"model": names, "role": ["base", *["expert"] * 5, *["merge"] * 8]})
    for capability in ("math", "code", "precise_if", "general_if", "knowledge", "average"):
        table[capability] = 1.0
    for columns in (["math"], capability_columns(table)):
        figure = score_chart(table, capabilities=columns)
        FigureCanvasAgg(figure).draw()
        texts = [*figure.axes[0].get_yticklabels(), *figure.legends[0].get_texts(), *figure.texts]
        texts += [t for a in figure.axes for t in a.texts]
        boxes = [t.get_window_extent() for t in texts]
        assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.bbox.width and b.y1 <= figure.bbox.height for b in boxes)
        overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :] if a.overlaps(b)]
        assert not overlaps


def test_bad_tables_are_refused() -> None:
    with pytest.raises(OtaError, match="lacks the columns"):
        score_chart(_table().drop(columns="role"))
    with pytest.raises(OtaError, match=r"roles \['teacher'\]"):
        score_chart(_table().replace({"role": {"expert": "teacher"}}))
    with pytest.raises(OtaError, match="0 capabilities"):
        score_chart(_table()[["model", "role"]])


def test_threads_draw_at_once(tmp_path: Path) -> None:
    def draw(i: int) -> bytes:
        path = tmp_path / f"{i}.png"
        score_chart(_table()).savefig(path)
        return path.read_bytes()

    alone = draw(0)
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(draw, range(1, 4))) == {alone}
