"""The load generator: SGLang's own `sglang.benchmark.serving`, run as the command that users run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmtok_bench.client import MeasurementError, user_message
from mmtok_bench.photographs import photograph_url
from mmtok_bench.process_tree import end_process_tree
from mmtok_bench.serve.plan import LoadCase
from mmtok_bench.serve.presets import Size

__all__ = ["LoadError", "LoadResult", "load_command", "read_load", "run_load", "write_chats"]

_TIMEOUT_S = 3600.0
_POLL_INTERVAL_S = 0.2
_LOG_END_LINES = 15
# About as long as QUESTIONS are; of the load generator's random words.
_RANDOM_TEXT_TOKENS = 20


class LoadError(MeasurementError):
    """A load generator that failed, or that brought no answer back."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What the load generator saw, request by request.

    Args:
        ttfts_s: Time to first token of each answered request.
        itls_s: Times between the tokens of each of them.
        prompt_tokens: Tokens of each one's prompt, as the server counted: after pruning.
        output_tokens: Tokens of the answers, together.
        duration_s: From the first request to the last answer.
        num_failed: Requests without an answer.
        first_error: What the first of those came to; empty if there are none.
    """

    ttfts_s: tuple[float, ...]
    itls_s: tuple[tuple[float, ...], ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: int
    duration_s: float
    num_failed: int = 0
    first_error: str = ""


def write_chats(
    path: Path,
    image_px: Size,
    sent_px: Size,
    seeds: Sequence[str],
    questions: Sequence[str],
    *,
    lossless: bool = False,
) -> None:
    """Writes one chat a line, as the load generator's `openai` data set has them: a photograph and a question.

    Args:
        path: The file.
        image_px: Size of the photographs.
        sent_px: Size at which they are sent.
        seeds: Of the photographs, one a chat.
        questions: Asked in turns.
        lossless: Photographs are PNGs, not JPEGs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for number, seed in enumerate(seeds):
            url = photograph_url(image_px, sent_px, seed, lossless=lossless)
            message = user_message([url], questions[number % len(questions)])
            file.write(json.dumps({"messages": [message]}) + "\n")


def load_command(
    case: LoadCase,
    url: str,
    model_path: str,
    *,
    num_requests: int,
    output_tokens: int,
    seed: int,
    chats: Path,
    output: Path,
) -> list[str]:
    """Returns the load generator's command line for one case.

    Args:
        case: What to measure.
        url: The server's address.
        model_path: The model's folder, for its tokenizer and processor.
        num_requests: Requests in all.
        output_tokens: Tokens of each answer, which no end token cuts short.
        seed: Of random images.
        chats: The file with photographs, for cases that send them.
        output: Where the load generator appends its result.
    """
    if case.image_kind == "photograph":
        data = [
            *("--dataset-name=openai", f"--dataset-path={chats}"),
            f"--sharegpt-output-len={output_tokens}",
        ]
    else:
        width, height = case.sent_px
        data = [
            *("--dataset-name=image", "--image-count=1", "--image-content=random", "--image-format=jpeg"),
            f"--image-resolution={height}x{width}",
            *(f"--random-input-len={_RANDOM_TEXT_TOKENS}", f"--random-output-len={output_tokens}"),
            "--random-range-ratio=1.0",
        ]
    return [
        *(sys.executable, "-m", "sglang.benchmark.serving", "--backend=sglang-oai-chat"),
        *(f"--base-url={url}", f"--model={model_path}", f"--tokenizer={model_path}"),
        *data,
        *(f"--num-prompts={num_requests}", f"--max-concurrency={case.concurrency}", f"--seed={seed}"),
        # Servers are warmed up by others, with images that are not asked about here.
        "--warmup-requests=0",
        # So that the prompt's length is the server's count.
        f"--extra-request-body={json.dumps({'stream_options': {'include_usage': True}, **case.request_fields})}",
        *("--disable-tqdm", "--output-details", f"--output-file={output}"),
    ]


def run_load(
    command: Sequence[str],
    log: Path,
    *,
    is_server_alive: Callable[[], bool] = lambda: True,
    timeout_s: float = _TIMEOUT_S,
) -> None:
    """Runs the load generator to its end, or to that of the server.

    Raises:
        LoadError: It failed, took longer than `timeout_s`, or lost its server; the message ends with its log's end.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # Requests go to this machine: a proxy named in the environment is not asked.
    environment = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONWARNINGS": "ignore"}
    deadline_s = time.monotonic() + timeout_s
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            # Ctrl-C reaches this process alone, which then ends it.
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() < deadline_s and is_server_alive():
                time.sleep(_POLL_INTERVAL_S)
            status = process.returncode
        finally:
            if process.returncode is None:
                end_process_tree(process.pid, grace_s=1.0)
                process.wait()
    if status != 0:
        ended = "was stopped: no server, or no time left" if status is None else f"failed (exit status {status})"
        lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-_LOG_END_LINES:]
        raise LoadError(f"the load generator {ended}. The end of its log, {log}:\n" + "\n".join(lines))


def read_load(output: Path) -> LoadResult:
    """Returns the last result in the load generator's output file.

    Raises:
        LoadError: There is none, it is not of the form that is known, or no request was answered.
    """
    try:
        result = json.loads(output.read_text(encoding="utf-8").splitlines()[-1])
        answered = [number for number, error in enumerate(result["errors"]) if not error]
        ttfts_s = tuple(float(result["ttfts"][number]) for number in answered)
        itls_s = tuple(tuple(map(float, result["itls"][number])) for number in answered)
        prompt_tokens = tuple(int(result["input_lens"][number]) for number in answered)
        output_tokens = sum(int(result["output_lens"][number]) for number in answered)
        duration_s, errors = float(result["duration"]), [error for error in result["errors"] if error]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise LoadError(f"{output} is no result of SGLang 0.5.23's load generator: {error!r}") from error
    if not answered:
        raise LoadError(f"no request was answered; the first error: {errors[0] if errors else 'none'}")
    # SGLang's load generator leaves the time at 0 where no text came: that would pass for the best of all.
    if not all(ttfts_s):
        raise LoadError(f"{ttfts_s.count(0.0)} of {len(answered)} answers had no text, so no time to first token")
    return LoadResult(
        ttfts_s, itls_s, prompt_tokens, output_tokens, duration_s, len(errors), errors[0] if errors else ""
    )
