"""Runs the checks that need an NVIDIA GPU, in parts of a few minutes, and compares each with its bar.

    python -m mmtok_bench.gpu_check --list
    python -m mmtok_bench.gpu_check --dry-run                 # prints the commands, also without a GPU
    python -m mmtok_bench.gpu_check --parts kernels,selector
    python -m mmtok_bench.gpu_check                           # all parts; those that are done are not run again
    python -m mmtok_bench.gpu_check --server-args='--attention-backend triton'   # for all servers

A part is meant to take four minutes on an H200, whose memory holds the servers of a 7B model side by side. On a GPU
with less than 120 GiB one server runs at a time, and each case is measured once. Rows, logs, the table of bars and an
archive of them are written to artifacts/gpu-check. The exit code is 0 if all bars are reached; 1 if a bar is not
reached or not measured, or a command failed; 2 for a wrong argument or without a GPU; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from mmtok_bench.arguments import each
from mmtok_bench.families import FamilyName
from mmtok_bench.process_tree import running_process
from mmtok_bench.results import CaseValue, ResultRow, append_row, make_latency_row, read_rows, row_files
from mmtok_bench.run import run_command
from mmtok_bench.selector.timing import make_problem
from mmtok_deploy.backends import get_backend
from mmtok_deploy.config import SelectionConfig

__all__ = ["DONE", "PARTS", "Bar", "Part", "exit_codes_in", "judge", "main", "print_parts", "run_part"]

_TIMEOUT_S = 600
_SERVER_ARGS = "--server-args="
_WITH_SERVER_ARGS = ("mmtok_bench.served_checks", "tests.runtime.device_logprobs", "tests.runtime.device_quantised")
_LARGE_GIB = 120
DONE = "done.json"
"""File in a part's folder after it has run: the exit codes of its commands, and the seconds."""

Rows = Sequence[ResultRow]
Find = Callable[[Rows], ResultRow | None]
"""Returns one of a part's rows; None if there is no such row."""
Measure = Callable[[Rows], float | None]
"""Returns a value from a part's rows; None if a row is missing."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A value that a part has to reach.

    Args:
        text: What is measured.
        bound: "at least" or "at most", a number and a unit: "at least 1.25 x".
        measure: Measures the value.
        is_choice: Whether the bar only says which of two settings is better; it then never fails.
    """

    text: str
    bound: str
    measure: Measure
    is_choice: bool = False

    @property
    def shown_bound(self) -> str:
        """The bound as the table shows it."""
        return f"the better setting: {self.bound}" if self.is_choice else self.bound

    def judge(self, rows: Rows) -> tuple[str, bool | None]:
        """Returns the measured value as text, and whether it reaches the bound (None if it was not measured)."""
        value = self.measure(rows)
        if value is None or math.isnan(value):
            return "not measured", None
        _, side, number, *unit = self.bound.split()
        is_reached = value <= float(number) if side == "most" else value >= float(number)
        return " ".join([f"{value:.3g}", *unit]), is_reached


@dataclass(frozen=True, slots=True)
class Part:
    """Commands that run one after another, and the bars that their rows are compared with.

    Args:
        name: Name on the command line.
        about: A short description.
        commands: Arguments of Python; FOLDER in them is replaced by the part's folder, PRESET and ROUNDS by values
            that fit the GPU.
        bars: Empty for tests, where the exit code is the result.
        in_process: Measures rows in this process.
        beside: Another part, whose rows the bars read as well.
        needs_gib: GPU memory that the part needs; with less it is not run.
        timeout_s: The time limit of each command; None is ten minutes.
    """

    name: str
    about: str
    commands: tuple[tuple[str, ...], ...] = ()
    bars: tuple[Bar, ...] = ()
    in_process: Callable[[], list[ResultRow]] | None = None
    beside: str | None = None
    needs_gib: int = 0
    timeout_s: float | None = None


