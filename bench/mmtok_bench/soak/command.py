"""mmtok soak."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mmtok_bench.families import Family

if TYPE_CHECKING:
    from rich.console import Console

    from mmtok_bench.results import ResultRow
    from mmtok_bench.soak.faults import Row
    from mmtok_bench.soak.trial import ServerPool, Trial

__all__ = ["BENCH", "run_soak"]

BENCH = "soak"
_INTERRUPTED = 130
_MIN_ROW_S = 20.0
_MAX_WORDS = 600


def run_soak(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok soak`: 0 if all holds, 1 if something does not, 2 usage, 130 after Ctrl-C."""
    from mmtok_bench.soak.faults import ROWS
    from mmtok_bench.soak.table import write_table

    try:
        if arguments.write_table:
            write_table(arguments.write_table, arguments.page)
            print(f"Written: {arguments.page}")
            return 0
        unknown = [name for name in arguments.rows or () if name not in ROWS]
        if unknown:
            raise ValueError(f"--rows takes some of {','.join(ROWS)}, got {','.join(unknown)}")
    except (ValueError, OSError) as error:
        print(f"mmtok soak: {error}", file=sys.stderr)
        return 2
    rows = [ROWS[name] for name in arguments.rows or ROWS]
    if arguments.list:
        for row in rows:
            print(f"{row.name:<10} {row.fault}")
        return 0
    return _run(arguments, rows)


def _run(arguments: argparse.Namespace, rows: list[Row]) -> int:
    import transformers
    from rich.console import Console

    from mmtok_bench.process_tree import sigterm_raises_exit
    from mmtok_bench.results import new_result_file
    from mmtok_bench.soak.trial import ServerPool

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False, stderr=arguments.json)
    path = new_result_file(arguments.results_dir, BENCH)
    results: list[ResultRow] = []
    num_failures = 0
    total_weight = sum(row.minutes * _num_families(arguments, row) for row in rows)
    pool = ServerPool()
    interrupted = False
    try:
        with sigterm_raises_exit():
            for family in arguments.families:
                for row in rows:
                    if row.is_of_one_family and family != arguments.families[0]:
                        continue
                    limit_s = max(_MIN_ROW_S, 60 * arguments.minutes * row.minutes / total_weight)
                    result, failed = _run_row(arguments, row, family, limit_s, pool, console, path)
                    results.append(result)
                    num_failures += failed
    except KeyboardInterrupt:
        interrupted = True
    finally:
        pool.close()
    if arguments.json:
        print("\n".join(json.dumps(asdict(each)) for each in results))
    console.print(f"Written: {path}", markup=False, soft_wrap=True)
    if interrupted:
        console.print("Stopped; the servers have ended.")
        return _INTERRUPTED
    return 1 if num_failures else 0


def _run_row(
    arguments: argparse.Namespace,
    row: Row,
    family: Family,
    limit_s: float,
    pool: ServerPool,
    console: Console,
    path: Path,
) -> tuple[ResultRow, int]:
    """Returns what was written of one row and family, and how many things did not hold."""
    import torch

    from mmtok_bench.results import append_row, make_row
    from mmtok_bench.run import progress_bar
    from mmtok_bench.server import ServerError
    from mmtok_bench.soak.trial import Trial

    with progress_bar(console) as progress:
        bar = progress.add_task(f"{family} {row.name}", total=None)

        def step(text: str) -> None:
            progress.update(bar, description=f"{family} {row.name}: {text[:120]}")
            if text.startswith("FAILED") or not console.is_terminal:
                progress.console.print(f"{family} {row.name}: {text}", markup=False, soft_wrap=True)

        trial = Trial(
            family,
            path.with_suffix(""),
            minutes=arguments.minutes,
            num_families=_num_families(arguments, row),
            seed=arguments.seed,
            on_step=step,
            pool=pool,
        )
        trial.limit(limit_s)
        start_s = time.monotonic()
        try:
            row.run(trial)
        except ServerError as error:
            trial.fail("a server does not start or answer", str(error)[-1500:])
        except Exception as error:  # a row that breaks is a row that does not hold; the others are run
            trial.fail("the row broke off", f"{type(error).__name__}: {error}"[:1000])
    if not trial.failures and not set(trial.counts) - {"fixed_chats"}:
        trial.fail("nothing was run", f"within {trial.minutes:g} minutes: give the run more")
    result = make_row(
        BENCH,
        {"row": row.name, "family": family, "seed": arguments.seed, "minutes": arguments.minutes, "lost": _lost(trial)},
        "sglang",
        _metrics(trial, time.monotonic() - start_s),
        num_runs=max(1, sum(trial.counts.values())),
        device=torch.device("cpu"),
    )
    append_row(path, result)
    _write_failures(trial, path.with_suffix("") / "failures.txt", row)
    verdict = "holds" if not trial.failures else f"{len(trial.failures)} FAILURES: {result.case['lost']}"
    counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in trial.counts.items())
    console.print(f"{family} {row.name}, seed {arguments.seed}: {verdict} ({counts})", markup=False, soft_wrap=True)
    return result, len(trial.failures)


def _num_families(arguments: argparse.Namespace, row: Row) -> int:
    return 1 if row.is_of_one_family else len(arguments.families)


def _metrics(trial: Trial, duration_s: float) -> dict[str, float]:
    counts = {f"num_{name}": value for name, value in trial.counts.items()}
    # An infinite difference, of another token, is written as a number that says so by its size.
    numbers = {name: value if math.isfinite(value) else 1e9 for name, value in trial.numbers.items()}
    return counts | numbers | {"num_failures": len(trial.failures), "duration_s": round(duration_s, 1)}


def _lost(trial: Trial) -> str:
    """Returns what did not hold, each kind once with how often, the most frequent first."""
    kinds: dict[str, int] = {}
    for failure in trial.failures:
        kinds[failure.what] = kinds.get(failure.what, 0) + 1
    ordered = sorted(kinds.items(), key=lambda kind: -kind[1])
    return "; ".join(f"{what} ({number})" for what, number in ordered)[:_MAX_WORDS]


def _write_failures(trial: Trial, path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        for failure in trial.failures:
            file.write(f"{row.name} {trial.family}: {failure.what}\n    {failure.reproduction!r}\n")
