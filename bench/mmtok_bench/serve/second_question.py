"""Runs `mmtok bench second-question`: TTFT of a second question, with the cache of vision features and without."""

from __future__ import annotations

import argparse

import torch

from mmtok_bench.client import ask, image_url
from mmtok_bench.results import make_latency_row
from mmtok_bench.run import Run, quiet_transformers, run_command
from mmtok_bench.server import make_server, running
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint
from mmtok_deploy.photographs import PHOTOGRAPHS, photograph

__all__ = ["run_second_question_bench"]

_BENCH = "second-question"
_SIZES_PX = (336, 320)
_QUESTIONS = ("What is in this picture?", "Which colours are there?")
_CACHES_MB = (256, 0)


def run_second_question_bench(arguments: argparse.Namespace) -> int:
    """Returns the exit code of `mmtok bench second-question`: 1 if a server or a request failed.

    Two servers side by side, with a feature cache and without, are asked in turns about the same photographs, twice
    about each. The model is a LLaVA-1.5 of random weights whose vision encoder has its real size and whose language
    model is tiny, so that the encoder is nearly all there is to wait for.
    """
    return run_command("mmtok bench second-question", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    quiet_transformers()
    on_cpu = not torch.cuda.is_available()
    images = [photograph(name).resize((size, size)) for name in PHOTOGRAPHS for size in _SIZES_PX]
    run = Run(_BENCH, arguments.results_dir, json_output=arguments.json)
    times_ms: dict[tuple[int, int], list[float]] = {}
    with run.steps(len(images)):
        run.step("making the checkpoint")
        checkpoint = make_tiny_checkpoint("llava-1.5", arguments.results_dir / "checkpoint", real_encoder=True)
        servers = {
            cache_mb: make_server(
                checkpoint,
                "llava-1.5",
                *("--enable-cache-report", "--mmtok-budget=64", f"--mmtok-feature-cache-mb={cache_mb}"),
                on_cpu=on_cpu,
                log_path=run.folder / f"cache-{cache_mb}.log",
            )
            for cache_mb in _CACHES_MB
        }
        run.step("starting two servers")
        with running(*servers.values()):
            clients = {cache_mb: server.client() for cache_mb, server in servers.items()}
            warm_up = image_url(photograph("coffee").resize((200, 200)))
            for client in clients.values():
                ask(client, warm_up, "What is this?", max_tokens=1)
            run.step("asking about photographs")
            for number, image in enumerate(images):
                # In turns, so that whatever else the machine does slows both.
                for cache_mb in list(clients)[:: 1 if number % 2 == 0 else -1]:
                    for question_number, question in enumerate(_QUESTIONS, start=1):
                        answer = ask(clients[cache_mb], image_url(image), question, max_tokens=1)
                        times_ms.setdefault((cache_mb, question_number), []).append(answer.ttft_ms)
                run.advance()
    for (cache_mb, question_number), of_question in times_ms.items():
        case = {"feature_cache_mb": cache_mb, "question": question_number}
        run.add(make_latency_row(_BENCH, case, "sglang", of_question, torch.device("cpu" if on_cpu else "cuda")))
    run.show()
    return 0
