from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil  # type: ignore[import-untyped]
import pytest

from mmtok_bench.process_tree import end_process_tree, process_tree

SLEEP = "import time; time.sleep(300)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
START = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session={session})"


@contextmanager
def started(code: str, num_processes: int) -> Iterator[subprocess.Popen[bytes]]:
    """Runs code in a session of its own, and waits for the processes that it is to start."""
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        deadline_s = time.monotonic() + 30
        while len(process_tree(process.pid)) != num_processes:
            assert time.monotonic() < deadline_s, process_tree(process.pid)
            time.sleep(0.05)
        yield process
    finally:
        for left in process_tree(process.pid):
            left.kill()
        process.wait()


@pytest.mark.parametrize(
    ("code", "num_processes"),
    [
        (SLEEP, 1),
        (f"{START.format(child=SLEEP, session=False)}; {SLEEP}", 2),
        (f"{START.format(child=SLEEP, session=True)}; {SLEEP}", 2),
        (f"{START.format(child=STUBBORN, session=False)}; {STUBBORN}", 2),
    ],
    ids=["one", "child", "child in another session", "deaf to SIGTERM"],
)
def test_everything_ends(code: str, num_processes: int) -> None:
    with started(code, num_processes) as process:
        found = process_tree(process.pid)
        end_process_tree(process.pid, grace_s=0.3)
        assert process_tree(process.pid) == []
        assert [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


def test_an_orphan_ends() -> None:
    with started(START.format(child=SLEEP, session=False), 1) as process:
        # Ended, and not yet reaped: its number is still its own.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        (orphan,) = process_tree(process.pid)
        assert orphan.pid != process.pid
        end_process_tree(process.pid, grace_s=0.3)
        assert process_tree(process.pid) == []
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def test_ctrl_c_while_ending_ends_everything_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with started(f"{START.format(child=STUBBORN, session=False)}; {STUBBORN}", 2) as process:
        monkeypatch.setattr("mmtok_bench.process_tree.time.sleep", interrupt_once())
        with pytest.raises(KeyboardInterrupt):
            end_process_tree(process.pid, grace_s=60)
        assert process_tree(process.pid) == []


def interrupt_once() -> object:
    calls = 0
    sleep = time.sleep

    def interrupt(seconds: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise KeyboardInterrupt
        sleep(seconds)

    return interrupt
