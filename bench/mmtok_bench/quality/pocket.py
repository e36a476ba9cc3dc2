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
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mmtok_bench.families import Family, family_arguments
from mmtok_bench.pocket import PICTURE_PX, pocket_checkpoint
from mmtok_bench.pocket.questions import KINDS
from mmtok_bench.pocket.scenes import SCENE_PX
from mmtok_bench.progress import progress_bar
from mmtok_bench.quality.answers import Cell, answers_beside
from mmtok_bench.quality.asking import Asker, RequestError
from mmtok_bench.quality.plan import METHODS, WITH_AGENT, Plan
from mmtok_bench.quality.plot import plot_scores
from mmtok_bench.quality.recorded import RECORDED, RECORDED_BUDGET, RECORDED_METHOD, record
from mmtok_bench.quality.rows import BENCH
from mmtok_bench.quality.sweep import NotPrunedError, Sweep
from mmtok_bench.quality.table import printable, score_tables
from mmtok_bench.results import new_result_file
from mmtok_bench.serve.server_counts import read_counts
from mmtok_bench.server import ServerError, SglangServer, cpu_arguments, cpu_environment, started
from mmtok_deploy.methods import MethodName

__all__ = ["pocket_server", "run_pocket_tasks"]

_DEFAULT_FAMILY: Family = "llava-1.5"
# Qwen2.5-VL has no class token, whose attention VisionZip ranks by; LLaVA-NeXT's tiles have one size.
_IMPOSSIBLE: Mapping[Family, MethodName] = {"qwen2.5-vl": "visionzip", "llava-next": "downsample"}
# As long as a server with many requests under way may take: a question that is not answered ends the run.
_AGENT_TIMEOUT_MS = 60_000
_NUM_ASKED = "mmtok:agent_milliseconds_count"


def run_pocket_tasks(arguments: argparse.Namespace, kinds: tuple[str, ...]) -> int:
    """Returns the exit code of `mmtok quality` on the pocket tasks: 0, or 1 where the server or a request failed.

    Raises:
        ValueError: A plan that cannot be asked, or an earlier run's file that does not fit it.
        KeyboardInterrupt: Ctrl-C; finished cells are kept.
    """
    plan = _plan(arguments, kinds)
    if arguments.record and (arguments.url or arguments.model_path):
        raise ValueError("--record is for the pocket models that this package brings along: drop it")
    if arguments.record and not _can_be_recorded(plan):
        raise ValueError(
            f"--record writes {RECORDED_METHOD} at {RECORDED_BUDGET} over several seeds: have them among --methods, "
            "--budgets and --seeds, or drop it"
        )
    if arguments.url and WITH_AGENT in plan.methods:
        raise ValueError(f"{WITH_AGENT} needs two servers, which are started without --url: drop one of the two")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.dry_run:
        _print_plan(plan, arguments, device)
        return 0
    if arguments.resume is not None and not arguments.resume.is_file():
        raise ValueError(f"--resume names an earlier run's file of rows, and {arguments.resume} is none")
    path = arguments.resume or new_result_file(arguments.results_dir, BENCH)
    picture_px = PICTURE_PX.get(arguments.family or _DEFAULT_FAMILY, SCENE_PX)
    sweep = Sweep(plan, path, _model_name(arguments), device, picture_px)
    for note in sweep.prepare():
        print(f"mmtok quality: {note}", file=sys.stderr)
    console = Console(highlight=False, stderr=arguments.json)
    try:
        with _served(arguments, plan, device, path.with_suffix(".log"), console) as (url, guided):
            check_server(url)
            asyncio.run(_run(sweep, url, guided, arguments, console))
            if guided is not None:
                console.print(_cost_of_agent(guided))
    except (ServerError, RequestError, NotPrunedError, OSError) as error:
        print(f"mmtok quality: {error}\nWhat was finished is in {path}; --resume goes on from it.", file=sys.stderr)
        return 1
    _show(sweep, arguments, console)
    return 0