def _served(
    rows: Rows, budget: str, concurrency: int, *, questions: int = 1, arguments: str = "", kind: str = "photograph"
) -> ResultRow | None:
    """Returns the newest row of the largest images; for several questions, of a server with prefix cache."""
    found = [
        row
        for row in rows
        if row.bench == "serve"
        and row.case["budget"] == budget
        and row.case["concurrency"] == concurrency
        and row.case["image_kind"] == kind
        and row.case["prefix_cache"] == ("off" if questions == 1 else "on")
        and row.case.get("questions_per_image", 1) == questions
        and row.case.get("server_arguments", "") == arguments
        and row.case["method"] == ("none" if budget in ("off", "all") else "mmtok")
    ]
    return max(found, key=lambda row: (row.metrics["image_tokens_in"], row.time), default=None)


def _measured(value: Callable[..., float | None], *finds: Find) -> Measure:
    """Returns a measure that computes a value from the metrics of the rows that `finds` return."""

    def measure(rows: Rows) -> float | None:
        found = [find(rows) for find in finds]
        return value(*(row.metrics for row in found if row is not None)) if None not in found else None

    return measure


def _load(budget: str, concurrency: int, **load: Any) -> Find:
    return partial(_served, budget=budget, concurrency=concurrency, **load)


def _ratio(metric: str, *finds: Find) -> Measure:
    """Returns a measure of how many times as good a metric of the first row is as that of the second."""
    is_time = metric.endswith("_ms")
    return _measured(lambda ours, theirs: (ours[metric] / theirs[metric]) ** (-1 if is_time else 1), *finds)


def _gain(metric: str, budget: str, concurrency: int, **load: Any) -> Measure:
    """Returns a measure of how many times as good a budget is as no budget; with several rounds, their median."""
    find, of_rounds = _load(budget, concurrency, **load), f"{metric.removesuffix('_ms')}_gain"
    ratio = _ratio(metric, find, _load("off", concurrency, **load))

    def measure(rows: Rows) -> float | None:
        row = find(rows)
        return ratio(rows) if row is None or of_rounds not in row.metrics else row.metrics[of_rounds]

    return measure


def _of_row(bench: str, value: Callable[[Mapping[str, float]], float | None], **case: CaseValue) -> Measure:
    """Returns a measure of the newest row of a bench whose case has these values."""
    return _measured(value, partial(_row, bench=bench, case=case))


def _row(rows: Rows, bench: str, case: Mapping[str, CaseValue]) -> ResultRow | None:
    return next((row for row in reversed(rows) if row.bench == bench and case.items() <= row.case.items()), None)


def _selection_share(concurrency: int) -> Bar:
    share = _measured(lambda metrics: 100 * metrics["selection_ms"] / metrics["ttft_p50_ms"], _load("10%", concurrency))
    return Bar("the selection's share of TTFT", "at most 2 %", share)


def _gpu_time_ratio(*metrics: Mapping[str, float]) -> float:
    first, second = (each["vision_encoder_ms"] + each["selection_ms"] + each["language_prefill_ms"] for each in metrics)
    return first / second


def _graph(num_tokens: int, num_picks: int, dtype: str, batch: int = 1) -> Find:
    case: dict[str, CaseValue] = {"num_tokens": num_tokens, "num_picks": num_picks, "batch": batch, "dtype": dtype}
    return partial(_row, bench="selector-graph", case=case)


def _graph_ms(num_tokens: int, num_picks: int, dtype: str) -> Measure:
    return _measured(itemgetter("latency_p50_ms"), _graph(num_tokens, num_picks, dtype))


def _serve(model: str, budget: str, size: str, concurrency: str, *more: str, rounds: str = "ROUNDS") -> tuple[str, ...]:
    return (
        *("-m", "mmtok_deploy", "bench", "serve", "--preset", "PRESET", "--models", model),
        *("--budgets", budget, "--image-px", size, "--concurrency", concurrency),
        *(() if "--image-kinds" in more else ("--image-kinds", "photograph")),
        *(() if "--prefix-cache" in more else ("--prefix-cache", "off")),
        *("--rounds", rounds, "--num-requests", "16", "--output-tokens", "16", "--results-dir", "FOLDER", *more),
    )


