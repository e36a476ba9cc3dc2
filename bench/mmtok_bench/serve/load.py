"""The load generator: SGLang's own `sglang.benchmark.serving`, with the arguments that users give it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mmtok_bench.client import MeasurementError, user_message
from mmtok_bench.load_images import Shown, load_image_url
from mmtok_bench.process_tree import running_process
from mmtok_bench.serve.plan import LoadCase
from mmtok_bench.serve.presets import Size

__all__ = ["LoadError", "LoadGenerator", "LoadResult", "load_arguments", "load_command", "read_load", "write_chats"]

_MODULE = "sglang.benchmark.serving"
_TIMEOUT_S = 3600.0
_POLL_INTERVAL_S = 0.2
_LOG_END_LINES = 15
# Random words of the load generator, about as long as QUESTIONS.
_RANDOM_TEXT_TOKENS = 20


class LoadError(MeasurementError):
    """The load generator failed, or no request was answered."""


@dataclass(frozen=True, slots=True)
class LoadResult:
    """Results of the load generator, for each request.

    Args:
        ttfts_s: Time to first token of each answered request.
        itls_s: Times between the tokens of each answered request.
        prompt_tokens: Prompt tokens of each answered request, as the server counts them: after pruning.
        output_tokens: Sum of the answers' tokens.
        duration_s: Seconds from the first request to the last answer.
        answered: Numbers of the answered requests, in the order in which they were sent.
        num_failed: Number of requests without an answer.
        first_error: Error of the first failed request; empty if there is none.
    """

    ttfts_s: tuple[float, ...]
    itls_s: tuple[tuple[float, ...], ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: int
    duration_s: float
    answered: tuple[int, ...] = ()
    num_failed: int = 0
    first_error: str = ""


def write_chats(
    path: Path, shown: Shown, image_px: Size, sent_px: Size, asked: Sequence[tuple[str, str]], *, lossless: bool = False
) -> None:
    """Writes one chat per line in the format of the load generator's `openai` data set: an image and a question.

    Args:
        path: The file.
        shown: What the images show.
        image_px: Size of the images.
        sent_px: Size at which they are sent.
        asked: The image's seed and the question of each chat.
        lossless: Whether images are PNGs; otherwise JPEGs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    urls = {seed: load_image_url(shown, image_px, sent_px, seed, lossless=lossless) for seed in dict(asked)}
    with path.open("w", encoding="utf-8") as file:
        for seed, question in asked:
            file.write(json.dumps({"messages": [user_message([urls[seed]], question)]}) + "\n")


def load_command(arguments: Sequence[str]) -> list[str]:
    """Returns the command line that runs a load with these arguments."""
    return [sys.executable, "-m", _MODULE, *arguments]


