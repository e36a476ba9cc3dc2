"""Holds a pruned float32 server against the hand-pruned model, both on one device, with a mistake as control.

    python -m tests.runtime.device_logprobs artifacts/logprobs --family qwen2.5-vl

A row with the largest difference of the logprobs over all chats, and the smallest that the mistake makes: the tokens of
another question, or for Qwen2.5-VL the positions of the first tokens in place of their own. The exit code is 0 if the
mistake is at least ten times as large.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import get_args

import torch

from mmtok_bench.families import FamilyName
from mmtok_bench.results import append_row, make_row
from mmtok_bench.run import quiet_transformers, run_command
from mmtok_bench.server import make_server
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from tests.runtime.chats import Chat, small
from tests.runtime.hand_pruned import HandPruned
from tests.runtime.serving import Served

BENCH = "device-logprobs"
_BUDGET = 0.1
_CHATS = (
    Chat.ask(small("coffee"), "What is in this cup?"),
    Chat.ask(small("chelsea", 448, 280), "How many cats are on the red table?"),
    Chat.ask(small("coffee"), small("astronaut", 280, 448), "Which of both is darker?"),
)
_OTHER_QUESTION = "Is there a person, a boat or a yellow car in front of the mountain?"
# TensorFloat-32 keeps 10 bits of a float32's 23. Without graphs, whose kernels are others.
_ON_CUDA = (
    *("--dtype=float32", "--attention-backend=torch_native", "--mm-attention-backend=sdpa"),
    *("--sampling-backend=pytorch", "--disable-cuda-graph", "--max-total-tokens=16384", "--mem-fraction-static=0.5"),
)


def measure(served: Served) -> dict[str, float]:
    """Returns the largest difference of the chats, and the smallest that the mistake makes."""
    errors, mistakes = [], []
    for chat in _CHATS:
        account = served.ask(chat)
        prompt = served.judge.prompt(chat.for_template())
        pruned = served.judge.prune(prompt, chat.images, chat.guidance, _BUDGET)
        errors.append(served.judge.max_error(pruned, account))
        if served.family.startswith("qwen"):
            wrong = served.judge.prune(prompt, chat.images, chat.guidance, _BUDGET, original_positions=False)
        else:
            wrong = served.judge.prune(prompt, chat.images, [_OTHER_QUESTION] * len(chat.images), _BUDGET)
        mistakes.append(served.judge.max_error(wrong, account))
    return {"max_error": max(errors), "control_error": min(mistakes)}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="tests.runtime.device_logprobs")
    parser.add_argument("folder", type=Path, help="for the row, the checkpoint and the server's log")
    parser.add_argument("--family", choices=get_args(FamilyName), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default %(default)s")
    arguments = parser.parse_args(argv)
    return run_command("device_logprobs", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    family, device = arguments.family, torch.device(arguments.device)
    on_cpu = device.type == "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    checkpoint = make_tiny_checkpoint(family, arguments.folder / "checkpoints" / family)
    server = make_server(
        checkpoint,
        family,
        *("--enable-cache-report", f"--mmtok-budget={_BUDGET:.0%}"),
        *(() if on_cpu else _ON_CUDA),
        on_cpu=on_cpu,
        env={"NVIDIA_TF32_OVERRIDE": "0"},
        log_path=arguments.folder / f"{family}.log",
    )
    judge = HandPruned(family, checkpoint, device)
    with server:
        metrics = measure(Served(family, server, judge))
    row = make_row(BENCH, {"family": family}, "sglang", metrics, num_runs=len(_CHATS), device=device)
    append_row(arguments.folder / "device-logprobs.jsonl", row)
    print(metrics)
    return 0 if metrics["control_error"] >= 10 * metrics["max_error"] else 1


if __name__ == "__main__":
    sys.exit(main())
