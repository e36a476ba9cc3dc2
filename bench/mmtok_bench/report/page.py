"""The report as one HTML page that needs nothing else: stylesheet, plotting library and data are in it."""

from __future__ import annotations

from importlib.resources import files

import jinja2
import plotly.io
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mmtok_bench.report.blocks import Plot
from mmtok_bench.report.document import Report
from mmtok_bench.report.metrics import tone
from mmtok_deploy import __version__

__all__ = ["to_html"]

_CONFIG = {"displayModeBar": False, "responsive": True}


def to_html(report: Report) -> str:
    """Returns the page's text, about 5 MB of which are the plotting library."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(_resource("page.html.jinja"))
    style = Markup(_resource("page.css"))
    plots = [plot for chapter in report.chapters for part in chapter.parts for plot in part.plots]
    ids = {id(plot): f"plot-{number}" for number, plot in enumerate(plots, start=1)}

    def draw(plot: Plot) -> Markup:
        # plotly.io writes "<" in its data as an escape, so that no text of a row ends the script.
        drawn = plotly.io.to_html(
            plot.figure,
            config=_CONFIG,
            full_html=False,
            include_plotlyjs=False,
            div_id=ids[id(plot)],
            default_height="360px",
        )
        return Markup(drawn)

    library = Markup(get_plotlyjs() if plots else "")
    return template.render(report=report, draw=draw, tone=tone, library=library, style=style, version=__version__)


def _resource(name: str) -> str:
    return files("mmtok_bench.report").joinpath(name).read_text(encoding="utf-8")
