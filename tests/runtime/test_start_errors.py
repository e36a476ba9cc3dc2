"""Errors that a plugin finds in scheduler processes: one message, whoever started how many of them."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import setproctitle

from mmtok_sglang.start_errors import end_controller, end_main_process, ends_scheduler_start


def _scheduler(number: int, num_groups: int, log: str) -> None:
    setproctitle.setproctitle(f"sglang::scheduler_DP{number}")
    # All have started before one fails: loading a model takes seconds.
    Path(f"{log}-{number}").touch()
    while not all(Path(f"{log}-{each}").exists() for each in range(num_groups)):
        time.sleep(0.01)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
    with ends_scheduler_start(True, "--mmtok-engine"):
        raise ValueError("the file cannot run")


def _controller(log: str, num_groups: int) -> None:
    """As SGLang's: a process that starts the schedulers, and waits for what they never send."""
    processes: list[Any] = []

    def launch(controller: Any) -> None:
        for number in range(num_groups):
            given = (number, num_groups, log)
            processes.append(multiprocessing.get_context("spawn").Process(target=_scheduler, args=given))
            processes[-1].start()
        time.sleep(240)

    end_controller(launch, SimpleNamespace(scheduler_procs=processes))


@pytest.mark.slow
@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.usefixtures("preloaded_spawns")
def test_schedulers_of_a_controller_end_it_by_one_message(tmp_path: Path, num_groups: int) -> None:
    log = tmp_path / "log"
    log.touch()
    process = multiprocessing.get_context("spawn").Process(target=_controller, args=(str(log), num_groups))
    process.start()
    process.join(240)
    assert process.exitcode == 2
    lines = [line for line in log.read_text().splitlines() if "error" in line]
    assert lines == ["error: --mmtok-engine: the file cannot run"]
    assert [each for each in psutil.process_iter(["ppid"]) if each.info["ppid"] == process.pid] == []


class Process(SimpleNamespace):
    def join(self, timeout: float) -> None:
        """As of one that has ended."""


def test_what_is_no_wrong_use_is_raised() -> None:
    def died(readers: list[Any], processes: list[Any]) -> None:
        raise RuntimeError("scheduler died")

    with pytest.raises(RuntimeError, match="scheduler died"):
        end_main_process(died, [], [Process(exitcode=-9)])
    with pytest.raises(SystemExit) as exit_status:
        end_main_process(died, [], [Process(exitcode=-9), Process(exitcode=2)])
    assert exit_status.value.code == 2


def test_a_controller_whose_ranks_are_ready_goes_on() -> None:
    controller = SimpleNamespace(scheduler_procs=[SimpleNamespace(exitcode=None)])
    end_controller(lambda given: None, controller)
    # What a rank does after that is SGLang's to see.
    controller.scheduler_procs[0].exitcode = 2
    time.sleep(0.3)


def test_elsewhere_than_on_the_command_line_the_error_is_raised() -> None:
    with pytest.raises(ValueError, match="cannot run"), ends_scheduler_start(False, "--mmtok-engine"):
        raise ValueError("the file cannot run")
