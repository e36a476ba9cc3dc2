"""The report as one self-contained HTML page, with stylesheet, plotting library and data."""

from __future__ import annotations

import itertools
from importlib.resources import files

import jinja2
import plotly.io
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mmtok_bench.report.document import Report
from mmtok_bench.report.metrics import sort_key, tone
from mmtok_bench.report.tables import Plot
from mmtok_deploy import __version__

__all__ = ["to_html"]

_CONFIG = {"displayModeBar": False, "responsive": True}


def to_html(report: Report) -> str:
    """Returns the HTML of the page, of which about 5 MB are the plotting library."""
    folder, package = files("mmtok_bench.report"), files("mmtok_bench")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(folder.joinpath("page.html.jinja").read_text(encoding="utf-8"))
    sheets = (package.joinpath("look.css"), folder.joinpath("page.css"))
    style = Markup("".join(sheet.read_text(encoding="utf-8") for sheet in sheets))
    script = Markup(folder.joinpath("page.js").read_text(encoding="utf-8"))
    numbers = itertools.count(1)

    def draw(plot: Plot) -> Markup:
        # plotly.io writes "<" in its data as an escape, so that no text of a row ends the script.
        options = {"full_html": False, "include_plotlyjs": False, "default_height": "360px", "config": _CONFIG}
        return Markup(plotly.io.to_html(plot.figure, div_id=f"plot-{next(numbers)}", **options))

    library = Markup(get_plotlyjs())
    functions = {"draw": draw, "tone": tone, "sort_key": sort_key}
    return template.render(report=report, library=library, style=style, script=script, version=__version__, **functions)
