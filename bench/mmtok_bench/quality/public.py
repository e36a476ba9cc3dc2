"""`mmtok quality` on public benchmarks: one server for each method and budget, asked by lmms-eval."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mmtok_bench.families import family_arguments
from mmtok_bench.mixed_budget import MixedBudget
from mmtok_bench.quality.lmms_eval import LmmsEvalError, LmmsScore, command_line, program_of, run_lmms_eval
from mmtok_bench.quality.plan import UNPRUNED, QualityPlan, split_method
from mmtok_bench.quality.published import BENCHMARKS, PAPER_BUDGETS, Benchmark
from mmtok_bench.quality.rows import BENCH
from mmtok_bench.results import CaseValue, make_row
from mmtok_bench.run import Run
from mmtok_bench.server import make_server, running

__all__ = ["run_public_tasks"]


def run_public_tasks(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok quality` on public tasks.

    Raises:
        ValueError: An unknown task, method or budget, or no model to serve.
        MeasurementError: A server or lmms-eval failed; the rows before are kept.
    """
    benchmarks = _benchmarks(arguments)
    pairs = _pairs(arguments)
    if arguments.url is None and arguments.model_path is None:
        raise ValueError("public tasks need a model: --model-path names what to serve, or --url a running server")
    tasks = [benchmark.task for benchmark in benchmarks.values()]
    if arguments.dry_run:
        for pair in pairs:
            if arguments.url is None:
                server = ["python", "-m", "sglang.launch_server", f"--model-path={arguments.model_path}"]
                family = family_arguments(arguments.family)
                print(shlex.join([*server, *_arguments(*pair), *family, *arguments.server_arg]))
            print(shlex.join(_command(arguments, tasks, arguments.url or "http://127.0.0.1:30000", Path("OUTPUT"))))
        return 0
    program_of(arguments.lmms_venv)
    run = Run(BENCH, arguments.results_dir, resume=arguments.resume, json_output=arguments.json)
    with run.steps(len(pairs)):
        for method, budget in pairs:
            run.step(f"{method} at {budget}")
            if not all(run.has(**_case(arguments, name, method, budget)) for name in benchmarks):
                _measure(arguments, benchmarks, method, budget, run)
            run.advance()
    run.show()
    return 0


def _benchmarks(arguments: argparse.Namespace) -> dict[str, Benchmark]:
    """Returns the benchmarks by name; a name that is not the paper's is a task of `--include-path`."""
    unknown = [task for task in arguments.tasks if task not in BENCHMARKS]
    if unknown and arguments.include_path is None:
        raise ValueError(
            f"a task is pocket, or one of {', '.join(BENCHMARKS)}, or one of --include-path's files: got {unknown[0]}"
        )
    return {task: BENCHMARKS.get(task, Benchmark(task, ())) for task in arguments.tasks}


def _pairs(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Returns pairs of a method and a budget; each pair has a server of its own."""
    methods = arguments.methods or ["mmtok"]
    for method in methods:
        split_method(method)
    ours = [each for each in arguments.server_arg if each.startswith(("--mmtok-budget", "--mmtok-method"))]
    if ours:
        raise ValueError(
            f"--server-arg {ours[0]} would change the pruning that the rows name: use --budgets and --methods"
        )
    if arguments.url is not None and (len(arguments.budgets or ()) != 1 or len(methods) != 1):
        raise ValueError(
            "lmms-eval cannot send a budget with each request: give one --budgets, that of the server at --url "
            "(and its --methods, if it is not mmtok)"
        )
    budgets = arguments.budgets or PAPER_BUDGETS.get(arguments.family)
    if budgets is None:
        raise ValueError("public tasks need --budgets, or a --family for the paper's")
    plan = QualityPlan(methods=tuple(methods), budgets=tuple(budgets))
    if arguments.family is not None:
        plan.check_family(arguments.family)
    return plan.pairs()


def _case(arguments: argparse.Namespace, task: str, method: str, budget: str) -> dict[str, CaseValue]:
    return {
        **{"task": task, "kind": "public", "method": method, "budget": budget, "seed": "0"},
        "preset": arguments.family or "",
        "model": " ".join([arguments.model_path or "", *arguments.server_arg]).strip(),
    }


def _measure(
    arguments: argparse.Namespace, benchmarks: dict[str, Benchmark], method: str, budget: str, run: Run
) -> None:
    tasks = [benchmark.task for benchmark in benchmarks.values()]
    output = run.folder / f"{method}-{budget.replace('%', 'pct')}"
    with _served(arguments, method, budget, output) as url:
        started_s = time.monotonic()
        scores = run_lmms_eval(_command(arguments, tasks, url, output), tasks, output)
        duration_s = time.monotonic() - started_s
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for name, benchmark in benchmarks.items():
        found = scores[benchmark.task]
        score = _score(benchmark, found)
        metrics = {"num_questions": float(found.num_questions), "score": score, "duration_s": duration_s}
        unpruned = [row for row in run.rows if (row.case["task"], row.case["budget"]) == (name, "all")]
        if budget != "all" and unpruned and unpruned[-1].metrics["score"]:
            metrics["share"] = score / unpruned[-1].metrics["score"]
        metrics |= {f"lmms_{metric}": value for metric, value in found.metrics.items()}
        case = _case(arguments, name, method, budget)
        run.add(make_row(BENCH, case, "sglang", metrics, num_runs=found.num_questions, device=device))


def _score(benchmark: Benchmark, score: LmmsScore) -> float:
    """Returns the sum of the benchmark's metrics; for a task that is not the paper's, its first metric.

    Raises:
        LmmsEvalError: lmms-eval did not compute one of the metrics.
    """
    missing = [name for name in benchmark.metrics if name not in score.metrics]
    if missing or not score.metrics:
        raise LmmsEvalError(
            f"{benchmark.task} has no metric {', '.join(missing)}: only {', '.join(score.metrics) or 'none'}"
        )
    if not benchmark.metrics:
        return next(iter(score.metrics.values()))
    return sum(score.metrics[name] for name in benchmark.metrics)


def _arguments(method: str, budget: str) -> list[str]:
    flags = list(MixedBudget.parse(budget).flags)
    if method == UNPRUNED:
        return flags
    name, keys = split_method(method)
    return [*flags, f"--mmtok-method={name}", *(["--mmtok-keys=output"] if keys == "output" else [])]


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
def _served(arguments: argparse.Namespace, method: str, budget: str, output: Path) -> Iterator[str]:
    if arguments.url is not None:
        yield arguments.url
        return
    on_cpu = arguments.device == "cpu" or not torch.cuda.is_available()
    server = make_server(
        arguments.model_path,
        arguments.family,
        *_arguments(method, budget),
        *arguments.server_arg,
        on_cpu=on_cpu,
        max_total_tokens=65536,
        log_path=output / "server.log",
    )
    with running(server):
        yield server.url
