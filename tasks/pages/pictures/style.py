"""Colours, fonts and sizes that all Altair pictures share.

A browser shows a chart at 100 %: letters have 12 px and more. Panels are narrow enough that one fits a phone and three a page.
"""

from __future__ import annotations

from typing import Any, Final

INK = "#222222"
# Okabe and Ito's palette ("Color Universal Design", 2008), told apart with every common form of colour blindness. Yellow comes last:
# on white it is hard to see.
CATEGORIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")
OWN = "own"
# The expert on its own capability has the full colour, on the others a lighter one.
FACE = {"base": "#7f7f7f", "expert": "#a9d6f2", OWN: CATEGORIES[0], "merge": CATEGORIES[1]}
"""A model's role to its colour."""
# Beside the colour, for points: a second way to tell them apart.
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
SEQUENTIAL: Final = "viridis"
"""Vega's scheme for amounts: even in lightness, readable with every form of colour blindness and in grey."""
DIVERGING: Final = "blueorange"
"""Vega's scheme for amounts on both sides of a middle; red and green do not meet in it."""

VARIANT_NAMES = {"curvature": "FFG", "magnitude": "magnitude"}
"""What people call the ways to choose which elements are kept: by curvature (Fast Fisher Grafting), or by magnitude."""
VARIANT_COLOURS = {"FFG": CATEGORIES[0], "magnitude": CATEGORIES[4]}

GRID = "#e3e3e3"
# Metrics as Arial's and Helvetica's; vl-convert brings it along, so that files look alike on every machine.
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
PANEL = 280
"""Width of one panel of small multiples in pixels."""


def theme() -> dict[str, Any]:
    """The theme, as Altair and Vega-Lite take it: ``{"config": …}``. ``page.spec`` puts it into every chart."""
    label = {"labelFontSize": 12, "labelColor": INK, "titleFontSize": 12, "titleFontWeight": "normal", "titleColor": INK}
    return {
        "config": {
            "background": "white",
            "font": FONT,
            "padding": 6,
            "view": {"stroke": None, "continuousWidth": PANEL, "continuousHeight": 180, "discreteWidth": {"step": 22}},
            "title": {"anchor": "start", "fontSize": 14, "fontWeight": "bold", "color": INK, "subtitleFontSize": 12, "offset": 10},
            "axis": {
                **label, "gridColor": GRID, "domainColor": "#888888", "tickColor": "#888888", "labelOverlap": True, "labelLimit": 240,
                "titleLimit": 400,
            },
            "legend": {
                **label, "orient": "top", "direction": "horizontal", "titleAnchor": "start", "titleLimit": 400, "labelLimit": 240,
                "gradientLength": 240, "gradientThickness": 12, "symbolStrokeWidth": 2,
            },
            "header": {
                "labelFontSize": 13, "labelFontWeight": "bold", "labelColor": INK, "titleFontSize": 12, "labelAnchor": "start",
                "labelLimit": 300,
            },
            "facet": {"spacing": 24},
            "concat": {"spacing": 24},
            "range": {"category": list(CATEGORIES), "symbol": list(SHAPES), "heatmap": {"scheme": SEQUENTIAL}},
            "line": {"strokeWidth": 2},
            "point": {"filled": True, "size": 60},
        }
    }  # fmt: skip
