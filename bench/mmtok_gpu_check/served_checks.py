"""Checks that no request of a server with a budget waits for a compiler, not even the first.

    python -m mmtok_gpu_check.served_checks artifacts/checks --model qwen2.5-vl-7b

A new server gets requests about photographs of one size, one at a time. The first is compared with the tenth and later
ones, for which the time of each stage is measured as well. Then come random questions about photographs of random sizes
at random budgets, several at a time, while `mmtok:triton_compiles_total` counts compiled kernels.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from mmtok_bench.client import RequestError, ask, in_parallel
from mmtok_bench.dummy_models import DUMMY_ARGUMENTS, DUMMY_MODELS, write_dummy_model
from mmtok_bench.families import FamilyName
from mmtok_bench.load_images import load_image_url
from mmtok_bench.results import append_row, make_row
from mmtok_bench.run import quiet_transformers, run_command
from mmtok_bench.server import SglangServer, make_server
from mmtok_bench.server_metrics import read_counts, stage_metrics

__all__ = ["BENCH", "check_server", "main"]

BENCH = "served-checks"
_SIZE_PX = (1008, 672)
_NUM_FIRST = 30
_NUM_BEFORE_LATER = 9
_BUDGETS = ("1%", "5%", "10%", "33%", "90%", 1, 16, 64, 200)
_WORDS = ("which", "colours", "does", "the", "large", "animal", "have", "and", "what", "is", "under", "left", "window")
_COMPILES = {
    "triton_compiles": "mmtok:triton_compiles_total",
    "triton_compiles_elsewhere": "mmtok:triton_compiles_elsewhere_total",
}


def check_server(server: SglangServer, *, num_requests: int, concurrency: int, max_side_px: int) -> dict[str, float]:
    """Returns the metrics of a server that has not answered any request yet.

    These are `first_ttft_ms`; for the tenth and later requests `later_ttft_p50_ms`, `later_ttft_p90_ms` and the
    milliseconds of each stage; kernels compiled during the random requests, `triton_compiles` for the plugin's and
    `triton_compiles_elsewhere` for others, absent if the server does not count them; and `num_failed`.

    Args:
        server: Ready, with `--enable-metrics` and `--enable-cache-report`.
        num_requests: Number of random requests.
        concurrency: Random requests at a time.
        max_side_px: The longest side of their images.
    """
    client = server.client()

    def ttft_ms(number: int) -> float:
        return ask(
            client, load_image_url("photograph", _SIZE_PX, _SIZE_PX, f"first {number}"), "What is it?", max_tokens=2
        ).ttft_ms

    first, *_ = [ttft_ms(number) for number in range(_NUM_BEFORE_LATER)]
    at_first = read_counts(server)
    later = [ttft_ms(number) for number in range(_NUM_BEFORE_LATER, _NUM_FIRST)]
    before = read_counts(server)

    def ask_at_random(number: int) -> bool:
        draw = random.Random(number)
        size_px = draw.randint(60, max_side_px), draw.randint(60, max_side_px)
        question = " ".join(draw.choices(_WORDS, k=draw.choice((0, 1, 5, 20, 100)))) + "?"
        fields: dict[str, Any] = {"mm_processor_kwargs": {"mmtok_budget": draw.choice(_BUDGETS)}}
        url = load_image_url("photograph", size_px, size_px, f"random {number}", lossless=True)
        try:
            ask(client, url, question, max_tokens=draw.randint(1, 8), fields=fields)
        except RequestError as error:
            print(error, file=sys.stderr)
            return False
        return True

    answered = in_parallel(concurrency, ask_at_random, range(num_requests))
    after = read_counts(server)
    return {
        "first_ttft_ms": first,
        "later_ttft_p50_ms": statistics.median(later),
        "later_ttft_p90_ms": statistics.quantiles(later, n=10, method="inclusive")[-1],
        "num_failed": answered.count(False),
        **stage_metrics(at_first, before, len(later)),
        **{name: after[count] - before[count] for name, count in _COMPILES.items() if count in after},
    }


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if the server or a request failed, 2 for usage, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="mmtok_gpu_check.served_checks", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for the row, the server's log and the model")
    parser.add_argument("--model", choices=DUMMY_MODELS, default="qwen2.5-vl-7b", help="default %(default)s")
    parser.add_argument("--budget", default="10%", help="default 10%%")
    parser.add_argument("--requests", type=int, default=500, help="random requests (default %(default)s)")
    parser.add_argument("--concurrency", type=int, default=16, help="random requests at a time (default %(default)s)")
    parser.add_argument(
        "--max-side-px", type=int, default=1400, help="longest side of their images (default %(default)s)"
    )
    parser.add_argument("--server-args", type=shlex.split, default=[], help="further arguments of the server")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default %(default)s")
    arguments = parser.parse_args(argv)
    return run_command("mmtok_gpu_check.served_checks", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    folder: Path = arguments.folder
    model_path = folder / "models" / arguments.model
    write_dummy_model(arguments.model, model_path)
    family: FamilyName = "qwen2.5-vl" if "qwen" in arguments.model else "llava-1.5"
    server = make_server(
        model_path,
        family,
        *("--enable-metrics", "--enable-cache-report", "--disable-radix-cache", f"--mmtok-budget={arguments.budget}"),
        *DUMMY_ARGUMENTS,
        *arguments.server_args,
        on_cpu=arguments.device == "cpu",
        log_path=folder / "server.log",
    )
    with server:
        metrics = check_server(
            server,
            num_requests=arguments.requests,
            concurrency=arguments.concurrency,
            max_side_px=arguments.max_side_px,
        )
    case = {"model": arguments.model, "budget": arguments.budget, "concurrency": arguments.concurrency}
    device = torch.device(arguments.device)
    row = make_row(BENCH, case, "sglang", metrics, num_runs=_NUM_FIRST + arguments.requests, device=device)
    append_row(folder / "served-checks.jsonl", row)
    return 1 if metrics["num_failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
