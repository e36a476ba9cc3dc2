"""The command line: mmtok."""

from __future__ import annotations

import argparse

from mmtok_deploy import __version__

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code of one mmtok command: 0 ok, 1 a check failed, 2 usage."""
    parser = argparse.ArgumentParser(prog="mmtok", description="MMTok vision-token selection, made deployable.")
    parser.add_argument("--version", action="version", version=f"mmtok-deploy {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="what is installed, what works here, and what to do about the rest")
    doctor.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    commands.add_parser("demo", help="serve a photograph with and without a budget, and show what changes")
    arguments = parser.parse_args(argv)
    if arguments.command == "doctor":
        from mmtok_deploy.doctor import run_doctor

        return run_doctor(json_output=arguments.json)
    from mmtok_deploy.bench.demo import run_demo

    return run_demo()