def pocket_server(family: Family, device: torch.device) -> SglangServer:
    """Returns a server of the pocket model, not yet started, whose requests each choose method and budget."""
    return _server(pocket_checkpoint(family), device, *family_arguments(family))


def check_server(url: str) -> None:
    """Returns if the server at `url` prunes when a request asks for it.

    Raises:
        ServerError: It does not answer, or runs without `--mmtok-budget`.
    """
    if _server_info(url).get("mmtok_budget") is None:
        raise ServerError(f"the server at {url} does not prune: start it with --mmtok-budget all")


def _server_info(url: str) -> dict[str, Any]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.rstrip('/')}/server_info", timeout=30) as answer:
            info: dict[str, Any] = json.load(answer)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise ServerError(f"{url} does not say what it is ({error}): expected an SGLang server there") from error
    return info


def _model_name(arguments: argparse.Namespace) -> str:
    """Returns what rows call the model."""
    if arguments.url:
        return str(_server_info(arguments.url).get("model_path", arguments.url))
    return arguments.model_path or f"pocket {arguments.family or _DEFAULT_FAMILY}"


def _server(
    model_path: str | Path, device: torch.device, *arguments: str, log_path: Path | None = None
) -> SglangServer:
    environment = _environment() if device.type == "cpu" else None
    return SglangServer(model_path, *_server_arguments(device), *arguments, env=environment, log_path=log_path)


def _chosen(arguments: argparse.Namespace) -> tuple[str | Path, list[str]]:
    """Returns the checkpoint that is to be served, and the server arguments that go with it."""
    if arguments.model_path is None:
        family: Family = arguments.family or _DEFAULT_FAMILY
        return pocket_checkpoint(family), [*family_arguments(family), *arguments.server_arg]
    return arguments.model_path, [*family_arguments(arguments.family), *arguments.server_arg]


def _server_arguments(device: torch.device) -> list[str]:
    small = cpu_arguments(max_total_tokens=65536, max_running_requests=64) if device.type == "cpu" else []
    # Without a line for each of tens of thousands of requests.
    return [*small, "--mmtok-budget=all", "--enable-cache-report", "--log-level-http=warning"]


def _environment() -> dict[str, str]:
    # A model this small gains nothing from a second thread, and the tokenizer's process has the other core.
    return {**cpu_environment(), "OMP_NUM_THREADS": "1"}


def _plan(arguments: argparse.Namespace, kinds: tuple[str, ...]) -> Plan:
    default = Plan()
    return Plan(
        methods=arguments.methods or tuple(name for name in METHODS if name != _IMPOSSIBLE.get(arguments.family)),
        budgets=arguments.budgets or default.budgets,
        seeds=arguments.seeds,
        kinds=tuple(kind for kind in KINDS if kind in kinds),
        num_questions=arguments.num_questions or default.num_questions,
    )


def _can_be_recorded(plan: Plan) -> bool:
    return (RECORDED_METHOD, RECORDED_BUDGET) in plan.settings() and len(plan.seeds) > 1


def _print_plan(plan: Plan, arguments: argparse.Namespace, device: torch.device) -> None:
    if arguments.url:
        print(f"a running server at {arguments.url}")
    else:
        model_path, given = _chosen(arguments)
        given = [f"--model-path={model_path}", *_server_arguments(device), *given]
        command = ["python", "-m", "sglang.launch_server", *given]
        print(shlex.join(command))
        if WITH_AGENT in plan.methods:
            print(shlex.join([*command, *_agent_arguments("http://127.0.0.1:PORT_OF_THE_FIRST/v1")]))
    for method, budget in plan.settings():
        print(f"{method} at {budget}: {', '.join(plan.kinds)}, {plan.num_questions} each, seeds {plan.seeds}")
    print(f"{plan.num_requests} requests, {arguments.concurrency} at a time")


