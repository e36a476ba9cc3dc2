"""A report before it is written: what leads it, and a chapter a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmtok_bench.report.blocks import Part, Table, in_words
from mmtok_bench.report.commits import compare_commits
from mmtok_bench.report.gather import Machine, Measurement, by_machine, newest
from mmtok_bench.report.sections import SECTIONS, make_parts

__all__ = ["Chapter", "Report", "make_report"]

_ABSENT = {
    "serve": "Not measured here: a served model (mmtok bench serve). Nothing on this page says what a server gains.",
    "quality": "Not measured here: what pruning costs in answers (mmtok quality).",
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
    """What a page says.

    Args:
        headlines: The tables that lead it, over all machines.
        notes: What was not measured, and what was left out.
        chapters: One a machine, then the comparison of commits if there is one.
    """

    title: str
    headlines: tuple[Table, ...]
    notes: tuple[str, ...]
    chapters: tuple[Chapter, ...]


def make_report(
    measurements: Sequence[Measurement], notes: Sequence[str] = (), compared: tuple[str, str] | None = None
) -> Report:
    """Returns the report of rows.

    Args:
        measurements: The rows; of a case measured more than once, the newest is shown.
        notes: Sentences on what was left out in reading.
        compared: Two commits, the older first, to hold against each other.

    Raises:
        ValueError: Rows that lack what their bench's rows have, or commits that are not there.
    """
    machines = by_machine(measurements)
    chapters = [
        Chapter(str(machine), _facts(machine, rows), tuple(make_parts(rows))) for machine, rows in machines.items()
    ]
    headlines = _headlines(chapters)
    if compared is not None:
        part = compare_commits(measurements, *compared)
        chapters.append(Chapter("Two commits", (), (part,)))
    return Report(
        "What MMTok gains: benchmark report", headlines, (*_notes(measurements, machines), *notes), tuple(chapters)
    )


def _facts(machine: Machine, measurements: Sequence[Measurement]) -> tuple[tuple[str, str], ...]:
    rows = [each.row for each in measurements]
    versions: dict[str, list[str]] = {}
    for row in rows:
        for name, version in row.versions.items():
            versions.setdefault(name, []).append(version)
    shown = [f"{name} {in_words(list(dict.fromkeys(each)))}" for name, each in versions.items()]
    days = sorted({row.time[:10] for row in rows})
    facts = {
        "Device": machine.device,
        "Threads": str(machine.num_threads) if machine.is_cpu else "",
        "Measured": days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}",
        "Commit": in_words([commit for commit in dict.fromkeys(row.commit for row in rows) if commit]),
        "Versions": ", ".join(shown),
    }
    return tuple((name, value) for name, value in facts.items() if value)


def _headlines(chapters: Sequence[Chapter]) -> tuple[Table, ...]:
    """Returns the chapters' headlines, those of one bench as one table whose first column is the machine."""
    tables: dict[str, list[tuple[str, Table]]] = {}
    for chapter in chapters:
        for part in chapter.parts:
            if part.headline is not None:
                tables.setdefault(part.headline.title, []).append((chapter.title, part.headline))
    return tuple(each[0][1] if len(chapters) == 1 else _merged(each) for each in tables.values())


def _merged(tables: Sequence[tuple[str, Table]]) -> Table:
    """Returns one table; a column that a machine's table lacks is empty in its rows."""
    widest = max((table for _, table in tables), key=lambda table: len(table.columns))
    columns = list(
        dict.fromkeys(column for table in (widest, *(table for _, table in tables)) for column in table.columns)
    )
    rows = []
    for machine, table in tables:
        for row in table.rows:
            cells = dict(zip(table.columns, row, strict=True))
            rows.append((machine, *(cells.get(column, "") for column in columns)))
    num_texts = widest.num_texts + 1
    return replace(widest, columns=("machine", *columns), rows=tuple(rows), num_texts=num_texts, is_grouped=True)


def _notes(measurements: Sequence[Measurement], machines: dict[Machine, list[Measurement]]) -> list[str]:
    benches = {each.row.bench for each in measurements}
    notes = []
    if all(machine.is_cpu for machine in machines):
        notes.append("No row of these was measured on a GPU: every figure here is a CPU's.")
    notes += [_ABSENT[bench] for bench in SECTIONS if bench not in benches]
    older = len(measurements) - len(newest(measurements))
    if older:
        notes.append(f"{older} older row{'s' if older > 1 else ''} of cases measured again: the newest are shown.")
    return notes
