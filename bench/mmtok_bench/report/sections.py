"""Which section a bench has: one of its own, or the plain table of its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mmtok_bench.report.blocks import Part, Table, without_empty_columns
from mmtok_bench.report.gather import Measurement, newest
from mmtok_bench.report.metrics import format_value, metric
from mmtok_bench.report.quality import quality_part
from mmtok_bench.report.selector import selector_part
from mmtok_bench.report.serve import serve_part

__all__ = ["SECTIONS", "make_parts"]

SECTIONS: dict[str, Callable[[Sequence[Measurement]], Part]] = {
    "serve": serve_part,
    "quality": quality_part,
    "selector": selector_part,
}
"""In the order of the page; a bench that is not here comes after them."""


def make_parts(measurements: Sequence[Measurement]) -> list[Part]:
    """Returns the sections of one machine's rows.

    Raises:
        ValueError: A row whose case lacks what its bench's rows have.
    """
    benches = list(dict.fromkeys(each.row.bench for each in measurements))
    benches.sort(key=lambda bench: list(SECTIONS).index(bench) if bench in SECTIONS else len(SECTIONS))
    parts = []
    for bench in benches:
        rows = [each for each in measurements if each.row.bench == bench]
        try:
            parts.append(SECTIONS.get(bench, _plain_part)(rows))
        except KeyError as error:
            files = ", ".join(dict.fromkeys(each.file for each in rows))
            raise ValueError(f"a row of {bench} has no {error.args[0]!r} in {files}") from error
    return parts


def _plain_part(measurements: Sequence[Measurement]) -> Part:
    rows = [each.row for each in newest(measurements)]
    keys = list(dict.fromkeys(key for row in rows for key in row.case))
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    lines = tuple(
        (
            row.backend,
            *(str(row.case.get(key, "")) for key in keys),
            *(format_value(name, row.metrics.get(name)) for name in names),
        )
        for row in rows
    )
    columns = ("backend", *(key.replace("_", " ") for key in keys), *(metric(name).label for name in names))
    title = rows[0].bench.replace("-", " ").capitalize()
    return Part(title, tables=(without_empty_columns(Table(title, columns, lines, num_texts=1 + len(keys))),))
