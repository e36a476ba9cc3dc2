"""Holds the selections of a quantised checkpoint's server against those of the unquantised one's, on one device.

    python -m tests.runtime.device_quantised artifacts/quantised --method awq

A row with the largest difference of the coverage that images' kept tokens reach, and as control the smallest between
two questions. The exit code is 0 if the control is at least ten times as large, and both keep the same numbers.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from mmtok_bench.families import FamilyName
from mmtok_bench.results import append_row, make_row
from mmtok_bench.run import quiet_transformers, run_command
from mmtok_bench.server import make_server
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from tests.runtime.chats import Chat, small
from tests.runtime.quantised import Quantisation, quantise

BENCH = "device-quantised"
_FAMILY: FamilyName = "qwen2.5-vl"
_IMAGES = (small("coffee"), small("chelsea", 448, 280), small("astronaut", 280, 448))
_QUESTIONS = ("What is in this cup?", "How many cats are on the red table?")
# In 16 bits, as SGLang's kernels for AWQ and GPTQ take them.
_ARGUMENTS = (
    *("--mmtok-budget=10%", "--dtype=float16", "--mm-attention-backend=sdpa", "--sampling-backend=pytorch"),
    *("--disable-cuda-graph", "--max-total-tokens=16384", "--mem-fraction-static=0.5"),
)


def coverages(path: Path, log_path: Path, server_args: Sequence[str] = ()) -> list[list[tuple[int, float]]]:
    """Returns what is kept of each image, and the coverage that it reaches: a list a question."""

    def ask(image: Any, question: str) -> tuple[int, float]:
        answer = server.client().chat.completions.create(
            model="default",
            messages=Chat.ask(image, question).for_server(),  # type: ignore[arg-type]
            max_tokens=1,
            extra_body={"return_meta_info": True},
        )
        ((told,),) = [account["images"] for account in answer.choices[0].meta_info["mmtok"]]  # type: ignore[attr-defined]
        return told["tokens_kept"], told["coverage"]

    with make_server(path, _FAMILY, *_ARGUMENTS, *server_args, on_cpu=False, log_path=log_path) as server:
        return [[ask(image, question) for image in _IMAGES] for question in _QUESTIONS]


def compare(
    whole: list[list[tuple[int, float]]], quantised: list[list[tuple[int, float]]]
) -> tuple[dict[str, float], bool]:
    """Returns the differences of coverage, and whether the same numbers of tokens are kept."""
    pairs = [pair for each in zip(whole, quantised, strict=True) for pair in zip(*each, strict=True)]
    differences = [abs(one - other) for (_, one), (_, other) in pairs]
    of_questions = [abs(one - other) for (_, one), (_, other) in zip(*whole, strict=True)]
    metrics = {"max_difference": max(differences), "control_difference": min(of_questions)}
    return metrics, all(one == other for (one, _), (other, _) in pairs)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="tests.runtime.device_quantised")
    parser.add_argument("folder", type=Path, help="for the row, the checkpoints and the servers' logs")
    parser.add_argument("--method", choices=get_args(Quantisation), required=True)
    parser.add_argument("--server-args", type=shlex.split, default=[], help="further arguments of the servers")
    arguments = parser.parse_args(argv)
    return run_command("device_quantised", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    folder, method = arguments.folder, arguments.method
    checkpoint = make_tiny_checkpoint(_FAMILY, folder / "checkpoints" / "whole")
    path = quantise(checkpoint, folder / "checkpoints" / method, method)
    whole = coverages(checkpoint, folder / "whole.log", arguments.server_args)
    metrics, is_same = compare(whole, coverages(path, folder / f"{method}.log", arguments.server_args))
    row = make_row(BENCH, {"method": method}, "sglang", metrics, num_runs=len(_IMAGES), device=torch.device("cuda"))
    append_row(folder / "device-quantised.jsonl", row)
    print(metrics)
    return 0 if is_same and metrics["control_difference"] >= 10 * metrics["max_difference"] else 1


if __name__ == "__main__":
    sys.exit(main())
