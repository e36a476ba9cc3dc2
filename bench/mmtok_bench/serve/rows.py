"""Result rows of served models, one for each case."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmtok_bench.results import CaseValue, ResultRow, make_row
from mmtok_bench.serve.load import LoadResult
from mmtok_bench.serve.plan import LoadCase
from mmtok_bench.serve.presets import ServedModel, ServePlan

__all__ = ["BENCH", "Sample", "known_case", "median_interval", "serve_row"]

BENCH = "serve"
_NUM_RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Sample:
    """Measurements of one case in one round.

    Args:
        load: Result of the load generator.
        stages: Result of `stage_metrics`.
        is_later: Whether each answered request is a later question about its image; empty if each image has one
            question.
        peak_memory_bytes: Result of `PeakMemory`; None if it includes other servers' memory.
        max_total_tokens: Size of the server's KV cache in tokens.
        image_tokens_in: Tokens of the image at its own size, unpruned.
        image_tokens_kept: Tokens of the image that the language model read.
    """

    load: LoadResult
    stages: Mapping[str, float]
    peak_memory_bytes: int | None
    max_total_tokens: int
    image_tokens_in: int
    image_tokens_kept: int
    is_later: Sequence[bool] = ()


def known_case(plan: ServePlan, model: ServedModel, measured: LoadCase) -> dict[str, CaseValue]:
    """Returns the part of a row's case that is known before the measurement."""
    case: dict[str, CaseValue] = {
        "model": model.name,
        "family": model.family,
        "weights": "dummy" if model.model_path is None else "checkpoint",
        "image_kind": measured.image_kind,
        "image_px": "x".join(map(str, measured.image_px)),
        "budget": measured.budget,
        "method": measured.method,
        "concurrency": measured.concurrency,
        "prefix_cache": measured.side.prefix_cache,
        "questions_per_image": measured.questions,
        "output_tokens": plan.output_tokens,
        "preset": plan.preset,
    }
    if measured.questions > 1 and plan.images_in_turn is not None:
        case["images_in_turn"] = plan.images_in_turn
    if plan.one_server:
        case["asked_by"] = "request"
    if plan.user_arguments:
        case["server_arguments"] = shlex.join(plan.user_arguments)
    return case


def serve_row(
    plan: ServePlan,
    model: ServedModel,
    measured: LoadCase,
    by_round: Mapping[int, Sample],
    unpruned: Mapping[int, Sample],
) -> ResultRow:
    """Returns the row of a case: latencies over the requests of all rounds, and medians of the rounds' rates.

    Args:
        plan: What is measured.
        model: The model that was served.
        measured: The case.
        by_round: Its samples by round, at least one.
        unpruned: Samples of the server without the plugin by round; empty if it was not measured.
    """
    samples = list(by_round.values())
    loads = [sample.load for sample in samples]
    prompt_tokens = [count for load in loads for count in load.prompt_tokens]
    text_tokens = round(float(np.mean(prompt_tokens)) - samples[0].image_tokens_kept)
    return make_row(
        BENCH,
        {**known_case(plan, model, measured), "text_tokens": text_tokens},
        "sglang",
        _latencies(loads)
        | _by_question(samples)
        | _throughput(loads)
        | ({} if measured.is_unpruned else _gains(by_round, unpruned))
        | _stages(samples)
        | _tokens_and_memory(samples, plan),
        num_runs=sum(len(load.ttfts_s) for load in loads),
        device=torch.device(plan.device),
        num_threads=len(os.sched_getaffinity(0)),
    )


def _latencies(loads: Sequence[LoadResult]) -> dict[str, float]:
    ttfts_s = [ttft_s for load in loads for ttft_s in load.ttfts_s]
    itls_s = [itl_s for load in loads for answer in load.itls_s for itl_s in answer]
    e2es_s = [ttft_s + sum(answer) for load in loads for ttft_s, answer in zip(load.ttfts_s, load.itls_s, strict=True)]
    metrics = {}
    for name, times_s in (("ttft", ttfts_s), ("itl", itls_s), ("e2e", e2es_s)):
        # Answers of one token have no time between tokens.
        if times_s:
            for percent in (50, 90, 99):
                metrics[f"{name}_p{percent}_ms"] = 1e3 * float(np.percentile(times_s, percent))
    return metrics


