"""Time to first token of a second question about an image: with the cache of vision features and without."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import openai
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from mmtok_bench.chat import ask, image_url
from mmtok_bench.families import family_arguments
from mmtok_bench.photographs import PHOTOGRAPHS, photograph
from mmtok_bench.progress import progress_bar
from mmtok_bench.results import ResultRow, append_row, latencies_ms, make_latency_row, new_result_file
from mmtok_bench.server import ServerError, SglangServer, cpu_arguments, cpu_environment, running
from mmtok_bench.tiny_checkpoints import make_tiny_checkpoint

__all__ = ["run_second_question_bench"]

_BENCH = "second-question"
_SIZES_PX = (336, 320)
_QUESTIONS = ("What is in this picture?", "Which colours are there?")
_CACHES_MB = (256, 0)


def run_second_question_bench(
    *, folder: Path = Path("artifacts/bench/second-question"), json_output: bool = False
) -> int:
    """Returns the exit code of `mmtok bench second-question`: 0, 1 if a server failed, 130 after Ctrl-C.

    Two servers side by side, with a feature cache and without, are asked in turns about the same photographs, twice
    about each. The model is a LLaVA-1.5 of random weights whose vision encoder has its real size and whose language
    model is tiny, so that the encoder is nearly all there is to wait for.

    Args:
        folder: Where the checkpoint, the servers' logs and the rows go.
        json_output: Print the rows instead of the table.
    """
    transformers_logging.disable_progress_bar()
    console = Console(highlight=False, stderr=json_output)
    try:
        images = [photograph(name).resize((size, size)) for name in PHOTOGRAPHS for size in _SIZES_PX]
        with progress_bar(console) as progress:
            bar = progress.add_task("making the checkpoint", total=len(images))
            checkpoint = make_tiny_checkpoint("llava-1.5", folder / "checkpoint", real_encoder=True)
            servers = {cache_mb: _server(checkpoint, cache_mb, folder) for cache_mb in _CACHES_MB}
            progress.update(bar, description="starting two servers")
            with running(*servers.values()):
                progress.update(bar, description="asking about photographs")
                times_ms = _measure(servers, images, lambda: progress.advance(bar))
    except (ServerError, openai.OpenAIError, OSError) as error:
        print(f"mmtok bench second-question: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        console.print("Stopped; the servers have ended.")
        return 130
    rows = _write(times_ms, folder)
    if json_output:
        print("\n".join(json.dumps(asdict(row)) for row in rows))
    else:
        console.print(_table(rows))
    return 0


def _server(checkpoint: Path, cache_mb: int, folder: Path) -> SglangServer:
    device = () if torch.cuda.is_available() else cpu_arguments()
    return SglangServer(
        checkpoint,
        *device,
        *family_arguments("llava-1.5"),
        *("--enable-cache-report", "--mmtok-budget=64"),
        f"--mmtok-feature-cache-mb={cache_mb}",
        env={} if torch.cuda.is_available() else cpu_environment(),
        log_path=folder / "logs" / f"cache-{cache_mb}.log",
    )


def _measure(
    servers: dict[int, SglangServer], images: list[Image.Image], on_image: Callable[[], None]
) -> dict[tuple[int, int], list[float]]:
    """Returns the milliseconds of every question, by the cache's size and the question's number."""
    clients = {cache_mb: server.client() for cache_mb, server in servers.items()}
    warm_up = image_url(photograph("coffee").resize((200, 200)))
    for client in clients.values():
        ask(client, warm_up, "What is this?", max_tokens=1)
    times_ms: dict[tuple[int, int], list[float]] = {}
    for done, image in enumerate(images):
        # In turns, so that whatever else the machine does slows both.
        order = list(clients) if done % 2 == 0 else list(reversed(clients))
        for cache_mb in order:
            for number, question in enumerate(_QUESTIONS, start=1):
                answer = ask(clients[cache_mb], image_url(image), question, max_tokens=1)
                times_ms.setdefault((cache_mb, number), []).append(answer.ttft_ms)
        on_image()
    return times_ms


def _write(times_ms: dict[tuple[int, int], list[float]], folder: Path) -> list[ResultRow]:
    path = new_result_file(folder, _BENCH)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for (cache_mb, number), runs in times_ms.items():
        case = {"feature_cache_mb": cache_mb, "question": number}
        rows.append(make_latency_row(_BENCH, case, "sglang", runs, device))
        append_row(path, rows[-1])
    return rows


def _table(rows: list[ResultRow]) -> Table:
    first = rows[0]
    table = Table(
        title=f"Time to first token, median of {first.num_runs} images\n{first.device}, {first.time[:10]}",
        title_justify="left",
    )
    for heading in ("--mmtok-feature-cache-mb", "first question", "second question"):
        table.add_column(heading, justify="right")
    for cache_mb in _CACHES_MB:
        by_number = {row.case["question"]: row for row in rows if row.case["feature_cache_mb"] == cache_mb}
        medians_ms = [latencies_ms(by_number[number])[1] for number in (1, 2)]
        table.add_row(f"{cache_mb}", *(f"{median_ms:.0f} ms" for median_ms in medians_ms))
    return table
