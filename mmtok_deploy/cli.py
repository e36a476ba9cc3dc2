"""The command line: mmtok."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pkgutil import resolve_name

from mmtok_deploy import __version__

__all__ = ["main"]

_EXTRAS = {
    "bench": "bench",
    "demo": "bench,sglang",
    "quality": "bench,sglang",
    "export": "export",
    "pocket": "bench",
    "soak": "dev",
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of one mmtok command: 0 ok, 1 a check failed, 2 usage, 130 Ctrl-C."""
    given = sys.argv[1:] if argv is None else argv
    try:
        return _run(_parser(given).parse_args(given, argparse.Namespace(given=given)))
    except ModuleNotFoundError as error:
        print(
            f"mmtok {given[0]} needs {error.name}, which is not installed: "
            f"pip install 'mmtok-deploy[{_EXTRAS[given[0]]}]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("mmtok: interrupted", file=sys.stderr)
        return 130


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """Returns the parser; for `export` or `doctor` with that command alone, so that nothing slow is imported."""
    parser = argparse.ArgumentParser(prog="mmtok", description="MMTok vision-token selection, made deployable.")
    parser.add_argument("--version", action="version", version=f"mmtok-deploy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    alone = argv[0] if argv and argv[0] in ("doctor", "export") else None
    if alone in (None, "doctor"):
        doctor = commands.add_parser("doctor", help="what is installed, what works here, and what to do about the rest")
        doctor.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    if alone in (None, "export"):
        from mmtok_export.arguments import add_export_parser

        add_export_parser(commands)
    if alone is None:
        from mmtok_bench.commands import add_bench_commands

        add_bench_commands(commands)
        # These are in a checkout, and not in the wheel.
        for add_parser in ("pocket_training.command:add_pocket_parser", "mmtok_soak.arguments:add_soak_parser"):
            if importlib.util.find_spec(add_parser.partition(".")[0]) is not None:
                resolve_name(add_parser)(commands)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "doctor":
            from mmtok_deploy.doctor import run_doctor

            return run_doctor(json_output=arguments.json)
        case "export":
            from mmtok_export.command import run_export

            return run_export(arguments)
        case _:
            from mmtok_bench.commands import run_bench_command

            return run_bench_command(arguments)