def _rates(budget: str, concurrency: int, bound: float) -> Bar:
    return Bar(f"requests/s at {concurrency}", f"at least {bound:g} x", _gain("requests_per_s", budget, concurrency))


def _ttft(budget: str, concurrency: int, bound: float) -> Bar:
    return Bar(f"TTFT at {concurrency}", f"at least {bound:g} x", _gain("ttft_p50_ms", budget, concurrency))


def _qwen_7b(concurrency: int, *bars: Bar) -> Part:
    return Part(
        f"qwen-7b-{concurrency}",
        f"Qwen2.5-VL-7B, 864 -> 86, {concurrency} at once",
        (_serve("qwen2.5-vl-7b", "10%", "1008x672", str(concurrency)),),
        (
            Bar(f"`all`, requests/s at {concurrency}", "at least 0.98 x", _gain("requests_per_s", "all", concurrency)),
            *bars,
            _selection_share(concurrency),
        ),
    )


def _model(
    name: str,
    about: str,
    model: str,
    budget: str,
    size: str,
    *bars: Bar,
    rounds: str = "ROUNDS",
    needs_gib: int = 0,
    kind: str = "photograph",
) -> Part:
    serve = _serve(model, budget, size, "1,16", "--image-kinds", kind, rounds=rounds)
    return Part(name, about, (serve,), bars, needs_gib=needs_gib)


def _better(text: str, metric: str, *finds: Find, is_choice: bool = False) -> Bar:
    return Bar(text, "at least 1 x", _ratio(metric, *finds), is_choice)


def _setting(name: str, about: str, arguments: str) -> Part:
    """Returns a part that measures whether the presets should give these further arguments to all servers."""
    return Part(
        f"setting-{name}",
        f"{about}: {arguments}; beside qwen-7b-16",
        (_serve("qwen2.5-vl-7b", "10%", "1008x672", "16", f"--server-args={arguments}"),),
        tuple(
            _better(
                *(f"`{budget}` with it, requests/s at 16", "requests_per_s"),
                *(_load(budget, 16, arguments=arguments), _load(budget, 16)),
                is_choice=True,
            )
            for budget in ("off", "all", "10%")
        ),
        beside="qwen-7b-16",
    )


def _questions(name: str, about: str, concurrency: int, bound: float, *more: str, arguments: str = "") -> Part:
    told = (*more, *((f"--server-args={arguments}",) if arguments else ()))
    asked = ("--prefix-cache", "on", "--questions-per-image", "6", *told)
    gain = _gain("requests_per_s", "10%", concurrency, questions=6, arguments=arguments)
    return Part(
        name,
        f"Qwen2.5-VL-7B, 864 -> 86, 6 questions per image, {about}",
        (_serve("qwen2.5-vl-7b", "10%", "1008x672", str(concurrency), *asked),),
        (Bar(f"requests/s at {concurrency}", f"at least {bound:g} x", gain),),
    )


