"""Runs `mmtok bench selector`: backends against the published loop, size by size."""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import torch

from mmtok_bench.results import make_latency_row
from mmtok_bench.run import Run, run_command
from mmtok_bench.selector.authors import AUTHORS
from mmtok_bench.selector.contestants import contestants, first_wrong_pick
from mmtok_bench.selector.real import run_real_features
from mmtok_bench.selector.timing import NUM_WORDS, make_problem, measure_bandwidth, measure_floors_ms, time_in_turns
from mmtok_deploy.config import SelectionConfig

__all__ = ["DEFAULT_SHAPES", "run_selector_bench"]

DEFAULT_SHAPES = ((2880, 160), (2880, 80), (1728, 96), (1728, 48), (576, 32), (576, 16))
"""Numbers of tokens and of picks, from the paper's Table 13."""

_CONFIG = SelectionConfig()


def run_selector_bench(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok bench selector`: 1 if a backend picks other tokens than the reference."""
    stopped = f"the rows of finished cases are kept in {arguments.results_dir}, and --resume goes on from them."
    return run_command("mmtok bench selector", lambda: _run(arguments), stopped=stopped)


def _run(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no CUDA device here")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if arguments.features == "real":
        return run_real_features(arguments, device)
    timed = contestants(arguments.backends or (), device, arguments.authors)
    batches = arguments.batch or ((1, 8, 32) if device.type == "cuda" else (1,))
    run = Run("selector", arguments.results_dir, resume=arguments.resume, json_output=arguments.json)
    cases = [
        {"num_tokens": num_tokens, "num_picks": num_picks, "num_words": NUM_WORDS, "batch": batch}
        for (num_tokens, num_picks), batch in itertools.product(arguments.shapes or DEFAULT_SHAPES, batches)
    ]
    cases = [case for case in cases if not run.has(**case)]
    bandwidth = measure_bandwidth(device)
    with run.steps(len(cases) * arguments.runs * len(timed)):
        for case in cases:
            sizes = case["num_tokens"], case["num_picks"]
            shown = f"{sizes[0]} -> {sizes[1]}"
            run.step(f"{shown}, batch {case['batch']}")
            problems = [make_problem(*sizes, seed, device) for seed in range(case["batch"])]
            for name, select in timed.items():
                wrong = first_wrong_pick(select, problems, _CONFIG, in_order=name != AUTHORS)
                if wrong is not None:
                    run.fail(f"{name} is wrong at {shown}: {wrong}")
                    return 1
            calls = {name: partial(select, problems, _CONFIG) for name, select in timed.items()}
            floors_ms = measure_floors_ms(*sizes, case["batch"], bandwidth, device)
            times_ms = time_in_turns(calls, arguments.runs, device, on_run=run.advance)
            for name, of_name in times_ms.items():
                run.add(make_latency_row("selector", case, name, of_name, device, floors_ms))
    run.show()
    return 0
