"""`mmtok quality` on public benchmarks: one server for each method and budget, asked by lmms-eval."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from mmtok_bench.families import family_arguments
from mmtok_bench.progress import progress_bar
from mmtok_bench.quality.benchmarks import BENCHMARKS, PAPER_BUDGETS, Benchmark
from mmtok_bench.quality.lmms_eval import LmmsEvalError, LmmsScore, command_line, program_of, run
from mmtok_bench.quality.public_table import public_table
from mmtok_bench.quality.rows import BENCH, UNPRUNED
from mmtok_bench.quality.table import printable
from mmtok_bench.results import ResultRow, append_row, make_row, new_result_file
from mmtok_bench.server import ServerError, SglangServer, cpu_arguments, cpu_environment, started
from mmtok_deploy.budget import Budget
from mmtok_deploy.methods import check_method

__all__ = ["run_public_tasks"]


@dataclass(frozen=True, slots=True)
class _Setting:
    """One server's: a method and a budget; None is what a running server has."""

    method: str
    budget: str

    def arguments(self) -> list[str]:
        method = [] if self.method == UNPRUNED else [f"--mmtok-method={self.method}"]
        return [f"--mmtok-budget={self.budget}", *method]


def run_public_tasks(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok quality` on public tasks: 0, or 1 where a server or lmms-eval failed.

    Raises:
        ValueError: An unknown task, method or budget, no model to serve, or `--resume`.
    """
    benchmarks = _benchmarks(arguments)
    settings = _settings(arguments)
    if arguments.resume is not None:
        raise ValueError("--resume goes on with pocket tasks; of public ones, name the budgets that are left")
    if arguments.url is None and arguments.model_path is None:
        raise ValueError("public tasks need a model: --model-path names what to serve, or --url a running server")
    if arguments.dry_run:
        _print_plan(arguments, list(benchmarks.values()), settings)
        return 0
    console = Console(highlight=False, stderr=arguments.json)
    path: Path | None = None
    rows: list[ResultRow] = []
    try:
        program_of(arguments.lmms_venv)
        path = new_result_file(arguments.results_dir, BENCH)
        with progress_bar(console) as progress:
            bar = progress.add_task("", total=len(settings))
            for setting in settings:
                progress.update(bar, description=f"{setting.method} at {setting.budget}")
                for row in _measure(arguments, benchmarks, setting, path, rows):
                    append_row(path, row)
                    rows.append(row)
                progress.advance(bar)
    except (ServerError, LmmsEvalError, OSError) as error:
        print(f"mmtok quality: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print("\n".join(json.dumps(asdict(row)) for row in rows))
    else:
        console.print(printable(public_table(rows)))
    console.print(f"Written: {path}", markup=False, soft_wrap=True)
    return 0


def _benchmarks(arguments: argparse.Namespace) -> dict[str, Benchmark]:
    """Returns what is asked by name; a name that is not the paper's is one of `--include-path`'s tasks."""
    unknown = [task for task in arguments.tasks if task not in BENCHMARKS]
    if unknown and arguments.include_path is None:
        raise ValueError(
            f"a task is pocket, or one of {', '.join(BENCHMARKS)}, or one of --include-path's files: got {unknown[0]}"
        )
    return {task: BENCHMARKS.get(task, Benchmark(task, ())) for task in arguments.tasks}


def _settings(arguments: argparse.Namespace) -> list[_Setting]:
    if arguments.url is not None and (len(arguments.budgets or ()) != 1 or len(arguments.methods or ("mmtok",)) != 1):
        raise ValueError(
            "lmms-eval cannot ask for a budget with each request: say which one the server at --url runs with, by one "
            "--budgets (and --methods, if it is not mmtok)"
        )
    budgets = arguments.budgets or PAPER_BUDGETS.get(arguments.family)
    if budgets is None:
        raise ValueError("public tasks need --budgets, or a --family for the paper's")
    for budget in budgets:
        Budget.parse(budget)
    methods = [check_method(method) for method in arguments.methods or ("mmtok",)]
    pruned = [_Setting(method, budget) for budget in budgets if budget != "all" for method in methods]
    return [*([_Setting(UNPRUNED, "all")] if "all" in budgets else []), *pruned]


def _measure(
    arguments: argparse.Namespace,
    benchmarks: dict[str, Benchmark],
    setting: _Setting,
    path: Path,
    before: Sequence[ResultRow],
) -> Iterator[ResultRow]:
    tasks = [benchmark.task for benchmark in benchmarks.values()]
    output = path.with_suffix("") / f"{setting.method}-{setting.budget.replace('%', 'pct')}"
    with _server(arguments, setting, output) as url:
        started_s = time.monotonic()
        scores = run(_command(arguments, tasks, url, output), tasks, output)
        duration_s = time.monotonic() - started_s
    for name, benchmark in benchmarks.items():
        score = scores[benchmark.task]
        metrics = {
            "num_questions": float(score.num_questions),
            "score": _score(benchmark, score),
            "duration_s": duration_s,
        }
        unpruned = [row for row in before if row.case["task"] == name and row.case["method"] == UNPRUNED]
        if setting.method != UNPRUNED and unpruned and unpruned[-1].metrics["score"]:
            metrics["share"] = metrics["score"] / unpruned[-1].metrics["score"]
        case = {
            **{"task": name, "kind": "public", "method": setting.method, "budget": setting.budget, "seed": "0"},
            **{"preset": arguments.family or "", "model": arguments.model_path or ""},
        }
        named = {f"lmms_{metric}": value for metric, value in score.metrics.items()}
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        yield make_row(BENCH, case, "sglang", metrics | named, num_runs=score.num_questions, device=device)


def _score(benchmark: Benchmark, score: LmmsScore) -> float:
    """Returns the sum of the benchmark's metrics; of a task that is not the paper's, its first.

    Raises:
        LmmsEvalError: lmms-eval computed none of that name.
    """
    missing = [name for name in benchmark.metrics if name not in score.metrics]
    if missing or not score.metrics:
        raise LmmsEvalError(
            f"{benchmark.task} has no metric {', '.join(missing)}: only {', '.join(score.metrics) or 'none'}"
        )
    if not benchmark.metrics:
        return next(iter(score.metrics.values()))
    return sum(score.metrics[name] for name in benchmark.metrics)


def _command(arguments: argparse.Namespace, tasks: Sequence[str], url: str, output: Path) -> list[str]:
    return command_line(
        arguments.lmms_venv / "bin" / "lmms-eval",
        tasks,
        url,
        output,
        num_at_once=arguments.concurrency,
        limit=arguments.num_questions,
        include_path=arguments.include_path,
    )


@contextlib.contextmanager
def _server(arguments: argparse.Namespace, setting: _Setting, output: Path) -> Iterator[str]:
    if arguments.url is not None:
        yield arguments.url
        return
    on_cpu = arguments.device == "cpu" or not torch.cuda.is_available()
    server = SglangServer(
        arguments.model_path,
        *(cpu_arguments(max_total_tokens=65536) if on_cpu else ()),
        *setting.arguments(),
        *_server_arguments(arguments),
        env=cpu_environment() if on_cpu else None,
        log_path=output / "server.log",
    )
    with started(server):
        server.wait_until_ready()
        yield server.url


def _server_arguments(arguments: argparse.Namespace) -> list[str]:
    return [*family_arguments(arguments.family), *arguments.server_arg]


def _print_plan(arguments: argparse.Namespace, benchmarks: Sequence[Benchmark], settings: Sequence[_Setting]) -> None:
    for setting in settings:
        if arguments.url is None:
            server = ["python", "-m", "sglang.launch_server", f"--model-path={arguments.model_path}"]
            print(shlex.join([*server, *setting.arguments(), *_server_arguments(arguments)]))
        tasks = [benchmark.task for benchmark in benchmarks]
        print(shlex.join(_command(arguments, tasks, arguments.url or "http://127.0.0.1:30000", Path("OUTPUT"))))
