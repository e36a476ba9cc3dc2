"""Ends a process and all its descendants, even when this process is ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]

__all__ = [
    "end_process_tree",
    "is_alive",
    "process_tree",
    "running_process",
    "signals_wait",
    "sigterm_raises_exit",
    "sum_resident_bytes",
]

_POLL_INTERVAL_S = 0.05


def process_tree(session_id: int) -> list[psutil.Process]:
    """Returns the processes of a session and their descendants that still run.

    Processes whose parent has ended are found by their session, those that left the session by their parent.

    Args:
        session_id: PID of a process started with `start_new_session=True`. It must not have been waited for, since
            its PID could then belong to another process.
    """
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if session_id in (process.pid, os.getsid(process.pid)):
                found.update([process, *process.children(recursive=True)])
    return [process for process in found if is_alive(process)]


def is_alive(process: psutil.Process) -> bool:
    """Returns whether a process is there and no zombie."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def end_process_tree(session_id: int, *, grace_s: float) -> None:
    """Ends the processes of a session and their descendants by SIGTERM, and by SIGKILL after `grace_s`.

    An exception during the wait, such as a second Ctrl-C, ends it at once; it is raised when all processes have ended.
    Shared memory that they leave behind is removed.
    """
    segments = _shared_memory_of(session_id)
    try:
        _send(signal.SIGTERM, session_id)
        _wait_until_gone(session_id, grace_s)
        # Python's resource tracker removes files that the others leave behind, then ends by itself.
        _send(signal.SIGKILL, session_id, but="multiprocessing.resource_tracker")
        _wait_until_gone(session_id, grace_s)
    finally:
        # Repeated, since a process may have started another after it was looked up.
        while process_tree(session_id):
            _send(signal.SIGKILL, session_id)
            _wait_until_gone(session_id, grace_s)
        for segment in segments:
            segment.unlink(missing_ok=True)


@contextlib.contextmanager
def sigterm_raises_exit() -> Iterator[None]:
    """Makes SIGTERM leave `with` blocks as Ctrl-C does, unless SIGTERM has a handler already."""

    def raise_exit(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, raise_exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def signals_wait() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM to the end of the block, in which a process is started and stored.

    Otherwise an exception in the middle of the block could leave a process running.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    waiting = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in waiting:
        signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in waiting.items():
            signal.signal(number, handler)
        for each in came:
            signal.raise_signal(each)


@contextlib.contextmanager
def running_process(command: Sequence[str], *, grace_s: float, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Runs a process in a session of its own; at the end of the block, ends it and its descendants.

    Args:
        command: The program and its arguments.
        grace_s: As in `end_process_tree`.
        **options: As in `subprocess.Popen`.
    """
    process = None
    try:
        with signals_wait():
            process = subprocess.Popen(command, start_new_session=True, **options)
        yield process
    finally:
        if process is not None:
            if process.poll() is None:
                end_process_tree(process.pid, grace_s=grace_s)
                process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def sum_resident_bytes(processes: Iterable[psutil.Process]) -> int:
    """Returns the sum of the processes' resident memory; shared pages count several times."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            total += int(process.memory_info().rss)
    return total


def _send(number: signal.Signals, session_id: int, *, but: str | None = None) -> None:
    for process in process_tree(session_id):
        with contextlib.suppress(psutil.NoSuchProcess):
            if but is None or but not in " ".join(process.cmdline()):
                process.send_signal(number)


def _wait_until_gone(session_id: int, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while process_tree(session_id) and time.monotonic() < deadline_s:
        time.sleep(_POLL_INTERVAL_S)


def _shared_memory_of(session_id: int) -> set[Path]:
    """Returns the shared-memory files that only processes of the session have mapped; none without /proc."""
    ours = {process.pid for process in process_tree(session_id)}
    mapped: dict[bool, set[Path]] = {True: set(), False: set()}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            for line in maps.read_text().splitlines():
                path = line.partition("/")[2]
                if path.startswith("dev/shm/") and not path.endswith(" (deleted)"):
                    mapped[int(maps.parent.name) in ours].add(Path("/") / path)
    return mapped[True] - mapped[False]