def load_arguments(
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
    """Returns the load generator's arguments for one case.

    Args:
        case: What to measure.
        url: The server's address.
        model_path: The model's folder, for its tokenizer and processor.
        num_requests: Requests in all.
        output_tokens: Tokens of each answer, which no end token cuts short.
        seed: Seed of random images.
        chats: The file of chats, for cases other than those of random images.
        output: File to which the load generator appends its result.
    """
    if case.image_kind != "random":
        data = [*("--dataset-name=openai", f"--dataset-path={chats}"), f"--sharegpt-output-len={output_tokens}"]
    else:
        width, height = case.sent_px
        data = [
            *("--dataset-name=image", "--image-count=1", "--image-content=random", "--image-format=jpeg"),
            f"--image-resolution={height}x{width}",
            *(f"--random-input-len={_RANDOM_TEXT_TOKENS}", f"--random-output-len={output_tokens}"),
            "--random-range-ratio=1.0",
        ]
    return [
        "--backend=sglang-oai-chat",
        *(f"--base-url={url}", f"--model={model_path}", f"--tokenizer={model_path}"),
        *data,
        *(f"--num-prompts={num_requests}", f"--max-concurrency={case.concurrency}", f"--seed={seed}"),
        # Servers are warmed up before, with other images.
        "--warmup-requests=0",
        # With usage, the prompt's length is the server's count.
        f"--extra-request-body={json.dumps({'stream_options': {'include_usage': True}, **case.request_fields})}",
        *("--disable-tqdm", "--output-details", f"--output-file={output}"),
    ]


class LoadGenerator:
    """SGLang's load generator, in a process that imports it once and forks for each load.

    The import takes 9 s of CPU. The process runs from `start`, or the first load, until the `with` block ends or a load
    is stopped. It has a session of its own, so that Ctrl-C reaches only this process, which then ends it.

    Args:
        module: Name of the module to import; its `cli_main` runs a load.
    """

    def __init__(self, module: str = _MODULE) -> None:
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._block = contextlib.ExitStack()
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115

    def __enter__(self) -> LoadGenerator:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._errors.close()

    def start(self) -> None:
        """Starts the process, if it is not running, and returns at once, so that servers can start meanwhile."""
        if self._process is not None:
            return
        # Requests go to this machine: a proxy named in the environment is not used.
        environment = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "PYTHONWARNINGS": "ignore"}
        self._process = self._block.enter_context(
            running_process(
                [sys.executable, "-m", "mmtok_bench.serve.load_process", self._module],
                grace_s=1.0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                bufsize=0,
                env={**os.environ, **environment},
            )
        )

    def stop(self) -> None:
        """Ends the process and its load."""
        self._process = None
        self._block.close()

    def run(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        is_server_alive: Callable[[], bool] = lambda: True,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        """Runs a load until it ends, or until the server dies.

        Args:
            arguments: Arguments of the load generator.
            log: File for its output.
            is_server_alive: Called while the load runs; False stops it.
            timeout_s: Seconds after which the load is stopped.

        Raises:
            LoadError: The load failed, took longer than `timeout_s`, or its server died; the message ends with the last
                lines of its log.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        self.start()
        status = None
        try:
            status = self._status_of(arguments, log, is_server_alive, time.monotonic() + timeout_s)
        finally:
            if status is None:
                self.stop()
        if status != 0:
            ended = "was stopped: no server, or no time left" if status is None else f"failed (exit status {status})"
            lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-_LOG_END_LINES:]
            raise LoadError(f"the load generator {ended}. The end of its log, {log}:\n" + "\n".join(lines))

    def _status_of(
        self, arguments: Sequence[str], log: Path, is_server_alive: Callable[[], bool], deadline_s: float
    ) -> int | None:
        """Returns the exit status of a load; None if it has not ended.

        Raises:
            LoadError: The process died.
        """
        assert self._process is not None
        told, statuses = self._process.stdin, self._process.stdout
        assert told is not None
        assert statuses is not None
        try:
            told.write(json.dumps({"arguments": list(arguments), "log": str(log)}).encode() + b"\n")
            while time.monotonic() < deadline_s and is_server_alive():
                if select.select([statuses], [], [], _POLL_INTERVAL_S)[0]:
                    return int(statuses.readline())
        except (BrokenPipeError, ValueError):
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").rstrip().splitlines()[-_LOG_END_LINES:]
            raise LoadError(f"{self._module} does not run. The end of what it said:\n" + "\n".join(lines)) from None
        return None


def read_load(output: Path) -> LoadResult:
    """Returns the last result in the load generator's output file.

    Raises:
        LoadError: There is no result, its format is not known, or no request was answered.
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
    # SGLang's load generator leaves the time at 0 if no text came, which would count as the best of all.
    if not all(ttfts_s):
        raise LoadError(f"{ttfts_s.count(0.0)} of {len(answered)} answers had no text, so no time to first token")
    first_error = errors[0] if errors else ""
    return LoadResult(
        ttfts_s, itls_s, prompt_tokens, output_tokens, duration_s, tuple(answered), len(errors), first_error
    )
