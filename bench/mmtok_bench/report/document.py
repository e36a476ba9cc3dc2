"""A report before it is rendered: headlines, and the sections of each machine's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pandas as pd
from rich.console import Console

from mmtok_bench.report.commits import compare_commits
from mmtok_bench.report.features import features_part
from mmtok_bench.report.frame import frame_of, is_cpu, names_in, newest, records
from mmtok_bench.report.metrics import format_value, metric
from mmtok_bench.report.quality import quality_part
from mmtok_bench.report.selector import selector_part
from mmtok_bench.report.serve import serve_part
from mmtok_bench.report.tables import Part, Table, in_words
from mmtok_bench.results import ResultRow

__all__ = ["SECTIONS", "Chapter", "Report", "make_report", "print_rows", "to_markdown"]

SECTIONS: dict[str, tuple[Callable[[pd.DataFrame], Part], tuple[str, ...]]] = {
    "serve": (serve_part, ()),
    "quality": (quality_part, ("task", "model", "kind", "method", "budget", "seed")),
    "selector": (selector_part, ("num_tokens", "num_picks", "batch")),
    "selector-features": (features_part, ("what", "encoder", "num_tokens")),
}
"""Benchmark -> function that makes its section, and keys that its cases must have; in the order of the page."""

_TABLE_WIDTH = 140
_ABSENT = {
    "serve": "Not measured here: a served model (mmtok bench serve), so this page does not show the gains of a server.",
    "quality": "Not measured here: the quality of answers (mmtok quality).",
    "selector": "Not measured here: the selection by itself (mmtok bench selector).",
}


@dataclass(frozen=True, slots=True)
class Chapter:
    """One machine's sections, or the comparison of two commits."""

    title: str
    facts: tuple[tuple[str, str], ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The content of a report.

    Args:
        title: Title of the page.
        headlines: The first tables, over all machines.
        notes: What was not measured, and what was left out.
        chapters: One for each machine, GPUs first; then the comparison of commits, if there is one.
    """

    title: str
    headlines: tuple[Table, ...]
    notes: tuple[str, ...]
    chapters: tuple[Chapter, ...]


def make_report(rows: pd.DataFrame, notes: Sequence[str] = (), compared: tuple[str, str] | None = None) -> Report:
    """Returns the report of rows; a case that was measured more than once is shown by its newest row.

    Args:
        rows: Result of `frame_of`.
        notes: Sentences on what was left out when reading.
        compared: Two commits to compare, the older first.

    Raises:
        ValueError: A row lacks a key that its bench needs, or a commit has no rows.
    """
    machines = sorted(dict.fromkeys(rows["machine"]), key=is_cpu)
    chapters = []
    for machine in machines:
        chosen = rows[rows["machine"] == machine]
        chapters.append(Chapter(machine, _facts(chosen), tuple(_parts(chosen))))
    headlines = _headlines(chapters)
    if compared is not None:
        chapters.append(Chapter("Two commits", (), (compare_commits(rows, *compared),)))
    title = "What MMTok gains: benchmark report"
    return Report(title, headlines, (*_notes(rows, machines), *notes), tuple(chapters))


def to_markdown(report: Report) -> str:
    """Returns the report's tables and sentences as GitHub-flavoured Markdown, without the plots."""
    paragraphs = [f"# {report.title}", *(table.to_markdown() for table in report.headlines), *report.notes]
    for chapter in report.chapters:
        paragraphs.append(f"## {chapter.title}")
        if chapter.facts:
            paragraphs.append("\n".join(f"- {name}: {value}" for name, value in chapter.facts))
        for part in chapter.parts:
            paragraphs += [f"### {part.title}", *part.sentences, *(table.to_markdown() for table in part.tables)]
    return "\n\n".join(paragraphs) + "\n"


def print_rows(rows: Sequence[ResultRow], console: Console) -> None:
    """Prints the tables and sentences of rows that were just measured, without the detailed tables."""
    if not rows:
        return
    # A narrower terminal wraps the lines, so that no figure is cut.
    wide = Console(file=console.file, highlight=False, width=max(console.width, _TABLE_WIDTH))
    for part in _parts(frame_of(rows)):
        for table in part.tables:
            if not table.is_detail:
                wide.print(table.to_rich())
        for sentence in part.sentences:
            console.print(sentence, markup=False, soft_wrap=True)


def _parts(rows: pd.DataFrame) -> Iterator[Part]:
    """Yields the sections of one machine's rows."""
    benches = [*(bench for bench in SECTIONS if bench in set(rows["bench"])), *dict.fromkeys(rows["bench"])]
    for bench in dict.fromkeys(benches):
        chosen = rows[rows["bench"] == bench]
        part, keys = SECTIONS.get(bench, (_plain_part, ()))
        for key in keys:
            lacking = chosen[[key not in case for case in chosen["case"]]]
            if len(lacking):
                raise ValueError(f"a row of {bench} has no {key!r} in {', '.join(dict.fromkeys(lacking['file']))}")
        if bench == "quality" and "serve" in benches:
            yield quality_part(chosen, rows[rows["bench"] == "serve"])
        else:
            yield part(chosen)


def _plain_part(rows: pd.DataFrame) -> Part:
    rows = newest(rows)
    keys, names = names_in(rows, "case"), names_in(rows, "metrics")
    lines = tuple(
        (
            line["backend"],
            *(str(line["case"].get(key, "")) for key in keys),
            *(format_value(name, line["metrics"].get(name)) for name in names),
        )
        for line in records(rows)
    )
    columns = ("backend", *(key.replace("_", " ") for key in keys), *(metric(name).label for name in names))
    title = str(rows["bench"].iloc[0]).replace("-", " ").capitalize()
    return Part(title, tables=(Table(title, columns, lines, num_texts=1 + len(keys)).without_empty_columns(),))


def _facts(rows: pd.DataFrame) -> tuple[tuple[str, str], ...]:
    versions: dict[str, list[str]] = {}
    for found in rows["versions"]:
        for name, version in found.items():
            versions.setdefault(name, []).append(version)
    days = sorted({time[:10] for time in rows["time"]})
    device = rows["device"].iloc[0]
    facts = {
        "Device": device,
        "Threads": str(rows["num_threads"].iloc[0]) if is_cpu(device) else "",
        "Measured": days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
        "Commit": in_words([commit for commit in dict.fromkeys(rows["commit"]) if commit]),
        "Versions": ", ".join(f"{name} {in_words(list(dict.fromkeys(each)))}" for name, each in versions.items()),
    }
    return tuple((name, value) for name, value in facts.items() if value)


def _headlines(chapters: Sequence[Chapter]) -> tuple[Table, ...]:
    """Returns a headline table for each benchmark; with several machines, its first column is the machine."""
    tables: dict[str, list[tuple[str, Table]]] = {}
    for chapter in chapters:
        for part in chapter.parts:
            if part.headline is not None:
                tables.setdefault(part.headline.title, []).append((chapter.title, part.headline))
    return tuple(each[0][1] if len(chapters) == 1 else _merged(each) for each in tables.values())


def _merged(tables: Sequence[tuple[str, Table]]) -> Table:
    """Returns the merged table; a column that a machine's table lacks is empty in its rows."""
    widest = max((table for _, table in tables), key=lambda table: len(table.columns))
    columns = list(dict.fromkeys(column for table in (widest, *dict(tables).values()) for column in table.columns))
    rows = []
    for machine, table in tables:
        for row in table.rows:
            cells = dict(zip(table.columns, row, strict=True))
            rows.append((machine, *(cells.get(column, "") for column in columns)))
    num_texts = widest.num_texts + 1
    return replace(widest, columns=("machine", *columns), rows=tuple(rows), num_texts=num_texts, is_grouped=True)


def _notes(rows: pd.DataFrame, machines: Sequence[str]) -> list[str]:
    notes = []
    if all(map(is_cpu, machines)):
        notes.append("No row was measured on a GPU: all figures are of a CPU.")
    notes += [note for bench, note in _ABSENT.items() if bench not in set(rows["bench"])]
    older = len(rows) - len(newest(rows))
    if older:
        notes.append(f"{older} older row{'s' if older > 1 else ''} of repeated cases are left out.")
    return notes
