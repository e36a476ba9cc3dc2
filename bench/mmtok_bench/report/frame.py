"""Result rows as a DataFrame, with their file, run and machine."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mmtok_bench.results import ResultRow, UnfinishedRowWarning, read_rows, row_files

__all__ = ["frame_of", "grouped", "is_cpu", "names_in", "newest", "read_results", "records"]


def frame_of(rows: Iterable[ResultRow], file: str = "") -> pd.DataFrame:
    """Returns one line for each row; each key of a case and each metric is a column, NaN if a row has none.

    Further columns: `bench`, `backend`, `device`, `num_threads`, `versions`, `commit`, `time`, `num_runs`, `case` and
    `metrics`, the fields of the row; `file`; `machine`, the device, and for a CPU its threads; `run`, which identifies
    file, machine and commit, since only rows that share these are compared; `case_id`, which identifies benchmark,
    case and backend.
    """
    lines = []
    for row in rows:
        threads = f", {row.num_threads} thread{'s' if row.num_threads > 1 else ''}"
        machine = row.device + (threads if is_cpu(row.device) else "")
        lines.append(
            {
                **row.case,
                **row.metrics,
                **{name: getattr(row, name) for name in ("bench", "backend", "device", "num_threads", "versions")},
                **{name: getattr(row, name) for name in ("commit", "time", "num_runs", "case", "metrics")},
                **{"file": file, "machine": machine, "run": f"{file}\n{machine}\n{row.commit}"},
                "case_id": json.dumps([row.bench, sorted(row.case.items()), row.backend]),
            }
        )
    return pd.DataFrame(lines, dtype=object)


def is_cpu(machine: str) -> bool:
    """Returns whether this is a CPU, whose name ends in its cores, and possibly threads."""
    return re.search(r", \d+ cores(, \d+ threads?)?$", machine) is not None


def records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Returns each line as a dictionary."""
    lines: list[dict[str, Any]] = rows.to_dict("records")
    return lines


def grouped(lines: Sequence[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    """Returns the lines with each value of a key, in order of appearance."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(line[key], []).append(line)
    return groups


def names_in(rows: pd.DataFrame, column: str) -> list[str]:
    """Returns the keys of the dictionaries in a column, "case" or "metrics", in order of appearance."""
    return list(dict.fromkeys(name for values in rows[column] for name in values))


def newest(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the newest row of each case on each machine, in the order in which the cases first appear."""
    keys = ["machine", "case_id"]
    last = rows.sort_values("time", kind="stable").drop_duplicates(keys, keep="last")
    return rows.drop_duplicates(keys)[keys].merge(last, on=keys, how="left")


def read_results(paths: Sequence[Path]) -> tuple[pd.DataFrame, list[str]]:
    """Returns the rows of files, and of the .jsonl files below folders; and a note on each incomplete line.

    A run's folder `x/` beside `x.jsonl` holds output of other programs and is not read.

    Raises:
        ValueError: A file is missing or does not hold rows, or there is no row at all.
    """
    frames = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnfinishedRowWarning)
        for path in _files(paths):
            frames.append(frame_of(read_rows(path), str(path)))
    if all(frame.empty for frame in frames):
        raise ValueError(f"there is no row in {', '.join(map(str, paths))}: the measuring was ended before its first")
    notes = [str(each.message) for each in caught if each.category is UnfinishedRowWarning]
    return pd.concat([frame for frame in frames if not frame.empty], ignore_index=True), notes


def _files(paths: Sequence[Path]) -> list[Path]:
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist; expected a file of result rows, or a folder of them")
        found = row_files(path) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"there is no .jsonl file in {path}")
        # A file named twice counts once.
        files.update({each.resolve(): each for each in found})
    return list(files.values())