def _by_question(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns the medians of first and of later questions about an image; empty if there is only one."""
    metrics = {}
    for name, later in (("ttft_first_p50_ms", False), ("ttft_later_p50_ms", True)):
        times_s = [
            ttft_s
            for sample in samples
            for ttft_s, is_later in zip(sample.load.ttfts_s, sample.is_later, strict=bool(sample.is_later))
            if is_later == later
        ]
        if times_s:
            metrics[name] = 1e3 * float(np.median(times_s))
    return metrics


def _throughput(loads: Sequence[LoadResult]) -> dict[str, float]:
    return {
        "requests_per_s": float(np.median([_requests_per_s(load) for load in loads])),
        "input_tokens_per_s": float(np.median([sum(load.prompt_tokens) / load.duration_s for load in loads])),
        "output_tokens_per_s": float(np.median([load.output_tokens / load.duration_s for load in loads])),
        "num_rounds": len(loads),
        "duration_s": sum(load.duration_s for load in loads),
        "num_failed": sum(load.num_failed for load in loads),
    }


def _requests_per_s(load: LoadResult) -> float:
    return len(load.ttfts_s) / load.duration_s


def _gains(by_round: Mapping[int, Sample], unpruned: Mapping[int, Sample]) -> dict[str, float]:
    """Returns how many times as good a case is as the unpruned server, each with the ends of a 95% interval.

    Each round gives a ratio of two servers that were measured one after the other; the gain is the median of the
    rounds' ratios. Empty for fewer than two rounds.
    """
    pairs = [(by_round[number].load, unpruned[number].load) for number in by_round if number in unpruned]
    if len(pairs) < 2:
        return {}
    ratios = {
        "ttft_p50_gain": [float(np.median(theirs.ttfts_s) / np.median(ours.ttfts_s)) for ours, theirs in pairs],
        "requests_per_s_gain": [_requests_per_s(ours) / _requests_per_s(theirs) for ours, theirs in pairs],
    }
    metrics: dict[str, float] = {}
    for name, values in ratios.items():
        low, high = median_interval(values)
        metrics |= {name: float(np.median(values)), f"{name}_low": low, f"{name}_high": high}
    return metrics


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95% percentile bootstrap interval of the median; for five values it is nearly their range."""
    drawn = np.random.default_rng(0).choice(np.asarray(values), size=(_NUM_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), (2.5, 97.5))
    return float(low), float(high)


def _stages(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns each stage's milliseconds per request, averaged over the rounds, and the sum of fallbacks."""
    names = set.intersection(*(set(sample.stages) for sample in samples))
    metrics = {name: float(np.mean([sample.stages[name] for sample in samples])) for name in sorted(names)}
    if "num_fallbacks" in metrics:
        metrics["num_fallbacks"] *= len(samples)
    return metrics


def _tokens_and_memory(samples: Sequence[Sample], plan: ServePlan) -> dict[str, float]:
    prompt_tokens = [count for sample in samples for count in sample.load.prompt_tokens]
    # The last token of an answer is not written to the KV cache.
    kv_tokens = float(np.mean(prompt_tokens)) + plan.output_tokens - 1
    first = samples[0]
    peaks = [sample.peak_memory_bytes for sample in samples if sample.peak_memory_bytes is not None]
    return {
        "image_tokens_in": first.image_tokens_in,
        "image_tokens_kept": first.image_tokens_kept,
        "kv_tokens_per_request": kv_tokens,
        "max_requests_at_once": int(first.max_total_tokens // kv_tokens),
    } | ({"peak_memory_bytes": max(peaks)} if peaks else {})
