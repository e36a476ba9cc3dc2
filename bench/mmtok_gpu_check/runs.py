"""Runs parts, and compares their rows with the bars."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mmtok_bench.process_tree import running_process
from mmtok_bench.results import ResultRow, append_row, read_rows, row_files
from mmtok_gpu_check.bars import Rows
from mmtok_gpu_check.parts import LARGE_GIB, Part

__all__ = ["DONE", "exit_codes_in", "judge", "memory_gib", "print_parts", "rows_in", "run_part"]

DONE = "done.json"
"""File in a part's folder after it has run: the exit codes of its commands, and the seconds."""

_TIMEOUT_S = 600
_SERVER_ARGS = "--server-args="
_WITH_SERVER_ARGS = (
    "mmtok_gpu_check.served_checks",
    "tests.runtime.device_logprobs",
    "tests.runtime.device_quantised",
)


def judge(part: Part, rows: Rows, exit_codes: Sequence[int]) -> list[tuple[str, str, str, bool | None]]:
    """Returns a line for each bar of a part: text, bound, value, and whether it is reached (None if not measured).

    Args:
        part: The part.
        rows: The part's rows.
        exit_codes: Exit codes of the part's commands; each failed command has a line, too.
    """
    lines: list[tuple[str, str, str, bool | None]] = [
        ("its command", "exit code 0", f"exit code {code}", code == 0)
        for code in exit_codes or [0]
        if code or not part.bars
    ]
    return [*lines, *((bar.text, bar.shown_bound, *bar.judge(rows)) for bar in part.bars)]


def memory_gib() -> float:
    """Returns the GPU's memory; 0 without a GPU."""
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def _filled_in(command: Sequence[str], folder: Path, of_gib: float = LARGE_GIB, server_args: str = "") -> list[str]:
    is_large = of_gib >= LARGE_GIB
    values = {"FOLDER": str(folder), "PRESET": "h200" if is_large else "h100", "ROUNDS": "5" if is_large else "1"}
    words = [values.get(word, word) for word in command]
    if server_args and _starts_servers(command):
        given = "".join(word.removeprefix(_SERVER_ARGS) for word in words if word.startswith(_SERVER_ARGS))
        words = [word for word in words if not word.startswith(_SERVER_ARGS)]
        words.append(f"{_SERVER_ARGS}{server_args} {given}".rstrip())
    return words


def _starts_servers(command: Sequence[str]) -> bool:
    return command[1] in _WITH_SERVER_ARGS or command[1:4] == ("mmtok_deploy", "bench", "serve")


def print_parts(parts: Sequence[Part], folder: Path, server_args: str = "") -> None:
    """Prints the commands and bars of parts, as a large GPU runs them."""
    for part in parts:
        print(f"# {part.name}: {part.about}")
        for command in part.commands:
            print(shlex.join(["python", *_filled_in(command, folder / part.name, server_args=server_args)]))
        for bar in part.bars:
            print(f"#   {bar.text}: {bar.shown_bound}")


def run_part(part: Part, folder: Path, server_args: str = "") -> None:
    """Runs a part's commands one after another; writes logs, rows and exit codes to `folder`.

    Args:
        part: The part.
        folder: Its folder.
        server_args: Arguments of all servers, beside the part's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    start = time.monotonic()
    print(f"== {part.name}: {part.about}", flush=True)
    exit_codes = []
    for place, command in enumerate(part.commands):
        arguments = _filled_in(command, folder, memory_gib(), server_args)
        with (folder / f"command-{place}.log").open("w") as log:
            print("$ python", *arguments, file=log, flush=True)
            command_line = [sys.executable, *arguments]
            try:
                with running_process(command_line, grace_s=5.0, stdout=log, stderr=subprocess.STDOUT) as process:
                    code = process.wait(part.timeout_s or _TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = 124
        exit_codes.append(code)
    if part.in_process is not None:
        try:
            for row in part.in_process():
                append_row(folder / "in-process.jsonl", row)
        except Exception:  # the other parts are still to be run
            (folder / "in-process.log").write_text(traceback.format_exc())
            exit_codes.append(1)
    (folder / DONE).write_text(json.dumps({"exit_codes": exit_codes, "seconds": round(time.monotonic() - start, 1)}))


def exit_codes_in(folder: Path) -> list[int] | None:
    """Returns the exit codes of the commands of a part that has run in the folder; None if it has not."""
    done = folder / DONE
    codes: list[int] | None = json.loads(done.read_text())["exit_codes"] if done.is_file() else None
    return codes


def rows_in(part: Part, folder: Path, server_args: str = "") -> list[ResultRow]:
    """Returns a part's rows, without the arguments that all servers were given."""
    names = [name for name in (part.beside, part.name) if name is not None and (folder / name).is_dir()]
    rows = [row for name in names for path in row_files(folder / name) for row in read_rows(path)]
    of_all = shlex.join(shlex.split(server_args))
    return [
        replace(row, case={**row.case, "server_arguments": str(found).removeprefix(of_all).strip()})
        if (found := row.case.get("server_arguments"))
        else row
        for row in rows
    ]
