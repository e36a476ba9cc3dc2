"""The command line: mmtok."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmtok_deploy import Budget, __version__

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of one mmtok command: 0 ok, 1 a check failed, 2 usage."""
    parser = argparse.ArgumentParser(prog="mmtok", description="MMTok vision-token selection, made deployable.")
    parser.add_argument("--version", action="version", version=f"mmtok-deploy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what is installed, what works here, and what to do about the rest")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    demo = commands.add_parser("demo", help="serve a photograph with and without a budget, and show what changes")
    demo.add_argument(
        "--budget", default="10%", type=_budget, help="vision tokens to keep: 64, 10%%, 0.1 (default 10%%)"
    )
    demo.add_argument(
        "--folder", default=Path("artifacts/demo"), type=Path, help="where to write (default artifacts/demo)"
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "doctor":
        from mmtok_deploy.doctor import run_doctor

        return run_doctor(json_output=arguments.json)
    try:
        from mmtok_deploy.bench.demo import run_demo
    except ModuleNotFoundError as error:
        print(
            f"mmtok demo needs {error.name}, which is not installed: pip install 'mmtok-deploy[bench,sglang]'",
            file=sys.stderr,
        )
        return 1
    return run_demo(budget=arguments.budget, folder=arguments.folder)


def _budget(text: str) -> str:
    try:
        Budget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
