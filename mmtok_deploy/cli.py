"""The command line: mmtok."""

from __future__ import annotations

import argparse
import importlib.util
import sys

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
    # Inside, so that every layer may start from here; light, so that --help is quick.
    from mmtok_bench.commands import add_bench_commands
    from mmtok_export.command import add_export_parser

    parser = argparse.ArgumentParser(prog="mmtok", description="MMTok vision-token selection, made deployable.")
    parser.add_argument("--version", action="version", version=f"mmtok-deploy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what is installed, what works here, and what to do about the rest")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    add_bench_commands(commands)
    add_export_parser(commands)
    # Trains the pocket models: beside the packages in a checkout, and in no wheel.
    if importlib.util.find_spec("pocket_training") is not None:
        from pocket_training.command import add_pocket_parser

        add_pocket_parser(commands)
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
            from mmtok_export.command import run_export

            return run_export(arguments)
        case "pocket":
            from pocket_training.command import run_pocket

            return run_pocket(arguments)
        case _:
            from mmtok_bench.commands import run_bench_command

            return run_bench_command(arguments)
