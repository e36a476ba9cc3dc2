"""What a report is made of, before it is HTML or Markdown: sentences, tables, plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import plotly.graph_objects as go

__all__ = ["Part", "Plot", "Table", "in_words", "without_empty_columns"]


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text, row by row.

    Args:
        title: What the table shows.
        columns: Headings, with the unit.
        rows: One text a column; empty where there is nothing to say.
        num_texts: The columns that hold words; those after them hold numbers.
        is_detail: Folded away on the page until it is asked for.
        is_grouped: The first column is the heading of the rows that have it in common.
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


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure, what it says in words for whoever does not see it, and its values."""

    title: str
    note: str
    figure: go.Figure
    values: Table


@dataclass(frozen=True, slots=True)
class Part:
    """What one bench says of one machine.

    Args:
        title: Of the section.
        headline: The table that leads the page, if there is something to compare.
        sentences: What to know before reading the figures, and what was not measured.
        plots: In reading order.
        tables: The figures themselves.
    """

    title: str
    headline: Table | None = None
    sentences: tuple[str, ...] = ()
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()


def without_empty_columns(table: Table) -> Table:
    """Returns the table without the columns in which no row says anything."""
    kept = [idx for idx in range(len(table.columns)) if any(row[idx] for row in table.rows)]
    return replace(
        table,
        columns=tuple(table.columns[idx] for idx in kept),
        rows=tuple(tuple(row[idx] for idx in kept) for row in table.rows),
        num_texts=sum(idx < table.num_texts for idx in kept),
    )


def in_words(items: Sequence[str]) -> str:
    """Returns "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))