def _logprobs(family: str, prefill: str, encoder: str = "eager", drafts: str | None = None) -> tuple[Bar, ...]:
    def times(metrics: Mapping[str, float], name: str, of: str) -> float | None:
        return metrics[name] / metrics[of] if metrics[of] else math.inf

    def of_family(value: Callable[[Mapping[str, float]], float | None]) -> Measure:
        case = {"family": family, "prefill": prefill, "encoder": encoder} | ({"drafts": drafts} if drafts else {})
        return _of_row("device-logprobs", value, **case)

    what = family if prefill == "eager" else f"{family}, prefill graphs"
    what += ", encoder graphs" if encoder == "graphs" else ""
    what += f", drafts by {drafts}" if drafts else ""
    # On CUDA, SGLang serves its own models only in 16 bits, and captures prefills only with its attention for these.
    # The hand-pruned model in float16 rounds like them.
    is_half = not (family.startswith("llava") and prefill == "eager")
    of_question = of_family(partial(times, name="question_error", of="max_error"))
    of_positions = of_family(partial(times, name="position_error", of="max_error"))
    bars = [
        Bar(
            *(f"{what}, difference of logprobs, against that of the hand-pruned model in float16", "at most 2 x"),
            of_family(partial(times, name="max_error", of="half_error")),
        )
        if is_half
        else Bar(f"{what}, logprobs against the hand-pruned model", "at most 1e-3", of_family(itemgetter("max_error"))),
        Bar(f"{what}, another question's against that", f"at least {5 if is_half else 10} x", of_question),
    ]
    # Three of four layers of a Qwen3.5 have no positions, so wrong positions hardly show in float16.
    if family.startswith("qwen") and not family.startswith("qwen3.5"):
        bars.append(Bar(f"{what}, wrong positions' against that", "at least 5 x", of_positions))
    if prefill != "eager":
        # The three chats with images, asked one by one.
        bars.append(Bar(f"{what}, prefills replayed", "at least 3", of_family(itemgetter("num_replayed"))))
    if encoder == "graphs":
        bars.append(Bar(f"{what}, images replayed", "at least 1", of_family(itemgetter("num_encoder_replays"))))
    if drafts == "eagle3":  # the others guess too few of a tiny model's tokens
        bars.append(Bar(f"{what}, right drafts", "at least 1", of_family(itemgetter("num_correct_drafts"))))
    return tuple(bars)


def _quantised(method: str) -> tuple[Bar, ...]:
    def control(metrics: Mapping[str, float]) -> float:
        difference = metrics["max_difference"]
        return metrics["control_difference"] / difference if difference else math.inf

    of_method = partial(_of_row, "device-quantised", method=method)
    return (
        Bar(f"{method}, difference of coverage", "at most 0.001", of_method(itemgetter("max_difference"))),
        Bar(f"{method}, another question's against that", "at least 10 x", of_method(control)),
    )


def _device_logprobs(family: str, prefill: str, *more: str) -> tuple[str, ...]:
    return ("-m", "tests.runtime.device_logprobs", "FOLDER", "--family", family, "--prefill", prefill, *more)


def _time_graphs() -> list[ResultRow]:
    """Returns the times of the selection replayed as a CUDA graph."""
    device = torch.device("cuda")
    select = get_backend("triton", device)
    rows = []
    for num_tokens, num_picks, batch in ((2880, 160, 1), (576, 32, 1), (576, 64, 1), (576, 64, 32)):
        for dtype in (torch.bfloat16, torch.float32):
            problems = [
                replace(problem, **{name: getattr(problem, name).to(dtype) for name in ("vision", "keys", "text")})
                for problem in (make_problem(num_tokens, num_picks, seed, device) for seed in range(batch))
            ]
            times_ms = _replays_ms(lambda problems=problems: select(problems, SelectionConfig()))  # type: ignore[misc]
            case: dict[str, CaseValue] = {"num_tokens": num_tokens, "num_picks": num_picks, "batch": batch}
            case["dtype"] = str(dtype).removeprefix("torch.")
            rows.append(make_latency_row("selector-graph", case, "triton", times_ms, device))
    return rows


def _replays_ms(call: Callable[[], object]) -> list[float]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times_ms = []
    for run in range(33):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if run >= 3:
            times_ms.append(start.elapsed_time(end))
    return times_ms


_WITH_GRAPHS = tuple(family for family in get_args(FamilyName) if family.startswith(("llava", "qwen2.5", "qwen3")))
_WITH_ENCODER_GRAPHS = tuple(family for family in get_args(FamilyName) if family != "internvl3")
_WITH_VIDEOS: tuple[FamilyName, ...] = ("qwen2.5-vl", "qwen3-vl")
_WITH_DRAFTS: tuple[tuple[FamilyName, str], ...] = (
    *(("qwen2.5-vl", "ngram"), ("llava-1.5", "ngram")),
    *(("qwen2.5-vl", "eagle3"), ("qwen3-vl", "eagle3"), ("qwen3.5", "head")),
)
_QUANTISED = ("fp8", "awq", "gptq")
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")

