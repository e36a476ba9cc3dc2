"""Runs `mmtok soak`."""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from pathlib import Path

import torch

from mmtok_bench.families import FamilyName
from mmtok_bench.results import make_row
from mmtok_bench.run import Run, quiet_transformers, run_command
from mmtok_bench.server import ServerError, ServerPool
from mmtok_soak import faults
from mmtok_soak.faults import Row
from mmtok_soak.table import write_table
from mmtok_soak.trial import Served, Trial, make_soak_server

__all__ = ["run_soak"]

_BENCH = "soak"
_MIN_ROW_S = 20.0
_MAX_LETTERS = 600


def run_soak(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok soak`: 0 if all holds, 1 if something does not, 2 usage, 130 after Ctrl-C."""
    return run_command("mmtok soak", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    if arguments.write_table:
        missing = [path for path in arguments.write_table if not path.is_file()]
        if missing:
            raise ValueError(f"--write-table takes files of rows, and {missing[0]} is none")
        write_table(arguments.write_table, arguments.page)
        print(f"Written: {arguments.page}")
        return 0
    unknown = [name for name in arguments.rows or () if name not in faults.ROWS]
    if unknown:
        raise ValueError(f"--rows takes some of {','.join(faults.ROWS)}, got {','.join(unknown)}")
    rows = [faults.ROWS[name] for name in arguments.rows or faults.ROWS]
    if arguments.list:
        for row in rows:
            print(f"{row.name:<10} {row.fault}")
        return 0
    quiet_transformers()
    run = Run(_BENCH, arguments.results_dir, json_output=arguments.json)
    total_weight = sum(row.minutes * _num_families(arguments, row) for row in rows)
    try:
        with ServerPool(make_soak_server, restarts=True) as pool:
            for family in arguments.families:
                for row in rows:
                    if not (row.is_of_one_family and family != arguments.families[0]):
                        limit_s = max(_MIN_ROW_S, 60 * arguments.minutes * row.minutes / total_weight)
                        _run_row(arguments, row, family, limit_s, pool, run)
    finally:
        # Each row has printed its failures, which say more than a table of counts.
        run.show(rows=run.rows if arguments.json else [])
    return 1 if run.failures else 0


def _run_row(
    arguments: argparse.Namespace, row: Row, family: FamilyName, limit_s: float, pool: ServerPool[Served], run: Run
) -> None:
    def step(text: str) -> None:
        run.step(f"{family} {row.name}: {text}", always=text.startswith("FAILED"))

    trial = Trial(
        family,
        run.folder,
        minutes=arguments.minutes,
        num_families=_num_families(arguments, row),
        seed=arguments.seed,
        step=step,
        pool=pool,
    )
    trial.limit(limit_s)
    start_s = time.monotonic()
    with run.steps(None):
        try:
            row.run(trial)
        except ServerError as error:
            trial.fail("a server does not start or answer", str(error)[-1500:])
        except Exception as error:  # counts as a failure of this row; the other rows still run
            trial.fail("the row broke off", f"{type(error).__name__}: {error}"[:1000])
    if not trial.failures and not set(trial.counts) - {"fixed_chats"}:
        trial.fail("nothing was run", f"within {trial.minutes:g} minutes: give the run more")
    lost = _lost(trial)
    run.add(
        make_row(
            _BENCH,
            {"row": row.name, "family": family, "seed": arguments.seed, "minutes": arguments.minutes, "lost": lost},
            "sglang",
            _metrics(trial, time.monotonic() - start_s),
            num_runs=max(1, sum(trial.counts.values())),
            device=torch.device("cpu"),
        )
    )
    _write_failures(trial, run.folder / "failures.txt", row)
    counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in trial.counts.items())
    what = f"{family} {row.name}, seed {arguments.seed}"
    if trial.failures:
        run.fail(f"{what}: {len(trial.failures)} FAILURES: {lost} ({counts})")
    else:
        run.console.print(f"{what}: holds ({counts})", markup=False, soft_wrap=True)


def _num_families(arguments: argparse.Namespace, row: Row) -> int:
    return 1 if row.is_of_one_family else len(arguments.families)


def _metrics(trial: Trial, duration_s: float) -> dict[str, float]:
    counts = {f"num_{name}": value for name, value in trial.counts.items()}
    # A difference is infinite if another token was chosen; rows hold finite numbers only.
    numbers = {name: value if math.isfinite(value) else 1e9 for name, value in trial.numbers.items()}
    return counts | numbers | {"num_failures": len(trial.failures), "duration_s": round(duration_s, 1)}


def _lost(trial: Trial) -> str:
    """Returns each kind of failure with its number, the most frequent first."""
    kinds = Counter(failure.what for failure in trial.failures)
    return "; ".join(f"{what} ({number})" for what, number in kinds.most_common())[:_MAX_LETTERS]


def _write_failures(trial: Trial, path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        for failure in trial.failures:
            file.write(f"{row.name} {trial.family}: {failure.what}\n    {failure.reproduction!r}\n")
