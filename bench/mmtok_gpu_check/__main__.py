"""Runs the checks that need an NVIDIA GPU, in parts of a few minutes, and compares each with its bar.

    python -m mmtok_gpu_check --list
    python -m mmtok_gpu_check --dry-run                 # prints the commands, also without a GPU
    python -m mmtok_gpu_check --parts kernels,selector
    python -m mmtok_gpu_check                           # all parts; those that are done are not run again
    python -m mmtok_gpu_check --server-args='--attention-backend triton'   # for all servers

A part is meant to take four minutes on an H200, whose memory holds the servers of a 7B model side by side. On a GPU
with less than 120 GiB one server runs at a time, and each case is measured once. Rows, logs, the table of bars and an
archive of them are written to artifacts/gpu-check. The exit code is 0 if all bars are reached; 1 if a bar is not
reached or not measured, or a command failed; 2 for a wrong argument or without a GPU; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmtok_bench.arguments import each
from mmtok_bench.run import run_command
from mmtok_gpu_check.parts import PARTS, Part
from mmtok_gpu_check.runs import exit_codes_in, judge, memory_gib, print_parts, rows_in, run_part

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a bar is not reached or a command failed, 2 for usage, 130 after Ctrl-C."""
    known = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="mmtok_gpu_check",
        description="Runs the checks that need an NVIDIA GPU, and compares each result with its bar.",
    )
    parser.add_argument("--parts", type=each(str), default=known, help=f"some of {', '.join(known)} (default all)")
    parser.add_argument("--output", type=Path, default=Path("artifacts/gpu-check"), help="folder (default %(default)s)")
    parser.add_argument("--again", action="store_true", help="run finished parts again")
    parser.add_argument("--server-args", default="", metavar="ARGS", help="arguments of all servers")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--dry-run", action="store_true", help="print their commands and bars and stop")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(f"{part.name:16}{part.about}" for part in PARTS))
        return 0
    return run_command("gpu-check", lambda: _run(arguments), stopped="finished parts are kept, and not run again.")


def _run(arguments: argparse.Namespace) -> int:
    known = {part.name: part for part in PARTS}
    unknown = [name for name in arguments.parts if name not in known]
    if unknown:
        raise ValueError(f"--parts takes some of {', '.join(known)}, got {unknown[0]!r}")
    chosen = [known[name] for name in arguments.parts]
    if arguments.dry_run:
        print_parts(chosen, arguments.output, arguments.server_args)
        return 0
    if not torch.cuda.is_available():
        raise ValueError("needs an NVIDIA GPU that PyTorch can use: nothing can be checked here")
    for part in chosen:
        if part.needs_gib > memory_gib():
            print(f"== {part.name} is not run: it needs {part.needs_gib} GiB of GPU memory", flush=True)
            continue
        folder = arguments.output / part.name
        if arguments.again or exit_codes_in(folder) is None:
            run_part(part, folder, arguments.server_args)
    return _report(chosen, arguments.output, arguments.server_args)


def _report(parts: Sequence[Part], folder: Path, server_args: str) -> int:
    table = Table(title=torch.cuda.get_device_name())
    for heading in ("part", "what", "bar", "measured", ""):
        table.add_column(heading)
    verdicts = {True: "pass", False: "[bold red]falls short[/]", None: "[yellow]not measured[/]"}
    is_failed = False
    for part in parts:
        exit_codes = exit_codes_in(folder / part.name)
        if exit_codes is None:
            table.add_row(part.name, f"needs {part.needs_gib} GiB", "", "", "not run")
            continue
        choices = {bar.text for bar in part.bars if bar.is_choice}
        for text, bound, value, is_reached in judge(part, rows_in(part, folder, server_args), exit_codes):
            is_told = text in choices and is_reached is not None
            verdict = ("better" if is_reached else "not better") if is_told else verdicts[is_reached]
            table.add_row(part.name, text, bound, value, verdict)
            is_failed |= not is_told and is_reached is not True
    Console().print(table)
    with (folder / "table.txt").open("w") as file:
        Console(file=file, width=160).print(table)
    archive = folder / "gpu-check.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".jsonl", ".json", ".txt", ".log", ".png") and path.stat().st_size < 8 << 20:
                tar.add(path, path.relative_to(folder))
    print(f"Written: {archive}")
    return int(is_failed)


if __name__ == "__main__":
    sys.exit(main())
