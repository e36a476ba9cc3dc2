"""Errors at the start of a server: on the command line one message and exit code 2, for `sgl.Engine` an exception."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NoReturn

from mmtok_deploy.environment import is_set

__all__ = ["FlagError", "end_start", "ends_start", "naming_flags", "warn_of_environment", "without_usage"]

logger = logging.getLogger(__name__)


class FlagError(ValueError):
    """A --mmtok flag with a value that cannot be served."""


def end_start(error: object) -> NoReturn:
    """Prints an error that the user can mend and ends the process: a traceback would bury the message.

    Raises:
        SystemExit: With exit code 2, as for any wrong use of a command.
    """
    # On its way out SGLang says how it ends: the message is to be the last line.
    logging.getLogger("sglang.srt.utils.common").setLevel(logging.WARNING)
    message = str(error)
    print(f"error: {message if '--mmtok' in message else f'--mmtok-budget: {message}'}", file=sys.stderr, flush=True)
    raise SystemExit(2)


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
