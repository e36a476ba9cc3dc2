"""The command line of `mmtok soak`; imports nothing slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from mmtok_bench.arguments import add_run_arguments, each, minutes, one_of
from mmtok_bench.families import FamilyName

__all__ = ["add_soak_parser"]

_FAMILIES = get_args(FamilyName)
_SOAKED = ("qwen2.5-vl", "llava-1.5")


def add_soak_parser(commands: Any) -> None:
    """Adds `mmtok soak` to the command line's parser."""
    soak = commands.add_parser(
        "soak",
        help="inject faults into real servers, and check that they go on serving",
        description="Injects faults into servers of tiny models and checks what holds afterwards: docs/reliability.md. "
        "Traffic goes to this machine only.",
    )
    soak.set_defaults(run="mmtok_soak.command:run_soak")
    soak.add_argument("--rows", type=each(str), help="some of the table's rows: fuzz,storm (default: all)")
    soak.add_argument(
        "--families",
        type=each(one_of(*_FAMILIES)),
        default=list(_SOAKED),
        help=f"some of {','.join(_FAMILIES)} (default {','.join(_SOAKED)})",
    )
    soak.add_argument(
        "--minutes",
        type=minutes,
        default=5.0,
        help="minutes of faults, without the servers' starts; 30 runs every row in full (default 5)",
    )
    soak.add_argument("--seed", type=int, default=0, help="seed of all random choices (default 0)")
    add_run_arguments(soak, "artifacts/soak", with_resume=False)
    soak.add_argument("--list", action="store_true", help="print the rows' names and what they do, and stop")
    soak.add_argument(
        "--write-table",
        nargs="+",
        type=Path,
        metavar="FILE.jsonl",
        help="write the table of docs/reliability.md from files of rows, and stop",
    )
    soak.add_argument("--page", type=Path, default=Path("docs/reliability.md"), help="default docs/reliability.md")
