"""The progress bar: steps, and what a command adds to them."""

from io import StringIO

from rich.console import Console

from mmtok_bench.run import progress_bar


def test_steps_and_further_columns_are_shown() -> None:
    out = StringIO()
    with progress_bar(Console(file=out, force_terminal=True, width=120), "{task.fields[loss]}") as progress:
        bar = progress.add_task("a [sum] of steps", total=4, loss="loss 0.25")
        progress.advance(bar, 3)
        progress.refresh()
    shown = out.getvalue()
    for part in ("a [sum] of steps", "3/4", "loss 0.25"):
        assert part in shown


def test_a_file_gets_no_bar() -> None:
    out = StringIO()
    with progress_bar(Console(file=out)) as progress:
        progress.advance(progress.add_task("steps", total=4))
    assert "steps" not in out.getvalue()
