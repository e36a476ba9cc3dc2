"""Rows from files, with where they come from: their run, their machine, the newest of each case."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mmtok_bench.results import CaseValue, ResultRow, UnfinishedRowWarning, read_rows

__all__ = ["Machine", "Measurement", "by_machine", "newest", "read_results"]

CaseKey = frozenset[tuple[str, CaseValue]]


class Machine(NamedTuple):
    """What rows are put side by side for: the device, and the threads where it is a CPU."""

    device: str
    num_threads: int

    @property
    def is_cpu(self) -> bool:
        """Whether the rows were measured without a GPU: a CPU's name ends in its cores."""
        return re.search(r", \d+ cores$", self.device) is not None

    def __str__(self) -> str:
        threads = f", {self.num_threads} thread{'s' if self.num_threads > 1 else ''}"
        return self.device + (threads if self.is_cpu else "")


class Run(NamedTuple):
    """Rows that may be held against one another: of one file, machine and commit."""

    file: str
    machine: Machine
    commit: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """A row and the file it is from."""

    row: ResultRow
    file: str

    @property
    def machine(self) -> Machine:
        """Where it was measured."""
        # A GPU's rows are its own, however many threads fed it.
        machine = Machine(self.row.device, self.row.num_threads)
        return machine if machine.is_cpu else Machine(self.row.device, 0)

    @property
    def run(self) -> Run:
        """What it may be compared within."""
        return Run(self.file, self.machine, self.row.commit)

    @property
    def case(self) -> tuple[str, CaseKey, str]:
        """What was measured: bench, case, backend."""
        return self.row.bench, frozenset(self.row.case.items()), self.row.backend


def read_results(paths: Sequence[Path]) -> tuple[list[Measurement], list[str]]:
    """Returns the rows of files, and of the .jsonl files below folders; and a sentence on each line that was cut off.

    What a run left in a folder of its own, `x/` beside `x.jsonl`, is another program's output: only its rows are read.

    Raises:
        ValueError: A file that is missing or holds something else, or not one row in all of them.
    """
    measurements: list[Measurement] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UnfinishedRowWarning)
        for path in _files(paths):
            measurements += [Measurement(row, str(path)) for row in read_rows(path)]
    if not measurements:
        raise ValueError(f"there is no row in {', '.join(map(str, paths))}: the measuring was ended before its first")
    return measurements, [str(each.message) for each in caught if each.category is UnfinishedRowWarning]


def by_machine(measurements: Iterable[Measurement]) -> dict[Machine, list[Measurement]]:
    """Returns the measurements of each machine, GPUs first."""
    machines: dict[Machine, list[Measurement]] = {}
    for each in measurements:
        machines.setdefault(each.machine, []).append(each)
    return dict(sorted(machines.items(), key=lambda item: item[0].is_cpu))


def newest(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Returns the last measurement of each case, in the order in which the cases came first."""
    kept: dict[tuple[Machine, tuple[str, CaseKey, str]], Measurement] = {}
    for each in measurements:
        key = each.machine, each.case
        if key not in kept or each.row.time >= kept[key].row.time:
            kept[key] = each
    return list(kept.values())


def _files(paths: Sequence[Path]) -> list[Path]:
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} does not exist; expected a file of result rows, or a folder of them")
        found = _rows_below(path) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"there is no .jsonl file in {path}")
        # A file named twice counts once.
        files.update({each.resolve(): each for each in found})
    return list(files.values())


def _rows_below(folder: Path) -> list[Path]:
    found = []
    for path in sorted(folder.rglob("*.jsonl")):
        between = path.parents[: len(path.relative_to(folder).parts) - 1]
        if not any(each.with_name(f"{each.name}.jsonl").is_file() for each in between):
            found.append(path)
    return found
