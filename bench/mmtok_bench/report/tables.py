"""Tables, plots and the sections of a report that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import rich.table

from mmtok_bench.report.metrics import format_value

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "DOWNSAMPLED",
    "PALETTE",
    "UNPRUNED",
    "Part",
    "Plot",
    "Table",
    "in_words",
    "line_style",
    "new_figure",
    "plot_of",
]

UNPRUNED = "#8a9099"
DOWNSAMPLED = "#c2703d"
PALETTE = ("#0f8f89", "#7a5bd0", "#3d7fd6", "#c14b7c", "#6d9b2f", "#b58a1c")
"""Colours of budgets, methods and image sizes, of medium lightness, which are visible on white and on black."""

_DASHES = ("solid", "dot", "dash")
_GRID = "rgba(128,134,145,0.25)"


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text, row by row.

    Args:
        title: What the table shows.
        columns: Headings, with the unit.
        rows: One text for each column, possibly empty.
        num_texts: Number of columns that hold words; the columns after them hold numbers.
        is_detail: Whether it is folded on the page and left out in the terminal.
        is_grouped: Whether the first column is a heading of the rows that share it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_texts: int = 1
    is_detail: bool = False
    is_grouped: bool = False

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: expected {len(self.columns)} cells, got {len(row)}: {row}")

    def without_empty_columns(self) -> Table:
        """Returns the table without the columns that are empty in all rows."""
        kept = [idx for idx in range(len(self.columns)) if any(row[idx] for row in self.rows)]
        return replace(
            self,
            columns=tuple(self.columns[idx] for idx in kept),
            rows=tuple(tuple(row[idx] for idx in kept) for row in self.rows),
            num_texts=sum(idx < self.num_texts for idx in kept),
        )

    def to_markdown(self) -> str:
        """Returns the title and the table as GitHub-flavoured Markdown."""
        rules = ["---" if idx < self.num_texts else "---:" for idx in range(len(self.columns))]
        lines = (" | ".join(cell.replace("|", "\\|") for cell in cells) for cells in (self.columns, rules, *self.rows))
        return f"**{self.title}**\n\n" + "\n".join(f"| {line} |" for line in lines)

    def to_rich(self) -> rich.table.Table:
        """Returns the table for a terminal."""
        shown = rich.table.Table(title=self.title, title_justify="left")
        for idx, column in enumerate(self.columns):
            shown.add_column(column, justify="left" if idx < self.num_texts else "right")
        for row in self.rows:
            shown.add_row(*(cell.replace("[", "\\[") for cell in row))
        return shown


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure, a note on its conditions, and its values in a table."""

    title: str
    note: str
    figure: go.Figure
    values: Table


@dataclass(frozen=True, slots=True)
class Part:
    """The section of one benchmark's rows on one machine.

    Args:
        title: Title of the section.
        headline: A table for the top of the page, if there is something to compare.
        sentences: Notes on the figures, and on what was not measured.
        tables: The figures.
        draw: Makes the plots, in reading order; only this needs plotly.
    """

    title: str
    headline: Table | None = None
    sentences: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    draw: Callable[[], Iterable[Plot]] = tuple

    @property
    def plots(self) -> tuple[Plot, ...]:
        """The plots, drawn anew."""
        return tuple(self.draw())


def in_words(items: Sequence[str]) -> str:
    """Returns "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def line_style(number: int, colour: str | None = None) -> dict[str, dict[str, Any]]:
    """Returns colour and dash of a plot's line and markers, which differ between numbers.

    Args:
        number: The line's number. Once all colours are used, lines are dotted, and then dashed.
        colour: A colour in place of the number's.
    """
    colour = PALETTE[number % len(PALETTE)] if colour is None else colour
    dash = _DASHES[number // len(PALETTE) % len(_DASHES)]
    return {"line": {"color": colour, "dash": dash}, "marker": {"color": colour, "size": 7}}


def new_figure(x_title: str, y_title: str) -> go.Figure:
    """Returns an empty figure in the report's style; the page's stylesheet colours its texts."""
    import plotly.graph_objects as go

    axis = {"gridcolor": _GRID, "zerolinecolor": _GRID, "linecolor": _GRID, "automargin": True}
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
    """Returns the plot with its values in a table: series, x, y.

    Args:
        title: Title of the plot.
        note: The conditions.
        figure: A figure of scatters and bars.
        formats: For "x" and "y", the metric whose format their values get; values of an axis without one are texts.
    """

    def cell(value: Any, axis: str) -> str:
        return format_value(formats[axis], float(value)) if axis in formats else str(value)

    rows = tuple(
        (str(trace.name), cell(x, "x"), cell(y, "y"))
        for trace in figure.data
        for x, y in zip(trace.x, trace.y, strict=True)
    )
    columns = ("series", figure.layout.xaxis.title.text, figure.layout.yaxis.title.text or "bar")
    return Plot(title, note, figure, Table(title, columns, rows, is_detail=True))
