"""The progress bar: steps, and what a command adds to them; and one run at a time for a file."""

import fcntl
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mmtok_bench.results import current_commit, make_row
from mmtok_bench.run import Run, progress_bar


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


def test_rows_name_the_commit_at_the_start_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current_commit.cache_clear()
    Run("quality", tmp_path)
    at_start = current_commit()
    monkeypatch.setattr("mmtok_bench.results.subprocess.run", lambda *_, **__: pytest.fail("asked for a later commit"))
    row = make_row("quality", {}, "sglang", {"score": 1.0}, num_runs=1, device=torch.device("cpu"))
    assert row.commit == at_start


def test_a_file_that_another_run_writes_to_is_left_as_it_is(tmp_path: Path) -> None:
    run = Run("quality", tmp_path)
    # This process may go on with its own run; here, as soon as it is gone, another one has the file.
    assert Run("quality", tmp_path, resume=run.path).path == run.path
    path = run.path
    del run
    with path.open("ab") as file:
        file.write(b'{"a row that is being written": ')
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(ValueError, match=r"another run writes to .*: wait until it ends, or stop it"):
            Run("quality", tmp_path, resume=path)
        assert path.read_bytes().startswith(b'{"a row')
    assert Run("quality", tmp_path, resume=path).rows == []
