"""Compares the rows of two commits that have the same case and machine, and lists cases that only one commit has."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mmtok_bench.report.frame import newest, records
from mmtok_bench.report.metrics import compare, format_value, metric
from mmtok_bench.report.tables import Part, Table

__all__ = ["compare_commits"]

_COMPARED = (
    *("ttft_p50_ms", "itl_p50_ms", "requests_per_s", "output_tokens_per_s", "peak_memory_bytes"),
    *("max_requests_at_once", "latency_p50_ms", "accuracy"),
)


def compare_commits(rows: pd.DataFrame, old: str, new: str) -> Part:
    """Returns the section that compares the newest rows of the commits `new` and `old`.

    Raises:
        ValueError: There is no row of a commit, or its name is a prefix of several commits.
    """
    commits = [_resolve(rows, commit) for commit in (old, new)]
    if commits[0] == commits[1]:
        raise ValueError(f"expected two commits to compare, got {commits[0]} twice")
    of_old, of_new = (
        {(line["machine"], line["case_id"]): line for line in records(newest(rows[rows["commit"] == commit]))}
        for commit in commits
    )
    among = [*of_old.values(), *of_new.values()]
    lines, alone = [], []
    for key, line in of_new.items():
        before, after = of_old[key]["metrics"] if key in of_old else {}, line["metrics"]
        for name in _COMPARED:
            if name in before and name in after:
                values = (format_value(name, before[name]), format_value(name, after[name]))
                ratio = compare(name, after[name], before[name])
                lines.append((line["machine"], line["bench"], _case(line, among), metric(name).label, *values, ratio))
    for one, other, commit in ((of_old, of_new, commits[0]), (of_new, of_old, commits[1])):
        for key, line in one.items():
            if key not in other:
                alone.append((line["machine"], line["bench"], _case(line, among), commit))
    tables: list[Table] = []
    if lines:
        headings = ("machine", "bench", "case", "metric", *commits, f"{commits[1]} is")
        tables.append(Table("Cases of both commits", headings, tuple(lines), 4).without_empty_columns())
    if alone:
        columns = ("machine", "bench", "case", "commit")
        tables.append(Table("In one commit alone", columns, tuple(alone), num_texts=4, is_detail=True))
    nothing = f"No case was measured at both {commits[0]} and {commits[1]} on the same machine."
    return Part(f"{commits[1]} against {commits[0]}", sentences=() if lines else (nothing,), tables=tuple(tables))


def _case(line: dict[str, Any], among: list[dict[str, Any]]) -> str:
    """Returns the backend, and the parts of the case that differ between the rows of its bench."""
    cases = [other["case"] for other in among if other["bench"] == line["bench"]]
    told = {key: value for key, value in line["case"].items() if any(case.get(key) != value for case in cases)}
    return ", ".join([line["backend"], *(f"{key.replace('_', ' ')} {value}" for key, value in told.items())])


def _resolve(rows: pd.DataFrame, commit: str) -> str:
    """Returns a commit's name as the rows have it; it may be given in fewer or more digits."""
    known = [name for name in dict.fromkeys(rows["commit"]) if name]
    # "+" marks a checkout whose files differ from the commit, and counts.
    digits = commit.rstrip("+")
    close = [name for name in known if name == commit] or [
        name
        for name in known
        if name.endswith("+") == commit.endswith("+")
        and (name.startswith(digits) or digits.startswith(name.rstrip("+")))
    ]
    if len(close) != 1:
        names = ", ".join(known) or "without a commit"
        raise ValueError(f"{commit!r} names {len(close)} commits of these rows, expected one; there are: {names}")
    return str(close[0])
