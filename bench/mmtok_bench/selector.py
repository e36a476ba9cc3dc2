"""How long the selection takes: backends against the published loop, size by size."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from json import dumps
from pathlib import Path
from typing import get_args

import torch
from rich.console import Console
from torch import Tensor

from mmtok_bench.dense_loop import BASELINES, Baseline
from mmtok_bench.exported_graph import EXPORTED_FORMS, exported_graph
from mmtok_bench.made_up_features import NUM_WORDS, make_problem
from mmtok_bench.progress import progress_bar
from mmtok_bench.results import ResultRow, append_row, make_latency_row, new_result_file
from mmtok_bench.selector_report import latency_table
from mmtok_bench.timing import time_in_turns
from mmtok_deploy.backends import Backend, BackendName, get_backend, reference
from mmtok_deploy.config import SelectionConfig
from mmtok_deploy.greedy_replay import WrongPickError, replay_greedy
from mmtok_deploy.problem import SelectionProblem

__all__ = ["DEFAULT_SHAPES", "Shape", "contestants", "run_selector_bench"]

Shape = tuple[int, int]
"""Tokens of an image, and how many of them are picked."""

DEFAULT_SHAPES: tuple[Shape, ...] = ((2880, 160), (2880, 80), (1728, 96), (1728, 48), (576, 32), (576, 16))
"""Those of the paper's Table 13."""

_Contestants = dict[str, Baseline]
_CONFIG = SelectionConfig()
_NOT_FOR_SPEED = ("reference", "blocked")


def run_selector_bench(
    *,
    shapes: Sequence[Shape] = DEFAULT_SHAPES,
    batches: Sequence[int] = (1,),
    backends: Sequence[str] = (),
    device: str = "cpu",
    num_threads: int | None = None,
    num_runs: int = 15,
    folder: Path = Path("artifacts/bench/selector"),
    json_output: bool = False,
) -> int:
    """Returns the exit code of `mmtok bench selector`: 0, or 1 where a backend picks other tokens than the reference.

    Rows are appended to a new file in `folder` as they are measured; a plot of them is written beside it.

    Args:
        shapes: Tokens and picks of each case.
        batches: Images selected from in one call.
        backends: Which to time; empty for the published loop, and every fast backend that runs on the device.
        device: Where the features are.
        num_threads: PyTorch's threads on the CPU; None leaves them as they are.
        num_runs: Timed runs of each backend on each case, at least 2.
        folder: Where to write.
        json_output: Print the rows instead of the table.

    Raises:
        ValueError: A device that is not there, a backend that is unknown or does not run on it.
    """
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no CUDA device here")
    chosen = contestants(backends, target)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    path = new_result_file(folder, "selector")
    console = Console(highlight=False, stderr=json_output)
    rows: list[ResultRow] = []
    cases = list(itertools.product(shapes, batches))
    with progress_bar(console) as progress:
        bar = progress.add_task("", total=len(cases) * num_runs * len(chosen))
        for (num_tokens, num_picks), batch in cases:
            progress.update(bar, description=f"{num_tokens} -> {num_picks}, batch {batch}")
            problems = [make_problem(num_tokens, num_picks, seed, target) for seed in range(batch)]
            for name, select in chosen.items():
                wrong = _first_wrong(select, problems)
                if wrong is not None:
                    console.print(f"[bold red]{name} is wrong[/bold red] at {num_tokens} -> {num_picks}: {wrong}")
                    return 1
            calls = {name: partial(select, problems, _CONFIG) for name, select in chosen.items()}
            times_ms = time_in_turns(calls, num_runs, target, on_run=lambda: progress.advance(bar))
            case = {"num_tokens": num_tokens, "num_picks": num_picks, "num_words": NUM_WORDS, "batch": batch}
            for name, runs in times_ms.items():
                rows.append(make_latency_row("selector", case, name, runs, target))
                append_row(path, rows[-1])
    if json_output:
        print("\n".join(dumps(asdict(row)) for row in rows))
    else:
        console.print(latency_table(rows))
    for written in (path, *_plots(rows, path, target)):
        console.print(f"Written: {written}", markup=False, soft_wrap=True)
    return 0


def contestants(names: Sequence[str], device: torch.device) -> _Contestants:
    """Returns what is timed, by name; for no names, the published loop and the fast backends there.

    Raises:
        ValueError: A name that is unknown, or does not run on the device.
    """
    backends = [name for name in get_args(BackendName) if name != "auto"]
    known = (*BASELINES, *backends, *EXPORTED_FORMS)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"a backend to time is one of {', '.join(known)}, got {unknown[0]!r}")
    if not names:
        fast = [name for name in backends if name not in _NOT_FOR_SPEED and _runs_on(name, device)]
        names = [*BASELINES, *fast]
    return {name: _contestant(name, device) for name in names}


def _contestant(name: str, device: torch.device) -> Baseline:
    if name in BASELINES:
        return BASELINES[name]
    if name in EXPORTED_FORMS:
        return exported_graph(EXPORTED_FORMS[name], device)
    return _orders_of(name, device)


def _runs_on(name: str, device: torch.device) -> bool:
    try:
        _backend(name, device)
    except ValueError:
        return False
    return True


def _backend(name: str, device: torch.device) -> Backend:
    chosen: BackendName = next(each for each in get_args(BackendName) if each == name)
    return get_backend(chosen, device)


def _orders_of(name: str, device: torch.device) -> Baseline:
    backend = _backend(name, device)

    def select(problems: Sequence[SelectionProblem], config: SelectionConfig) -> list[Tensor]:
        return [selection.order for selection in backend(problems, config)]

    return select


def _first_wrong(select: Baseline, problems: Sequence[SelectionProblem]) -> str | None:
    """Returns what is wrong with the picks, None if they are greedy up to what float32 rounds."""
    for problem, order in zip(problems, select(problems, _CONFIG), strict=True):
        if torch.equal(order, reference.select([problem], _CONFIG)[0].order):
            continue  # a replay in double precision takes seconds for thousands of tokens
        try:
            replay_greedy(problem, _CONFIG, order.tolist())
        except WrongPickError as error:
            return str(error)
    return None


def _plots(rows: Sequence[ResultRow], path: Path, device: torch.device) -> list[Path]:
    try:
        from mmtok_bench.selector_plot import plot_latency
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed: pip install 'mmtok-deploy[bench]'", file=sys.stderr)
        return []
    return [plot_latency(rows, path.with_suffix(".png"), device)]
