"""The command line: mmtok."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmtok_deploy import Budget, __version__

__all__ = ["main"]

_EXTRAS = {"demo": "bench,sglang", "export": "export"}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of one mmtok command: 0 ok, 1 a check failed, 2 usage."""
    # Inside, so that every layer may start from here; light, so that --help is quick.
    from mmtok_deploy.exporters.command import add_export_parser

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
    add_export_parser(commands)
    arguments = parser.parse_args(argv)
    try:
        return _run(arguments)
    except ModuleNotFoundError as error:
        print(
            f"mmtok {arguments.command} needs {error.name}, which is not installed: "
            f"pip install 'mmtok-deploy[{_EXTRAS[arguments.command]}]'",
            file=sys.stderr,
        )
        return 1


def _run(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "doctor":
            from mmtok_deploy.doctor import run_doctor

            return run_doctor(json_output=arguments.json)
        case "export":
            from mmtok_deploy.exporters.command import run_export

            return run_export(arguments)
        case _:
            from mmtok_deploy.bench.demo import run_demo

            return run_demo(budget=arguments.budget, folder=arguments.folder)


def _budget(text: str) -> str:
    try:
        Budget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text
