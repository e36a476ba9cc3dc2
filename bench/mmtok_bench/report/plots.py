"""How the report's plots look: one style, readable on light and dark paper."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go

from mmtok_bench.report.blocks import Plot, Table
from mmtok_bench.report.metrics import format_value

__all__ = ["DOWNSAMPLED", "PALETTE", "UNPRUNED", "new_figure", "plot_of"]

UNPRUNED = "#8a9099"
DOWNSAMPLED = "#c2703d"
PALETTE = ("#0f8f89", "#7a5bd0", "#3d7fd6", "#c14b7c", "#6d9b2f", "#b58a1c")
"""For budgets and image sizes; of middling lightness, so that they stand out on white and on black."""

_GRID = "rgba(128,134,145,0.25)"


def new_figure(x_title: str, y_title: str) -> go.Figure:
    """Returns an empty figure in the report's style; the page's stylesheet colours its texts."""
    axis = {
        "gridcolor": _GRID,
        "zerolinecolor": _GRID,
        "linecolor": _GRID,
        "automargin": True,
        "title": {"standoff": 12},
    }
    return go.Figure(
        layout={
            "template": "none",
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13},
            "margin": {"l": 10, "r": 14, "t": 10, "b": 10},
            "height": 360,
            "legend": {"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0},
            "hoverlabel": {"bgcolor": "#1d232c", "font": {"color": "#ffffff"}},
            "xaxis": {**axis, "title": {"text": x_title, "standoff": 10}},
            "yaxis": {**axis, "title": {"text": y_title, "standoff": 10}},
        }
    )


def plot_of(title: str, note: str, figure: go.Figure, formats: Mapping[str, str]) -> Plot:
    """Returns the plot with its values as a table: series, x, y.

    Args:
        title: What is seen.
        note: Under which conditions.
        figure: Its traces are scatters and bars.
        formats: The metric of "x" and of "y", as whose values they are written; text without one.
    """
    rows = []
    for trace in figure.data:
        for x, y in zip(trace.x, trace.y, strict=True):
            cells = [_cell(value, formats.get(axis)) for axis, value in (("x", x), ("y", y))]
            rows.append((str(trace.name), *cells))
    columns = ("series", figure.layout.xaxis.title.text, figure.layout.yaxis.title.text or "bar")
    return Plot(title, note, figure, Table(title, columns, tuple(rows), is_detail=True))


def _cell(value: object, name: str | None) -> str:
    return format_value(name, float(str(value))) if name is not None else str(value)
