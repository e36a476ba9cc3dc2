"""The progress bar of everything that takes longer than a few seconds."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["progress_bar"]

# Steps are uneven: the time that is left is guessed from the last two minutes.
_SPEED_PERIOD_S = 120.0


def progress_bar(console: Console, *more_columns: str) -> Progress:
    """Returns a progress display with the steps done, the time taken and the time left; it is gone when it ends.

    Args:
        console: Where it is shown, if that is a terminal.
        *more_columns: Formats of further columns, such as "{task.fields[loss]}".
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *(TextColumn(column, markup=False) for column in more_columns),
        console=console,
        transient=True,
        speed_estimate_period=_SPEED_PERIOD_S,
    )