_BATCH_COST = _measured(
    lambda many, one: many["latency_p50_ms"] / one["latency_p50_ms"],
    *(_graph(576, 64, "bfloat16", 32), _graph(576, 64, "bfloat16")),
)

# Bars of a model that was not measured before.
_NO_SLOWER = (
    Bar("`all`, requests/s at 16", "at least 0.98 x", _gain("requests_per_s", "all", 16)),
    _ttft("10%", 1, 1.0),
    _rates("10%", 16, 1.0),
)

PARTS: tuple[Part, ...] = (
    Part(
        "kernels",
        "the Triton kernels' tests on the GPU",
        ((*_PYTEST, "tests/mmtok_deploy/triton", "--deselect", "tests/mmtok_deploy/triton/test_interpreted.py"),),
    ),
    Part(
        "selector",
        "the selection beside the published loop, and replayed as a CUDA graph",
        (("-m", "mmtok_deploy", "bench", "selector", "--device", "cuda", "--output", "FOLDER"),),
        (
            Bar("2880 -> 160, bfloat16, graph", "at most 0.5 ms", _graph_ms(2880, 160, "bfloat16")),
            Bar("576 -> 32, bfloat16, graph", "at most 0.15 ms", _graph_ms(576, 32, "bfloat16")),
            Bar("2880 -> 160, float32, graph", "at most 1 ms", _graph_ms(2880, 160, "float32")),
            Bar("576 -> 64, 32 images against one", "at most 2 x", _BATCH_COST),
        ),
        _time_graphs,
    ),
    Part(
        "engines",
        "exported files: ONNX Runtime's CUDA provider and TensorRT",
        ((*_PYTEST, "tests/exporters", "tests/mmtok_deploy/test_engines.py", "tests/test_docs.py"),),
    ),
    Part(
        "first-request",
        "Qwen2.5-VL-7B, 10%: the first request of a server, and 500 random ones",
        (("-m", "mmtok_bench.served_checks", "FOLDER", "--model", "qwen2.5-vl-7b", "--requests", "500"),),
        (
            Bar(
                *("the first request's TTFT against the 90th percentile of the tenth and later ones", "at most 1.1 x"),
                _of_row("served-checks", lambda found: found["first_ttft_ms"] / found["later_ttft_p90_ms"]),
            ),
            Bar(
                *("kernels of MMTok compiled in 500 requests", "at most 0"),
                _of_row("served-checks", lambda found: found.get("triton_compiles")),
            ),
            Bar("requests that failed", "at most 0", _of_row("served-checks", itemgetter("num_failed"))),
        ),
    ),
    Part(
        "logprobs",
        "a pruned server against the hand-pruned model, both on the GPU",
        tuple(_device_logprobs(family, "eager") for family in get_args(FamilyName)),
        tuple(bar for family in get_args(FamilyName) for bar in _logprobs(family, "eager")),
    ),
    Part(
        "logprobs-graphs",
        "the same, with prefills by CUDA graphs",
        tuple(_device_logprobs(family, "graphs") for family in _WITH_GRAPHS),
        tuple(bar for family in _WITH_GRAPHS for bar in _logprobs(family, "graphs")),
    ),
    Part(
        "logprobs-encoder",
        "the same, with vision encoders by CUDA graphs",
        tuple(_device_logprobs(family, "eager", "--encoder", "graphs") for family in _WITH_ENCODER_GRAPHS),
        tuple(bar for family in _WITH_ENCODER_GRAPHS for bar in _logprobs(family, "eager", "graphs")),
    ),
    Part(
        "video",
        "the same of videos, and of images beside them; needs FFmpeg",
        tuple(_device_logprobs(family, "eager", "--videos") for family in _WITH_VIDEOS),
        tuple(bar for family in _WITH_VIDEOS for bar in _logprobs(family, "eager")),
    ),
    Part(
        "drafts",
        "the same, with tokens drafted from earlier text (NGRAM), by a draft model (EAGLE3) or by a Qwen3.5's head",
        tuple(_device_logprobs(family, "eager", "--drafts", drafts) for family, drafts in _WITH_DRAFTS),
        tuple(bar for family, drafts in _WITH_DRAFTS for bar in _logprobs(family, "eager", drafts=drafts)),
    ),
    Part(
        "quantised",
        "tokens kept of images by FP8, AWQ and GPTQ checkpoints, against the unquantised one's",
        tuple(("-m", "tests.runtime.device_quantised", "FOLDER", "--method", each) for each in _QUANTISED),
        tuple(bar for each in _QUANTISED for bar in _quantised(each)),
    ),
    _qwen_7b(1, _ttft("10%", 1, 1.25), _rates("10%", 1, 1.0)),
    _qwen_7b(16, _rates("10%", 16, 1.4)),
    _qwen_7b(64, _rates("10%", 64, 1.4)),
    _questions("qwen-7b-questions", "all images fit into the KV pool", 16, 1.0),
    # 34 images of 864 tokens and their questions are three times the KV pool; few run at once, so that they fit it.
    _questions(
        *("qwen-7b-questions-evicted", "images need three times the KV pool", 4, 1.5),
        *("--images-in-turn", "34"),
        arguments="--max-total-tokens=10000",
    ),
    _setting("one-tokenizer", "one tokenizer process instead of four", "--tokenizer-worker-num=1"),
    _setting("host-images", "images are preprocessed on the host", "--image-processor-backend=pil"),
    _setting("prefill-graphs", "prefill by breakable CUDA graphs", "--cuda-graph-backend-prefill=breakable"),
    _model(
        *("qwen-7b-scale", "Qwen2.5-VL-7B, 86 tokens of 216 at an encoder scale of 0.5, and of all 864"),
        *("qwen2.5-vl-7b", "10%,40%@0.5", "1008x672"),
        _better("TTFT at 1 against 10%", "ttft_p50_ms", _load("40%@0.5", 1), _load("10%", 1)),
        _better("requests/s at 16 against 10%", "requests_per_s", _load("40%@0.5", 16), _load("10%", 16)),
    ),
    _model(
        *("qwen-7b-repeats", "Qwen2.5-VL-7B, pages of text, repeated patches left out or not"),
        *("qwen2.5-vl-7b", "10%,10%~8", "1008x672"),
        _better(
            *("TTFT at 1 against 10%", "ttft_p50_ms"),
            *(_load("10%~8", 1, kind="document"), _load("10%", 1, kind="document")),
        ),
        _better(
            *("requests/s at 16 against 10%", "requests_per_s"),
            *(_load("10%~8", 16, kind="document"), _load("10%", 16, kind="document")),
        ),
        kind="document",
    ),
    _model(
        *("llava-next-13b", "LLaVA-NeXT-13B, 2880 -> 160, PNGs", "llava-next-13b", "160", "672x672"),
        _ttft("160", 1, 2.3),
        Bar("GPU time of a request", "at least 4 x", _measured(_gpu_time_ratio, _load("all", 1), _load("160", 1))),
        _rates("160", 16, 2.0),
        rounds="1",
    ),
    _model(
        *("llava-1.5-7b", "LLaVA-1.5-7B, 576 -> 64, PNGs", "llava-1.5-7b", "64", "336x336"),
        *(_ttft("64", 1, 1.15), _rates("64", 1, 1.0), _rates("64", 16, 1.0)),
        rounds="1",
    ),
    _model(
        *("qwen-32b", "Qwen2.5-VL-32B, 864 -> 86", "qwen2.5-vl-32b", "10%", "1008x672"),
        *(_ttft("10%", 1, 1.8), _rates("10%", 16, 1.8)),
        rounds="1",
        needs_gib=_LARGE_GIB,
    ),
    _model(
        *("qwen3-vl-8b", "Qwen3-VL-8B, 768 -> 76", "qwen3-vl-8b", "10%", "1024x768"),
        *(*_NO_SLOWER, _selection_share(1)),
    ),
    _model("qwen3.5-9b", "Qwen3.5-9B, 768 -> 76", "qwen3.5-9b", "10%", "1024x768", *_NO_SLOWER),
    _model("internvl3-8b", "InternVL3-8B, 3328 -> 332", "internvl3-8b", "10%", "1024x768", *_NO_SLOWER),
)


