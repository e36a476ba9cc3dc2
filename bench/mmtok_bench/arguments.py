"""Argument types and options that the benchmarks' command lines share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mmtok_bench.mixed_budget import MixedBudget
from mmtok_deploy.budget import Budget

__all__ = [
    "add_run_arguments",
    "budget",
    "count",
    "each",
    "image_size",
    "minutes",
    "mixed_budget",
    "one_of",
    "port",
    "runs",
    "seed",
    "shape",
]

_T = TypeVar("_T")


def add_run_arguments(parser: Any, folder: str, *, with_resume: bool = True) -> None:
    """Adds --results-dir, --resume and --json.

    Args:
        parser: An argparse parser or a group of one.
        folder: The default of --results-dir.
        with_resume: Whether the benchmark can continue an earlier run.
    """
    parser.add_argument(
        *("--results-dir", "--output"),
        type=Path,
        default=Path(folder),
        metavar="FOLDER",
        help=f"folder for a new file of rows, and for logs and models (default {folder})",
    )
    if with_resume:
        parser.add_argument(
            "--resume", type=Path, metavar="FILE.jsonl", help="continue an earlier run; its rows are not measured again"
        )
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, one object per line")


def each(parse: Callable[[str], _T]) -> Callable[[str], list[_T]]:
    """Returns a parser of a comma-separated list of values."""

    def parse_list(text: str) -> list[_T]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not parts:
            raise argparse.ArgumentTypeError(f"expected values with commas between, got {text!r}")
        return [parse(part) for part in parts]

    return parse_list


def one_of(*names: str) -> Callable[[str], str]:
    """Returns a parser that accepts one of these names."""

    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(names)}, got {text!r}")
        return text

    return parse


def count(text: str, *, least: int = 1) -> int:
    """Returns a whole number of at least `least`."""
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def port(text: str) -> int:
    """Returns a port number; 0 stands for any free port."""
    if not (text.isascii() and text.isdigit() and int(text) < 1 << 16):
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return int(text)


runs, seed = partial(count, least=2), partial(count, least=0)
"""Parsers of a number of timed runs, of which quantiles need 2, and of a seed."""


def minutes(text: str) -> float:
    """Returns a number of minutes above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, got {text!r}")
    return number


def budget(text: str) -> str:
    """Returns a budget as --mmtok-budget takes it."""
    try:
        return str(Budget.parse(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def mixed_budget(text: str) -> str:
    """Returns a budget as `MixedBudget` reads it (10%@0.5~8), but not `auto`: loads ask no real questions."""
    try:
        mixed = MixedBudget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if mixed.is_auto:
        raise argparse.ArgumentTypeError(
            "the budget auto depends on the question, and loads have no real questions: name a share"
        )
    return str(mixed)


def image_size(text: str) -> tuple[int, int]:
    """Returns width and height in pixels."""
    width, separator, height = text.partition("x")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected width x height in pixels, such as 1008x672, got {text!r}")
    return count(width), count(height)


def shape(text: str) -> tuple[int, int]:
    """Returns the number of tokens of an image and the number of picks."""
    num_tokens, separator, num_picks = text.partition("x")
    if not separator or count(num_picks) > count(num_tokens):
        raise argparse.ArgumentTypeError(f"expected tokens x picks, such as 2880x160, no more picks: got {text!r}")
    return int(num_tokens), int(num_picks)
