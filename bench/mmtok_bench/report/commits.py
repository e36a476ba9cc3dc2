"""Two commits side by side: the cases that both have, on the same machine, and those that one has alone."""

from __future__ import annotations

from collections.abc import Sequence

from mmtok_bench.report.blocks import Part, Table, without_empty_columns
from mmtok_bench.report.gather import Measurement, newest
from mmtok_bench.report.metrics import compare, format_value, metric

__all__ = ["compare_commits"]

_COMPARED = (
    *("ttft_p50_ms", "itl_p50_ms", "requests_per_s", "output_tokens_per_s", "peak_memory_bytes"),
    *("max_requests_at_once", "latency_p50_ms", "accuracy"),
)


def compare_commits(measurements: Sequence[Measurement], old: str, new: str) -> Part:
    """Returns the section that holds the newest rows of commit `new` against those of `old`.

    Raises:
        ValueError: A commit of which there is no row, or that begins more than one.
    """
    old_commit, new_commit = (_resolve(measurements, commit) for commit in (old, new))
    if old_commit == new_commit:
        raise ValueError(f"expected two commits to compare, got {old_commit} twice")
    of_old, of_new = (
        {(each.machine, each.case): each for each in newest(each for each in measurements if each.row.commit == commit)}
        for commit in (old_commit, new_commit)
    )
    compared = [*of_old.values(), *of_new.values()]
    lines = [
        (str(each.machine), each.row.bench, _case(each, compared), metric(name).label, *_cells(name, of_old[key], each))
        for key, each in of_new.items()
        if key in of_old
        for name in _COMPARED
        if name in each.row.metrics and name in of_old[key].row.metrics
    ]
    alone = [
        (str(each.machine), each.row.bench, _case(each, compared), commit)
        for one, other, commit in ((of_old, of_new, old_commit), (of_new, of_old, new_commit))
        for key, each in one.items()
        if key not in other
    ]
    tables: list[Table] = []
    if lines:
        headings = ("machine", "bench", "case", "metric", old_commit, new_commit, f"{new_commit} is")
        tables.append(without_empty_columns(Table("Cases of both commits", headings, tuple(lines), 4)))
    if alone:
        columns = ("machine", "bench", "case", "commit")
        tables.append(Table("In one commit alone", columns, tuple(alone), num_texts=4, is_detail=True))
    sentence = "" if lines else f"No case was measured at both {old_commit} and {new_commit} on the same machine."
    return Part(f"{new_commit} against {old_commit}", sentences=tuple(filter(None, [sentence])), tables=tuple(tables))


def _cells(name: str, old: Measurement, new: Measurement) -> tuple[str, str, str]:
    old_value, new_value = old.row.metrics[name], new.row.metrics[name]
    return format_value(name, old_value), format_value(name, new_value), compare(name, new_value, old_value)


def _case(each: Measurement, among: Sequence[Measurement]) -> str:
    """Returns the backend, and of the case what is not the same in all of its bench's rows."""
    cases = [other.row.case for other in among if other.row.bench == each.row.bench]
    told = {key: value for key, value in each.row.case.items() if any(case.get(key) != value for case in cases)}
    return ", ".join([each.row.backend, *(f"{key.replace('_', ' ')} {value}" for key, value in told.items())])


def _resolve(measurements: Sequence[Measurement], commit: str) -> str:
    """Returns the rows' name of a commit, which may be given in fewer or more digits."""
    known = list(dict.fromkeys(each.row.commit for each in measurements if each.row.commit))
    # "+" marks a checkout whose files differ from the commit, and counts.
    exact = [name for name in known if name == commit]
    digits, mark = commit.rstrip("+"), "+" * commit.endswith("+")
    close = exact or [
        name
        for name in known
        if name.endswith("+") == bool(mark) and (name.startswith(digits) or digits.startswith(name.rstrip("+")))
    ]
    if len(close) != 1:
        names = ", ".join(known) or "without a commit"
        raise ValueError(f"{commit!r} names {len(close)} commits of these rows, expected one; there are: {names}")
    return close[0]
