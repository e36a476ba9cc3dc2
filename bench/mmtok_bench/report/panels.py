"""The plots of quality as panels on a page of their own, one for each kind of question."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import plotly.io
from plotly.subplots import make_subplots

from mmtok_bench.report.quality import OVER_TOKENS
from mmtok_bench.report.tables import Plot

__all__ = ["panels", "to_panels_html"]

_HEIGHT_PX = 440


def panels(plots: Sequence[Plot]) -> go.Figure:
    """Returns plots as panels of one figure with one legend, which share their vertical axis; without error bars.

    Raises:
        ValueError: No plots.
    """
    if not plots:
        raise ValueError("these rows have no scores at several budgets, which --panels draws for each kind")
    titles = [plot.title.removeprefix("Quality: ").removesuffix(OVER_TOKENS) for plot in plots]
    models = {title.rpartition(", ")[0] for title in titles}
    if len(models) == 1:
        titles = [title.rpartition(", ")[2] for title in titles]
    figure = make_subplots(rows=1, cols=len(plots), shared_yaxes=True, horizontal_spacing=0.015, subplot_titles=titles)
    names: set[str] = set()
    for column, plot in enumerate(plots, start=1):
        for trace in plot.figure.data:
            copied = go.Scatter(trace).update(
                error_y=None, legendgroup=trace.name, showlegend=trace.name not in names, overwrite=True
            )
            names.add(trace.name)
            figure.add_trace(copied, row=1, col=column)
    ticks = sorted({int(x) for plot in plots for trace in plot.figure.data for x in trace.x})
    # Axis ticks are the budgets; a smaller image may have a few tokens fewer.
    ticks = [tick for tick, above in zip(ticks, [*ticks[1:], 10 * ticks[-1]], strict=True) if above > 1.2 * tick]
    figure.update_xaxes(type="log", title="tokens kept", tickvals=ticks, gridcolor="#e5e7ea")
    figure.update_yaxes(tickformat=".0%", gridcolor="#e5e7ea")
    legend = {"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0.5, "xanchor": "center"}
    margins = {"l": 50, "r": 10, "t": 30, "b": 10}
    return figure.update_layout(template="none", height=_HEIGHT_PX, margin=margins, legend=legend)


def to_panels_html(plots: Sequence[Plot]) -> str:
    """Returns the HTML of a page with the panels alone, for a browser's screenshot."""
    config = {"displayModeBar": False, "responsive": True}
    page: str = plotly.io.to_html(panels(plots), include_plotlyjs=True, config=config)
    return page