@contextlib.contextmanager
def _served(
    arguments: argparse.Namespace, plan: Plan, device: torch.device, log_path: Path, console: Console
) -> Iterator[tuple[str, SglangServer | None]]:
    """Gives the address of the running server, or of one that is started for the block; and the one with an agent.

    The agent is the first server, which prunes nothing unless it is asked to: the model is its own agent.
    """
    if arguments.url:
        yield arguments.url, None
        return
    model_path, given = _chosen(arguments)
    servers = [_server(model_path, device, *given, log_path=log_path)]
    if WITH_AGENT in plan.methods:
        with_agent = _agent_arguments(f"{servers[0].url}/v1")
        log = log_path.with_suffix(".agent.log")
        servers.append(_server(model_path, device, *given, *with_agent, log_path=log))
    with started(*servers):
        with console.status("starting the server" if len(servers) == 1 else "starting two servers"):
            for server in servers:
                server.wait_until_ready()
        yield servers[0].url, servers[1] if len(servers) > 1 else None


def _agent_arguments(url: str) -> list[str]:
    return [f"--mmtok-agent-url={url}", f"--mmtok-agent-timeout-ms={_AGENT_TIMEOUT_MS}", "--enable-metrics"]


def _check_agent(server: SglangServer) -> None:
    """Returns if the agent answered every question so far.

    Raises:
        ServerError: It did not, so that the scores would not be those of an agent.
    """
    counts = read_counts(server)
    num_missed = sum(counts.get(f"mmtok:agent_{name}_total", 0) for name in ("timeouts", "errors", "skips"))
    if num_missed:
        num_asked = counts.get(_NUM_ASKED, 0)
        raise ServerError(f"{num_missed:.0f} of {num_asked:.0f} questions had no answer of the agent: see its log")


def _cost_of_agent(server: SglangServer) -> str:
    counts = read_counts(server)
    num_asked = counts.get(_NUM_ASKED, 0)
    mean_ms = counts.get("mmtok:agent_milliseconds_sum", 0) / max(1, num_asked)
    return f"The agent was asked {num_asked:.0f} times; a request waited {mean_ms:.1f} ms for it, on average."


async def _run(
    sweep: Sweep, url: str, guided: SglangServer | None, arguments: argparse.Namespace, console: Console
) -> None:
    def asker_of(address: str) -> Asker:
        return Asker(address, num_at_once=arguments.concurrency, max_tokens=arguments.max_tokens)

    with progress_bar(console) as progress:
        bar = progress.add_task("", total=sweep.plan.num_requests, completed=sweep.num_done)

        def on_cell(cell: Cell) -> None:
            progress.update(bar, description=f"{cell.method} at {cell.budget}, seed {cell.seed}")

        async with contextlib.AsyncExitStack() as askers:
            asker = await askers.enter_async_context(asker_of(url))
            if guided is None:
                await sweep.run(asker, lambda: progress.advance(bar), on_cell)
                return
            agent_asker = await askers.enter_async_context(asker_of(guided.url))
            # Cell by cell: a server that is started for --resume has counted nothing of what was missed before.
            check = partial(_check_agent, guided)
            await sweep.run(asker, lambda: progress.advance(bar), on_cell, agent_asker=agent_asker, check_agent=check)


def _show(sweep: Sweep, arguments: argparse.Namespace, console: Console) -> None:
    rows = sweep.rows()
    if arguments.json:
        print("\n".join(json.dumps(asdict(row)) for row in rows))
    else:
        for table in score_tables(rows):
            console.print(printable(table))
    written = [sweep.path, answers_beside(sweep.path), plot_scores(rows, sweep.path.with_suffix(".png"))]
    if arguments.record:
        record(rows, arguments.family or _DEFAULT_FAMILY, RECORDED)
        written.append(RECORDED)
    for path in written:
        console.print(f"Written: {path}", markup=False, soft_wrap=True)
