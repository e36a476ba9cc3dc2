"""`mmtok quality` on the pocket tasks: a server, a sweep, and what is printed of it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmtok_deploy.bench.progress import progress_bar
from mmtok_deploy.bench.quality.answers import Cell, answers_beside
from mmtok_deploy.bench.quality.asking import Asker, RequestError
from mmtok_deploy.bench.quality.plot import plot_scores
from mmtok_deploy.bench.quality.questions import SCORED_KINDS
from mmtok_deploy.bench.quality.recorded import RECORDED, record
from mmtok_deploy.bench.quality.rows import BENCH
from mmtok_deploy.bench.quality.sweep import METHODS, NotPrunedError, Plan, Sweep
from mmtok_deploy.bench.quality.table import printable, score_tables
from mmtok_deploy.bench.results import new_result_file
from mmtok_deploy.bench.server import ServerError, SglangServer, cpu_arguments, cpu_environment, started

__all__ = ["POCKET_CHECKPOINT", "pocket_server", "run_pocket_tasks"]

POCKET_CHECKPOINT = Path(__file__).resolve().parents[1] / "pocket" / "checkpoint"


def run_pocket_tasks(arguments: argparse.Namespace, kinds: tuple[str, ...]) -> int:
    """Returns the exit code of `mmtok quality` on the pocket tasks: 0, or 1 where the server or a request failed.

    Raises:
        ValueError: A plan that cannot be asked, or an earlier run's file that does not fit it.
        KeyboardInterrupt: Ctrl-C; finished cells are kept.
    """
    plan = _plan(arguments, kinds)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.dry_run:
        _print_plan(plan, arguments, device)
        return 0
    if not arguments.url:
        _checkpoint(arguments.model_path)
    if arguments.resume is not None and not arguments.resume.is_file():
        raise ValueError(f"--resume names an earlier run's file of rows, and {arguments.resume} is none")
    path = arguments.resume or new_result_file(arguments.results_dir, BENCH)
    sweep = Sweep(plan, path, device)
    sweep.prepare()
    console = Console(highlight=False, stderr=arguments.json)
    try:
        with _url(arguments, device, path.with_suffix(".log"), console) as url:
            check_server(url)
            asyncio.run(_run(sweep, url, arguments, console))
    except (ServerError, RequestError, NotPrunedError, OSError) as error:
        print(f"mmtok quality: {error}\nWhat was finished is in {path}; --resume goes on from it.", file=sys.stderr)
        return 1
    _show(sweep, arguments, console)
    return 0


def pocket_server(
    model_path: str | None, device: torch.device, *arguments: str, log_path: Path | None = None
) -> SglangServer:
    """Returns a server, not yet started, whose requests each choose method and budget.

    Raises:
        ValueError: No model is named, and the pocket model's checkpoint is not there.
    """
    environment = _environment() if device.type == "cpu" else None
    return SglangServer(
        _checkpoint(model_path), *_server_arguments(model_path, device), *arguments, env=environment, log_path=log_path
    )


def check_server(url: str) -> None:
    """Returns if the server at `url` prunes when a request asks for it.

    Raises:
        ServerError: It does not answer, or runs without `--mmtok-budget`.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.rstrip('/')}/server_info", timeout=30) as answer:
            info: dict[str, Any] = json.load(answer)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise ServerError(f"{url} does not say what it is ({error}): expected an SGLang server there") from error
    if info.get("mmtok_budget") is None:
        raise ServerError(f"the server at {url} does not prune: start it with --mmtok-budget all")


def _checkpoint(model_path: str | None) -> str:
    if model_path is None and not (POCKET_CHECKPOINT / "config.json").is_file():
        raise ValueError(
            f"the pocket model is not there: expected its checkpoint in {POCKET_CHECKPOINT}; name another model's "
            "folder by --model-path, or train it by `mmtok pocket train`"
        )
    return model_path or str(POCKET_CHECKPOINT)


def _server_arguments(model_path: str | None, device: torch.device) -> list[str]:
    small = cpu_arguments(max_total_tokens=65536, max_running_requests=64) if device.type == "cpu" else []
    # SGLang 0.5.23's own LLaVA-1.5 does not load (models/llava.py, line 788).
    transformers = ["--model-impl=transformers"] if model_path is None else []
    # Without a line for each of tens of thousands of requests.
    return [*small, *transformers, "--mmtok-budget=all", "--enable-cache-report", "--log-level-http=warning"]


def _environment() -> dict[str, str]:
    # A model this small gains nothing from a second thread, and the tokenizer's process has the other core.
    return {**cpu_environment(), "OMP_NUM_THREADS": "1"}


def _plan(arguments: argparse.Namespace, kinds: tuple[str, ...]) -> Plan:
    default = Plan()
    return Plan(
        methods=arguments.methods or METHODS,
        budgets=arguments.budgets or default.budgets,
        seeds=arguments.seeds,
        kinds=tuple(kind for kind in SCORED_KINDS if kind in kinds),
        num_questions=arguments.num_questions or default.num_questions,
    )


def _print_plan(plan: Plan, arguments: argparse.Namespace, device: torch.device) -> None:
    if arguments.url:
        print(f"a running server at {arguments.url}")
    else:
        given = [*_server_arguments(arguments.model_path, device), *arguments.server_arg]
        model = f"--model-path={arguments.model_path or POCKET_CHECKPOINT}"
        print(shlex.join(["python", "-m", "sglang.launch_server", model, *given]))
    for method, budget in plan.settings():
        print(f"{method} at {budget}: {', '.join(plan.kinds)}, {plan.num_questions} each, seeds {plan.seeds}")
    print(f"{plan.num_requests} requests, {arguments.concurrency} at a time")


@contextlib.contextmanager
def _url(arguments: argparse.Namespace, device: torch.device, log_path: Path, console: Console) -> Iterator[str]:
    """Gives the address of the running server, or of one that is started for the block."""
    if arguments.url:
        yield arguments.url
        return
    server = pocket_server(arguments.model_path, device, *arguments.server_arg, log_path=log_path)
    with started(server):
        with console.status("starting the server"):
            server.wait_until_ready()
        yield server.url


async def _run(sweep: Sweep, url: str, arguments: argparse.Namespace, console: Console) -> None:
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=sweep.plan.num_requests, completed=sweep.num_done)

        def on_cell(cell: Cell) -> None:
            progress.update(bar, description=f"{cell.method} at {cell.budget}, seed {cell.seed}")

        async with Asker(url, num_at_once=arguments.concurrency, max_tokens=arguments.max_tokens) as asker:
            await sweep.run(asker, lambda: progress.advance(bar), on_cell)


def _show(sweep: Sweep, arguments: argparse.Namespace, console: Console) -> None:
    rows = sweep.rows()
    if arguments.json:
        print("\n".join(json.dumps(asdict(row)) for row in rows))
    else:
        for table in score_tables(rows):
            console.print(printable(table))
    written = [sweep.path, answers_beside(sweep.path), plot_scores(rows, sweep.path.with_suffix(".png"))]
    if arguments.record:
        record(rows, RECORDED)
        written.append(RECORDED)
    for path in written:
        console.print(f"Written: {path}", markup=False, soft_wrap=True)
