"""The report as Markdown: its tables and sentences, without the plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mmtok_bench.report.blocks import Table
from mmtok_bench.report.document import Report

__all__ = ["to_markdown"]


def to_markdown(report: Report) -> str:
    """Returns the text of a GitHub-flavoured Markdown file."""
    return "\n\n".join(_paragraphs(report)) + "\n"


def _paragraphs(report: Report) -> Iterator[str]:
    yield f"# {report.title}"
    for table in report.headlines:
        yield from _table(table)
    yield from report.notes
    for chapter in report.chapters:
        yield f"## {chapter.title}"
        if chapter.facts:
            yield "\n".join(f"- {name}: {value}" for name, value in chapter.facts)
        for part in chapter.parts:
            yield f"### {part.title}"
            yield from part.sentences
            for table in part.tables:
                yield from _table(table)


def _table(table: Table) -> Iterator[str]:
    rules = ["---" if idx < table.num_texts else "---:" for idx in range(len(table.columns))]
    yield f"**{table.title}**"
    yield "\n".join(_line(cells) for cells in (table.columns, rules, *table.rows))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