def judge(part: Part, rows: Rows, exit_codes: Sequence[int]) -> list[tuple[str, str, str, bool | None]]:
    """Returns a line for each bar of a part: text, bound, value, and whether it is reached (None if not measured).

    Args:
        part: The part.
        rows: The part's rows.
        exit_codes: Exit codes of the part's commands; each failed command has a line, too.
    """
    lines: list[tuple[str, str, str, bool | None]] = [
        ("its command", "exit code 0", f"exit code {code}", code == 0)
        for code in exit_codes or [0]
        if code or not part.bars
    ]
    return [*lines, *((bar.text, bar.shown_bound, *bar.judge(rows)) for bar in part.bars)]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a bar is not reached or a command failed, 2 for usage, 130 after Ctrl-C."""
    known = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="mmtok_bench.gpu_check",
        description="Runs the checks that need an NVIDIA GPU, and compares each result with its bar.",
    )
    parser.add_argument("--parts", type=each(str), default=known, help=f"some of {', '.join(known)} (default all)")
    parser.add_argument("--output", type=Path, default=Path("artifacts/gpu-check"), help="folder (default %(default)s)")
    parser.add_argument("--again", action="store_true", help="run finished parts again")
    parser.add_argument("--server-args", default="", metavar="ARGS", help="arguments of all servers")
    parser.add_argument("--list", action="store_true", help="print the parts and stop")
    parser.add_argument("--dry-run", action="store_true", help="print their commands and bars and stop")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print("\n".join(f"{part.name:16}{part.about}" for part in PARTS))
        return 0
    return run_command("gpu-check", lambda: _run(arguments), stopped="finished parts are kept, and not run again.")


def _run(arguments: argparse.Namespace) -> int:
    known = {part.name: part for part in PARTS}
    unknown = [name for name in arguments.parts if name not in known]
    if unknown:
        raise ValueError(f"--parts takes some of {', '.join(known)}, got {unknown[0]!r}")
    chosen = [known[name] for name in arguments.parts]
    if arguments.dry_run:
        print_parts(chosen, arguments.output, arguments.server_args)
        return 0
    if not torch.cuda.is_available():
        raise ValueError("needs an NVIDIA GPU that PyTorch can use: nothing can be checked here")
    for part in chosen:
        if part.needs_gib > _memory_gib():
            print(f"== {part.name} is not run: it needs {part.needs_gib} GiB of GPU memory", flush=True)
            continue
        folder = arguments.output / part.name
        if arguments.again or exit_codes_in(folder) is None:
            run_part(part, folder, arguments.server_args)
    return _report(chosen, arguments.output, arguments.server_args)


def _memory_gib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


def _filled_in(
    command: Sequence[str], folder: Path, memory_gib: float = _LARGE_GIB, server_args: str = ""
) -> list[str]:
    is_large = memory_gib >= _LARGE_GIB
    values = {"FOLDER": str(folder), "PRESET": "h200" if is_large else "h100", "ROUNDS": "5" if is_large else "1"}
    words = [values.get(word, word) for word in command]
    if server_args and _starts_servers(command):
        given = "".join(word.removeprefix(_SERVER_ARGS) for word in words if word.startswith(_SERVER_ARGS))
        words = [word for word in words if not word.startswith(_SERVER_ARGS)]
        words.append(f"{_SERVER_ARGS}{server_args} {given}".rstrip())
    return words


def _starts_servers(command: Sequence[str]) -> bool:
    return command[1] in _WITH_SERVER_ARGS or command[1:4] == ("mmtok_deploy", "bench", "serve")


def print_parts(parts: Sequence[Part], folder: Path, server_args: str = "") -> None:
    """Prints the commands and bars of parts, as a large GPU runs them."""
    for part in parts:
        print(f"# {part.name}: {part.about}")
        for command in part.commands:
            print(shlex.join(["python", *_filled_in(command, folder / part.name, server_args=server_args)]))
        for bar in part.bars:
            print(f"#   {bar.text}: {bar.shown_bound}")


def run_part(part: Part, folder: Path, server_args: str = "") -> None:
    """Runs a part's commands one after another; writes logs, rows and exit codes to `folder`.

    Args:
        part: The part.
        folder: Its folder.
        server_args: Arguments of all servers, beside the part's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    start = time.monotonic()
    print(f"== {part.name}: {part.about}", flush=True)
    exit_codes = []
    for place, command in enumerate(part.commands):
        arguments = _filled_in(command, folder, _memory_gib(), server_args)
        with (folder / f"command-{place}.log").open("w") as log:
            print("$ python", *arguments, file=log, flush=True)
            command_line = [sys.executable, *arguments]
            try:
                with running_process(command_line, grace_s=5.0, stdout=log, stderr=subprocess.STDOUT) as process:
                    code = process.wait(part.timeout_s or _TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = 124
        exit_codes.append(code)
    if part.in_process is not None:
        try:
            for row in part.in_process():
                append_row(folder / "in-process.jsonl", row)
        except Exception:  # the other parts are still to be run
            (folder / "in-process.log").write_text(traceback.format_exc())
            exit_codes.append(1)
    (folder / DONE).write_text(json.dumps({"exit_codes": exit_codes, "seconds": round(time.monotonic() - start, 1)}))


def exit_codes_in(folder: Path) -> list[int] | None:
    """Returns the exit codes of the commands of a part that has run in the folder; None if it has not."""
    done = folder / DONE
    codes: list[int] | None = json.loads(done.read_text())["exit_codes"] if done.is_file() else None
    return codes


def _rows_of(part: Part, folder: Path, server_args: str = "") -> list[ResultRow]:
    """Returns a part's rows, without the arguments that all servers were given."""
    names = [name for name in (part.beside, part.name) if name is not None and (folder / name).is_dir()]
    rows = [row for name in names for path in row_files(folder / name) for row in read_rows(path)]
    of_all = shlex.join(shlex.split(server_args))
    return [
        replace(row, case={**row.case, "server_arguments": str(found).removeprefix(of_all).strip()})
        if (found := row.case.get("server_arguments"))
        else row
        for row in rows
    ]


def _report(parts: Sequence[Part], folder: Path, server_args: str) -> int:
    table = Table(title=torch.cuda.get_device_name())
    for heading in ("part", "what", "bar", "measured", ""):
        table.add_column(heading)
    verdicts = {True: "pass", False: "[bold red]falls short[/]", None: "[yellow]not measured[/]"}
    is_failed = False
    for part in parts:
        exit_codes = exit_codes_in(folder / part.name)
        if exit_codes is None:
            table.add_row(part.name, f"needs {part.needs_gib} GiB", "", "", "not run")
            continue
        choices = {bar.text for bar in part.bars if bar.is_choice}
        for text, bound, value, is_reached in judge(part, _rows_of(part, folder, server_args), exit_codes):
            is_told = text in choices and is_reached is not None
            verdict = ("better" if is_reached else "not better") if is_told else verdicts[is_reached]
            table.add_row(part.name, text, bound, value, verdict)
            is_failed |= not is_told and is_reached is not True
    Console().print(table)
    with (folder / "table.txt").open("w") as file:
        Console(file=file, width=160).print(table)
    archive = folder / "gpu-check.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".jsonl", ".json", ".txt", ".log", ".png") and path.stat().st_size < 8 << 20:
                tar.add(path, path.relative_to(folder))
    print(f"Written: {archive}")
    return int(is_failed)


if __name__ == "__main__":
    sys.exit(main())
