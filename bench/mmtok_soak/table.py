"""Writes the fault table of docs/reliability.md from rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmtok_bench.results import ResultRow, read_rows
from mmtok_soak.faults import ROWS
from mmtok_soak.storm import MIN_JUDGED

__all__ = ["fault_table", "write_table"]

_BEGIN, _END = "<!-- the fault table begins -->", "<!-- the fault table ends -->"
_NOT_COUNTED = ("num_failures", "num_fixed_chats")


def write_table(files: Sequence[Path], page: Path) -> None:
    """Writes the table of these files' rows between the page's two marks; the last row of a name and family is used.

    Raises:
        ValueError: The files have no rows of `mmtok soak`, or the page does not have the marks.
        OSError: A file cannot be read.
    """
    rows = [row for file in files for row in read_rows(file) if row.bench == "soak"]
    if not rows:
        raise ValueError(f"there is no row of `mmtok soak` in {', '.join(map(str, files))}")
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {_BEGIN} and {_END}, between which the table is written")
    page.write_text(f"{before}{begin}\n\n{fault_table(rows)}\n\n{end}{after}", encoding="utf-8")


def fault_table(rows: Sequence[ResultRow]) -> str:
    """Returns the table as Markdown: a line for each fault, with counts and failures of each family.

    A fault without a row is listed as not run.
    """
    newest = {(str(row.case["row"]), str(row.case["family"])): row for row in rows}
    lines = [
        "| row | fault | how it is injected | what holds afterwards | what was run | what was lost |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        found = {family: result for (of_row, family), result in newest.items() if of_row == name}
        run = "<br>".join(f"{family}: {_counts(result)}" for family, result in found.items()) or "not run"
        lost = "<br>".join(f"{family}: {result.case['lost'] or 'nothing'}" for family, result in found.items())
        lost = lost.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| `{name}` | {row.fault} | {row.injected} | {row.holds} | {run} | {lost} |")
    return "\n".join([*lines, "", _machines(list(newest.values()))])


def _counts(row: ResultRow) -> str:
    counts = [
        f"{value:,.0f} {name.removeprefix('num_').replace('_', ' ')}"
        for name, value in row.metrics.items()
        if name.startswith("num_") and name not in _NOT_COUNTED
    ]
    if "growth_mb_per_1000" in row.metrics:
        is_judged = row.metrics.get("num_requests", 0) >= MIN_JUDGED
        growth = f"{row.metrics['growth_mb_per_1000']:.2f} MB more per 1,000"
        if "growth_error_mb_per_1000" in row.metrics:
            growth += f" (standard error {row.metrics['growth_error_mb_per_1000']:.2f})"
        counts.append(growth if is_judged else "too few for a judgement of memory")
    if "gone_after_s" in row.metrics:
        counts.append(f"gone after {row.metrics['gone_after_s']:.1f} s at most")
    if row.metrics.get("num_fixed_chats"):
        counts.append(f"fixed chats within {row.metrics['largest_difference']:.1e}")
    return ", ".join(counts) or "nothing"


def _machines(rows: Sequence[ResultRow]) -> str:
    devices = sorted({row.device for row in rows})
    versions = sorted({f"SGLang {row.versions.get('sglang', 'unknown')}" for row in rows})
    days = sorted({row.time[:10] for row in rows})
    minutes = sorted({float(row.case["minutes"]) for row in rows})
    commits = sorted({row.commit for row in rows})
    run = ", ".join(f"{each:g}" for each in minutes)
    on_days = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"Run with `--minutes {run}` on {'; '.join(devices)}, {', '.join(versions)}, {on_days}, "
        f"commit {', '.join(commits)}."
    )
