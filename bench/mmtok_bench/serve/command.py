"""Runs `mmtok bench serve`."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from transformers.utils import logging as transformers_logging

from mmtok_bench.progress import progress_bar
from mmtok_bench.results import ResultRow, append_row, new_result_file
from mmtok_bench.serve.breakeven import break_even
from mmtok_bench.serve.dummy_models import make_processor, write_dummy_model
from mmtok_bench.serve.image_tokens import count_image_tokens, downsampled_px
from mmtok_bench.serve.load import load_command
from mmtok_bench.serve.measure import ModelRun, chats_file
from mmtok_bench.serve.options import sweep_of
from mmtok_bench.serve.plan import Side, Turn, plan_cells, plan_turns, sides_of
from mmtok_bench.serve.presets import ServedModel, Size, Sweep, preset_for_device
from mmtok_bench.serve.rows import BENCH
from mmtok_bench.serve.servers import ServerPool, make_server
from mmtok_bench.serve.table import TABLE_WIDTH, serve_tables
from mmtok_bench.server import SglangServer
from mmtok_deploy.budget import Budget

__all__ = ["run_serve_bench"]

_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class _Part:
    """One model with the prefix cache on or off, and what is to be done with it."""

    model: ServedModel
    model_path: Path
    sides: list[Side]
    turns: list[Turn]

    @property
    def num_steps(self) -> int:
        return sum(len(turn.cells) for turn in self.turns)


def run_serve_bench(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok bench serve`.

    0; 1 if a check, a server or a request failed; 2 for wrong flags; 130 after Ctrl-C. Rows are written as they come,
    and no server outlives the call.

    Args:
        arguments: As `add_serve_parser` defines them.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    device_name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    try:
        sweep = sweep_of(arguments, arguments.preset or preset_for_device(device_name))
        if sweep.device == "cuda" and device_name is None and not arguments.dry_run:
            raise ValueError(
                f"preset {sweep.preset} is for a GPU, and PyTorch sees none here: --preset cpu, or --dry-run"
            )
        parts = list(_parts(sweep, arguments.results_dir))
    except (ValueError, OSError) as error:
        print(f"mmtok bench serve: {error}", file=sys.stderr)
        return 2
    if arguments.dry_run:
        _print_commands(sweep, parts, arguments.results_dir)
        return 0
    return _run(sweep, parts, arguments.results_dir, json_output=arguments.json)


def _parts(sweep: Sweep, results_dir: Path) -> Iterator[_Part]:
    for model in sweep.models:
        if model.model_path is None:
            processor, path = make_processor(model.name), results_dir / "models" / model.name
        else:
            path = Path(model.model_path)
            processor = transformers.AutoProcessor.from_pretrained(path)
        # The same for every load: a processor takes its time over images.
        smaller_px = cache(partial(_smaller_px, processor, model))
        for prefix_cache in sweep.prefix_caches:
            cells = plan_cells(model, sweep, prefix_cache, smaller_px)
            if not cells:
                raise ValueError("with the prefix cache on there are photographs only: --image-kinds photograph")
            turns = plan_turns(cells, rounds=sweep.rounds, side_by_side=sweep.side_by_side)
            yield _Part(model, path, sides_of(model, prefix_cache), turns)


def _smaller_px(processor: Any, model: ServedModel, size_px: Size, budget: str) -> Size | None:
    num_tokens = count_image_tokens(processor, size_px)
    num_kept = Budget.parse(budget).num_kept(num_tokens)
    return None if num_kept == num_tokens else downsampled_px(processor, model.family, size_px, num_kept)


def _print_commands(sweep: Sweep, parts: list[_Part], results_dir: Path) -> None:
    folder = results_dir / "run"
    for part in parts:
        servers = {side: _server(sweep, part, folder, side) for side in part.sides}
        for side, server in servers.items():
            environment = [f"{name}={value}" for name, value in server.environment.items()]
            print(f"# {part.model.name}: server at budget {side.budget}, prefix cache {side.prefix_cache}")
            print(shlex.join(["env", *environment, *server.command] if environment else server.command))
        for turn in part.turns:
            for cell in turn.cells:
                command = load_command(
                    cell,
                    servers[turn.side].url,
                    str(part.model_path),
                    num_requests=sweep.requests_of(cell.concurrency),
                    output_tokens=sweep.output_tokens,
                    seed=turn.round_idx * 1000 + cell.concurrency,
                    chats=chats_file(folder, turn, cell),
                    output=folder / "load" / "result.jsonl",
                )
                print(f"# round {turn.round_idx}, {cell.method} at budget {cell.budget}")
                print(shlex.join(command))


def _server(sweep: Sweep, part: _Part, folder: Path, side: Side) -> SglangServer:
    stem = f"{part.model.name}-{side.budget.replace('%', 'pct')}-prefix-cache-{side.prefix_cache}"
    return make_server(sweep, part.model, side, part.model_path, folder / "logs" / f"{stem}.log")


def _run(sweep: Sweep, parts: list[_Part], results_dir: Path, *, json_output: bool) -> int:
    console = Console(highlight=False, stderr=json_output)
    path = new_result_file(results_dir, BENCH)
    folder = path.with_suffix("")
    rows: list[ResultRow] = []
    failures: list[str] = []

    def keep(row: ResultRow) -> None:
        append_row(path, row)
        rows.append(row)

    def report(failure: str) -> None:
        failures.append(failure)
        console.print(failure, style="red", markup=False, soft_wrap=True)

    interrupted = False
    try:
        with progress_bar(console) as progress:
            bar = progress.add_task("", total=sum(part.num_steps for part in parts))
            for part in parts:
                done_before = progress.tasks[0].completed
                _run_part(sweep, part, folder, keep, report, progress)
                # Also where nothing of it was measured: the time that is left is that of the others.
                progress.update(bar, completed=done_before + part.num_steps)
    except KeyboardInterrupt:
        interrupted = True
    _print_results(rows, console, json_output=json_output)
    console.print(f"Written: {path}", markup=False, soft_wrap=True)
    if interrupted:
        console.print("Stopped; the servers have ended.")
        return _INTERRUPTED
    return 1 if failures else 0


def _run_part(
    sweep: Sweep,
    part: _Part,
    folder: Path,
    keep: Callable[[ResultRow], None],
    report: Callable[[str], None],
    progress: Progress,
) -> None:
    (bar,) = progress.task_ids

    def step(text: str) -> None:
        progress.update(bar, description=text)
        # A file shows no bar.
        if not progress.console.is_terminal:
            progress.console.print(text, markup=False, soft_wrap=True)

    if part.model.model_path is None:
        step(f"{part.model.name}: writing the model")
        write_dummy_model(part.model.name, part.model_path)

    def make(side: Side) -> SglangServer:
        return _server(sweep, part, folder, side)

    with ServerPool(make, side_by_side=sweep.side_by_side) as pool, _removed(folder / "chats"):
        ModelRun(
            sweep,
            part.model,
            part.model_path,
            folder,
            pool,
            on_row=keep,
            on_failure=report,
            on_step=step,
            on_done=lambda: progress.advance(bar),
        ).run(part.sides, part.turns)


@contextlib.contextmanager
def _removed(folder: Path) -> Iterator[None]:
    """Removes the folder after the block: chats hold their images, a gigabyte in a long sweep, and are made again."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _print_results(rows: list[ResultRow], console: Console, *, json_output: bool) -> None:
    if json_output:
        print("\n".join(json.dumps(asdict(row)) for row in rows))
        return
    # A narrower terminal wraps the lines: figures are never cut.
    wide = Console(highlight=False, width=max(console.width, TABLE_WIDTH))
    for table in serve_tables(rows):
        wide.print(table)
    for sentence in break_even(rows):
        console.print(sentence, markup=False, soft_wrap=True)
