"""Errors at the start of a server: on the command line one message and exit code 2, for `sgl.Engine` an exception."""

from __future__ import annotations

import argparse
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NoReturn

from mmtok_deploy.environment import is_set

__all__ = [
    "FlagError",
    "end_controller",
    "end_main_process",
    "end_start",
    "ends_scheduler_start",
    "ends_start",
    "naming_flags",
    "warn_of_environment",
    "without_usage",
]

logger = logging.getLogger(__name__)

_WRONG_USE = 2
"""The exit code of a wrong use of a command."""
# A rank that has nothing to say is ended by the one that has; by itself after so long.
_END_TIMEOUT_S = 10.0
_POLL_INTERVAL_S = 0.1


class FlagError(ValueError):
    """A flag with a value that cannot be served."""


def end_start(error: object) -> NoReturn:
    """Prints an error that the user can mend and ends the process: a traceback would bury the message.

    Raises:
        SystemExit: With exit code 2, as for any wrong use of a command.
    """
    # On its way out SGLang says how it ends: the message is to be the last line.
    logging.getLogger("sglang.srt.utils.common").setLevel(logging.WARNING)
    _print_error(error, "--mmtok-budget")
    raise SystemExit(_WRONG_USE)


def _print_error(error: object, flag: str) -> None:
    message = str(error)
    has_flag = message.startswith("--") or "--mmtok" in message
    print(f"error: {message if has_flag else f'{flag}: {message}'}", file=sys.stderr, flush=True)


@contextmanager
def ends_start(on_command_line: bool) -> Iterator[None]:
    """Ends the process for an error of the plugin's checks, on the command line; elsewhere the error is raised."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if not on_command_line:
            raise
        end_start(error)


@contextmanager
def ends_scheduler_start(on_command_line: bool, flag: str) -> Iterator[None]:
    """Ends the scheduler process for an error of the block, on the command line; elsewhere the error is raised.

    Every rank of a tensor-parallel group must come here. Where all of them fail, the first says why, of the first group
    that comes so far, and ends all. Nothing is sent to the main process, which SGLang would have end itself by SIGKILL:
    it sees the exit code (`end_main_process`).

    Args:
        on_command_line: Whether the server was started there.
        flag: Named by the message, if it names none.
    """
    from mmtok_sglang.failures import RankError, failed_on_all_ranks, kill_other_ranks
    from mmtok_sglang.ranks import is_first_rank

    error = None
    try:
        yield
    except (ValueError, RuntimeError) as caught:
        if not on_command_line:
            raise
        error = caught
    if not on_command_line:
        return
    try:
        if not failed_on_all_ranks(None if error is None else str(error)):
            return
        says_why = is_first_rank()
    except RankError:
        says_why = error is not None
    with socket.socket(socket.AF_UNIX) as claim:
        if says_why and _is_first_claim(claim):
            _print_error(error, flag)
            kill_other_ranks()
        else:
            time.sleep(_END_TIMEOUT_S)
        # Not by an exception, which SGLang would log with its traceback; nor by the usual way out, on which threads and
        # other ranks are waited for.
        os._exit(_WRONG_USE)


def _is_first_claim(claim: socket.socket) -> bool:
    """True in one of the processes that one process has started: an abstract name is taken once."""
    try:
        claim.bind(f"\0mmtok-start-{os.getppid()}")
    except OSError:
        return False
    return True


def end_main_process(original: Callable[..., Any], pipe_readers: list[Any], processes: list[Any]) -> Any:
    """Waits for the schedulers as SGLang does; where one has ended with a message, this process ends likewise.

    Raises:
        SystemExit: With exit code 2.
    """
    try:
        return original(pipe_readers, processes)
    except RuntimeError:
        # The one that says why has killed the others just before its end.
        deadline_s = time.monotonic() + 1.0
        for process in processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
        if all(process.exitcode != _WRONG_USE for process in processes):
            raise
    logging.getLogger("sglang.srt.utils.common").setLevel(logging.WARNING)
    raise SystemExit(_WRONG_USE)


def end_controller(original: Callable[..., None], controller: Any, *args: Any, **kwargs: Any) -> None:
    """Starts a group of ranks as SGLang's data-parallel controller does, and ends with them as `end_main_process` does.

    SGLang waits for what the ranks send, in a thread a group, and so without an end for one that has ended.
    """

    def watch() -> None:
        while is_starting:
            if any(process.exitcode == _WRONG_USE for process in list(controller.scheduler_procs)):
                os._exit(_WRONG_USE)
            time.sleep(_POLL_INTERVAL_S)

    is_starting = True
    threading.Thread(target=watch, daemon=True).start()
    try:
        original(controller, *args, **kwargs)
    except EOFError:
        # The pipe of a rank that ends closes before its exit code is there, for which `watch` waits.
        time.sleep(_END_TIMEOUT_S)
        raise
    finally:
        is_starting = False


@contextmanager
def naming_flags(fields: Collection[str]) -> Iterator[None]:
    """Names a flag in the errors of classes that know no flags: "tv_temp is ..." becomes "--mmtok-tv-temp is ...".

    Args:
        fields: Names of the server's arguments, `mmtok_tv_temp` among them.

    Raises:
        FlagError: For a ValueError of the block.
    """
    try:
        yield
    except ValueError as error:
        message = str(error).replace("a budget's minimum", "min_tokens")
        found = re.match(r"[a-z0-9_]+\b", message)
        if found and f"mmtok_{found[0]}" in fields:
            message = f"--mmtok-{found[0].replace('_', '-')}{message[found.end() :]}"
        raise FlagError(message) from None


@cache
def warn_of_environment(fields: tuple[str, ...]) -> None:
    """Warns, once a process, of variables such as MMTOK_BUDGET: there are none, so they would do nothing unseen.

    Args:
        fields: Names of the server's arguments, `mmtok_budget` among them.
    """
    for name in fields:
        if name.startswith("mmtok_") and is_set(name.upper()):
            flag = "--" + name.replace("_", "-")
            logger.warning("MMTok: the environment variable %s is not read: use %s", name.upper(), flag)


def without_usage(parser: argparse.ArgumentParser) -> None:
    """Has an argument parser report errors of --mmtok flags without SGLang's usage, which is hundreds of lines."""
    original: Callable[[str], NoReturn] = parser.error

    def error(message: str) -> NoReturn:
        if "--mmtok" in message:
            parser.exit(2, f"{parser.prog}: error: {message}\n")
        original(message)

    parser.error = error  # type: ignore[method-assign]
