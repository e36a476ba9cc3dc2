"""The parts of the check: what is run, and the bars of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import get_args

from mmtok_bench.families import FamilyName
from mmtok_bench.results import CaseValue, ResultRow
from mmtok_gpu_check.bars import Bar, Find, Measure, gain, load, measured, of_row, ratio, row_of
from mmtok_gpu_check.graph_times import time_graphs

__all__ = ["LARGE_GIB", "PARTS", "Part"]

LARGE_GIB = 120
"""Least GPU memory for several servers of a 7B model side by side."""


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


def _selection_share(concurrency: int) -> Bar:
    share = measured(lambda metrics: 100 * metrics["selection_ms"] / metrics["ttft_p50_ms"], load("10%", concurrency))
    return Bar("the selection's share of TTFT", "at most 2 %", share)


def _gpu_time_ratio(*metrics: Mapping[str, float]) -> float:
    first, second = (each["vision_encoder_ms"] + each["selection_ms"] + each["language_prefill_ms"] for each in metrics)
    return first / second


def _graph(num_tokens: int, num_picks: int, dtype: str, batch: int = 1) -> Find:
    case: dict[str, CaseValue] = {"num_tokens": num_tokens, "num_picks": num_picks, "batch": batch, "dtype": dtype}
    return partial(row_of, bench="selector-graph", case=case)


def _graph_ms(num_tokens: int, num_picks: int, dtype: str) -> Measure:
    return measured(itemgetter("latency_p50_ms"), _graph(num_tokens, num_picks, dtype))


def _serve(model: str, budget: str, size: str, concurrency: str, *more: str, rounds: str = "ROUNDS") -> tuple[str, ...]:
    return (
        *("-m", "mmtok_deploy", "bench", "serve", "--preset", "PRESET", "--models", model),
        *("--budgets", budget, "--image-px", size, "--concurrency", concurrency),
        *(() if "--image-kinds" in more else ("--image-kinds", "photograph")),
        *(() if "--prefix-cache" in more else ("--prefix-cache", "off")),
        *("--rounds", rounds, "--num-requests", "16", "--output-tokens", "16", "--results-dir", "FOLDER", *more),
    )


def _rates(budget: str, concurrency: int, bound: float) -> Bar:
    return Bar(f"requests/s at {concurrency}", f"at least {bound:g} x", gain("requests_per_s", budget, concurrency))


def _ttft(budget: str, concurrency: int, bound: float) -> Bar:
    return Bar(f"TTFT at {concurrency}", f"at least {bound:g} x", gain("ttft_p50_ms", budget, concurrency))


def _qwen_7b(concurrency: int, *bars: Bar) -> Part:
    return Part(
        f"qwen-7b-{concurrency}",
        f"Qwen2.5-VL-7B, 864 -> 86, {concurrency} at once",
        (_serve("qwen2.5-vl-7b", "10%", "1008x672", str(concurrency)),),
        (
            Bar(f"`all`, requests/s at {concurrency}", "at least 0.98 x", gain("requests_per_s", "all", concurrency)),
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
    return Bar(text, "at least 1 x", ratio(metric, *finds), is_choice)


def _setting(name: str, about: str, arguments: str) -> Part:
    """Returns a part that measures whether the presets should give these further arguments to all servers."""
    return Part(
        f"setting-{name}",
        f"{about}: {arguments}; beside qwen-7b-16",
        (_serve("qwen2.5-vl-7b", "10%", "1008x672", "16", f"--server-args={arguments}"),),
        tuple(
            _better(
                *(f"`{budget}` with it, requests/s at 16", "requests_per_s"),
                *(load(budget, 16, arguments=arguments), load(budget, 16)),
                is_choice=True,
            )
            for budget in ("off", "all", "10%")
        ),
        beside="qwen-7b-16",
    )


def _questions(name: str, about: str, concurrency: int, bound: float, *more: str, arguments: str = "") -> Part:
    told = (*more, *((f"--server-args={arguments}",) if arguments else ()))
    asked = ("--prefix-cache", "on", "--questions-per-image", "6", *told)
    rates = gain("requests_per_s", "10%", concurrency, questions=6, arguments=arguments)
    return Part(
        name,
        f"Qwen2.5-VL-7B, 864 -> 86, 6 questions per image, {about}",
        (_serve("qwen2.5-vl-7b", "10%", "1008x672", str(concurrency), *asked),),
        (Bar(f"requests/s at {concurrency}", f"at least {bound:g} x", rates),),
    )


def _logprobs(family: str, prefill: str, encoder: str = "eager", drafts: str | None = None) -> tuple[Bar, ...]:
    def times(metrics: Mapping[str, float], name: str, of: str) -> float | None:
        return metrics[name] / metrics[of] if metrics[of] else math.inf

    def of_family(value: Callable[[Mapping[str, float]], float | None]) -> Measure:
        case = {"family": family, "prefill": prefill, "encoder": encoder} | ({"drafts": drafts} if drafts else {})
        return of_row("device-logprobs", value, **case)

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

    of_method = partial(of_row, "device-quantised", method=method)
    return (
        Bar(f"{method}, difference of coverage", "at most 0.001", of_method(itemgetter("max_difference"))),
        Bar(f"{method}, another question's against that", "at least 10 x", of_method(control)),
    )


def _device_logprobs(family: str, prefill: str, *more: str) -> tuple[str, ...]:
    return ("-m", "tests.runtime.device_logprobs", "FOLDER", "--family", family, "--prefill", prefill, *more)


_WITH_GRAPHS = tuple(
    family for family in get_args(FamilyName) if family.startswith(("llava", "qwen2.5", "qwen3", "glm-4.1"))
)
# GLM-4.5V has the encoder of GLM-4.1V.
_WITH_ENCODER_GRAPHS = tuple(family for family in get_args(FamilyName) if family not in ("internvl3", "glm-4.5v"))
_WITH_VIDEOS: tuple[FamilyName, ...] = ("qwen2.5-vl", "qwen3-vl", "glm-4.1v")
_WITH_DRAFTS: tuple[tuple[FamilyName, str], ...] = (
    *(("qwen2.5-vl", "ngram"), ("llava-1.5", "ngram")),
    *(("qwen2.5-vl", "eagle3"), ("qwen3-vl", "eagle3"), ("qwen3.5", "head")),
)
_QUANTISED = ("fp8", "awq", "gptq")
_PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")

_BATCH_COST = measured(
    lambda many, one: many["latency_p50_ms"] / one["latency_p50_ms"],
    *(_graph(576, 64, "bfloat16", 32), _graph(576, 64, "bfloat16")),
)

# Bars of a model that was not measured before.
_NO_SLOWER = (
    Bar("`all`, requests/s at 16", "at least 0.98 x", gain("requests_per_s", "all", 16)),
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
        time_graphs,
    ),
    Part(
        "engines",
        "exported files: ONNX Runtime's CUDA provider and TensorRT",
        ((*_PYTEST, "tests/exporters", "tests/mmtok_deploy/test_engines.py", "tests/test_docs.py"),),
    ),
    Part(
        "first-request",
        "Qwen2.5-VL-7B, 10%: the first request of a server, and 500 random ones",
        (("-m", "mmtok_gpu_check.served_checks", "FOLDER", "--model", "qwen2.5-vl-7b", "--requests", "500"),),
        (
            Bar(
                *("the first request's TTFT against the 90th percentile of the tenth and later ones", "at most 1.1 x"),
                of_row("served-checks", lambda found: found["first_ttft_ms"] / found["later_ttft_p90_ms"]),
            ),
            Bar(
                *("kernels of MMTok compiled in 500 requests", "at most 0"),
                of_row("served-checks", lambda found: found.get("triton_compiles")),
            ),
            Bar("requests that failed", "at most 0", of_row("served-checks", itemgetter("num_failed"))),
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
        _better("TTFT at 1 against 10%", "ttft_p50_ms", load("40%@0.5", 1), load("10%", 1)),
        _better("requests/s at 16 against 10%", "requests_per_s", load("40%@0.5", 16), load("10%", 16)),
    ),
    _model(
        *("qwen-7b-repeats", "Qwen2.5-VL-7B, pages of text, repeated patches left out or not"),
        *("qwen2.5-vl-7b", "10%,10%~8", "1008x672"),
        _better(
            *("TTFT at 1 against 10%", "ttft_p50_ms"),
            *(load("10%~8", 1, kind="document"), load("10%", 1, kind="document")),
        ),
        _better(
            *("requests/s at 16 against 10%", "requests_per_s"),
            *(load("10%~8", 16, kind="document"), load("10%", 16, kind="document")),
        ),
        kind="document",
    ),
    _model(
        *("llava-next-13b", "LLaVA-NeXT-13B, 2880 -> 160, PNGs", "llava-next-13b", "160", "672x672"),
        _ttft("160", 1, 2.3),
        Bar("GPU time of a request", "at least 4 x", measured(_gpu_time_ratio, load("all", 1), load("160", 1))),
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
        needs_gib=LARGE_GIB,
    ),
    _model(
        *("qwen3-vl-8b", "Qwen3-VL-8B, 768 -> 76", "qwen3-vl-8b", "10%", "1024x768"),
        *(*_NO_SLOWER, _selection_share(1)),
    ),
    _model("qwen3.5-9b", "Qwen3.5-9B, 768 -> 76", "qwen3.5-9b", "10%", "1024x768", *_NO_SLOWER),
    _model("glm-4.1v-9b", "GLM-4.1V-9B, 864 -> 86", "glm-4.1v-9b", "10%", "1008x672", *_NO_SLOWER),
    _model("internvl3-8b", "InternVL3-8B, 3328 -> 332", "internvl3-8b", "10%", "1024x768", *_NO_SLOWER),
)
