"""One run of a benchmark: rows, progress, output and exit code."""

from __future__ import annotations

import contextlib
import fcntl
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from weakref import WeakValueDictionary

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mmtok_bench.client import MeasurementError
from mmtok_bench.process_tree import sigterm_raises_exit
from mmtok_bench.results import (
    CaseValue,
    ResultRow,
    append_row,
    current_commit,
    drop_unfinished_line,
    new_result_file,
    read_rows,
)

__all__ = ["INTERRUPTED", "Run", "progress_bar", "quiet_transformers", "run_command"]

INTERRUPTED = 130
"""The exit code after Ctrl-C."""

# Steps take different times: the remaining time is estimated from the last two minutes.
_SPEED_PERIOD_S = 120.0


class _Claim:
    """An exclusive lock on a file, until the last reference to it is gone or the process ends."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(
                f"another run writes to {path}, and both would measure the same: wait until it ends, or stop it"
            ) from None


# One process may continue its own run: `flock` would not let it.
_CLAIMS: WeakValueDictionary[Path, _Claim] = WeakValueDictionary()


class Run:
    """The rows of one run, which are written at once, its progress bar and its output.

    Args:
        bench: Name of the benchmark.
        folder: Folder of the new file of rows; older files are never changed.
        resume: File of an earlier run, which is continued; its rows are not measured again.
        json_output: Print rows as JSON lines, and all else to stderr.

    Raises:
        ValueError: The file to continue does not exist, does not hold rows, or another process is writing to it.
    """

    def __init__(self, bench: str, folder: Path, *, resume: Path | None = None, json_output: bool = False) -> None:
        if resume is not None and not resume.is_file():
            raise ValueError(f"--resume names an earlier run's file of rows, and {resume} is none")
        self.console = Console(highlight=False, stderr=json_output)
        self.path = resume or new_result_file(folder, bench)
        place = self.path.resolve()
        self._claim = _CLAIMS[place] = _CLAIMS.get(place) or _Claim(place)
        if resume is not None and drop_unfinished_line(resume):
            print(f"the last line of {resume} was cut off and is dropped", file=sys.stderr)
        self.rows = read_rows(self.path)
        self.failures: list[str] = []
        # Rows name the commit of now, not one that is made while they are measured.
        current_commit()
        self._json_output = json_output
        self._progress: Progress | None = None

    @property
    def folder(self) -> Path:
        """Folder next to the file of rows, for logs and other programs' output."""
        return self.path.with_suffix("")

    def has(self, **case: CaseValue) -> bool:
        """Returns whether there is a row whose case has these values."""
        return any(case.items() <= row.case.items() for row in self.rows)

    def add(self, row: ResultRow) -> None:
        """Writes a row at once, so that it survives a crash."""
        append_row(self.path, row)
        self.rows.append(row)

    def fail(self, failure: str) -> None:
        """Prints and stores a failure."""
        self.failures.append(failure)
        self.console.print(failure, style="red", markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def steps(self, total: int | None, done: int = 0) -> Iterator[None]:
        """Shows a progress bar of `total` steps while the block runs."""
        with progress_bar(self.console) as self._progress:
            self._progress.add_task("", total=total, completed=done)
            yield
        self._progress = None

    def step(self, text: str, *, always: bool = False) -> None:
        """Shows the current step in the progress bar; on a line of its own without a terminal, or if `always`."""
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], description=text)
        if always or not self.console.is_terminal:
            self.console.print(text, markup=False, soft_wrap=True)

    def advance(self, num_steps: int = 1) -> None:
        """Moves the progress bar on."""
        if self._progress is not None:
            self._progress.advance(self._progress.task_ids[0], num_steps)

    def show(self, rows: Sequence[ResultRow] | None = None) -> None:
        """Prints rows (default: all) as JSON, or as the report's tables and sentences; and the path of their file."""
        shown = self.rows if rows is None else rows
        if self._json_output:
            for row in shown:
                print(json.dumps(asdict(row)))
        else:
            from mmtok_bench.report.document import print_rows

            print_rows(shown, self.console)
        self.console.print(f"Written: {self.path}", markup=False, soft_wrap=True)


def run_command(command: str, work: Callable[[], int], *, stopped: str = "the servers have ended.") -> int:
    """Runs a benchmark and returns its exit code.

    That is the result of `work`; 1 if a server, a request or another program failed, 2 for wrong arguments
    (ValueError), 130 after Ctrl-C. SIGTERM ends the servers too.

    Args:
        command: Prefix of its messages.
        work: Runs the benchmark.
        stopped: Text that is printed after Ctrl-C.
    """
    try:
        with sigterm_raises_exit():
            return work()
    except ValueError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except (MeasurementError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"Stopped; {stopped}", file=sys.stderr)
        return INTERRUPTED


def progress_bar(console: Console, *more_columns: str) -> Progress:
    """Returns a progress bar with steps done, time taken and time left; it disappears at the end.

    Args:
        console: Where it is shown, if that is a terminal.
        *more_columns: Formats of further columns, such as "{task.fields[loss]}".
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
        *(TextColumn(column, markup=False) for column in more_columns),
        console=console,
        transient=True,
        speed_estimate_period=_SPEED_PERIOD_S,
    )


def quiet_transformers() -> None:
    """Turns off Transformers' messages and progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
